"""Brokers for tests, and a deployment of its own for each."""

import os
import signal
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from broker import Cluster, NoBroker, start
from deployment import Deployment
from service import Service

NOT_PROVEN = (
    "how errors are taken is tested all the same, on librdkafka's mock cluster (test_error_codes.py); what readers "
    "see, fencing and restarts are not"
)
REQUIRED = os.environ.get("STREAMLSTM_TEST_REQUIRE_BROKER") == "1"


# A run that is terminated must still stop its brokers.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kafka)


def _cluster(directory: Path, **kind: object) -> Generator[Cluster, None, None]:
    try:
        cluster = start(directory, **kind)
    except NoBroker as reason:
        if REQUIRED:
            pytest.fail(f"STREAMLSTM_TEST_REQUIRE_BROKER=1, and there is no broker: {reason}")
        pytest.skip(f"needs a Kafka broker: {reason}; {NOT_PROVEN}")
    try:
        yield cluster
    finally:
        cluster.wipe()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    """One broker for most tests. Nobody stops or pauses it."""
    yield from _cluster(tmp_path_factory.mktemp("broker") / "one")


@pytest.fixture(scope="session")
def secure_cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    """One broker with a SASL_SSL listener too."""
    yield from _cluster(tmp_path_factory.mktemp("broker") / "secure", secure=True)


@pytest.fixture(scope="session")
def guarded_cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    """
    One broker that asks who you are, and for your rights, on its SASL_SSL listener; on the other one all is allowed.

    It asks again every two seconds: without that, a connection outlives its credentials.
    """
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "connections.max.reauth.ms": "2000",
    }
    yield from _cluster(tmp_path_factory.mktemp("broker") / "guarded", secure=True, settings=settings)


@pytest.fixture(scope="class")
def three_brokers(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    """Three brokers that a test may kill, and starts again."""
    yield from _cluster(tmp_path_factory.mktemp("brokers") / "three", brokers=3)


@pytest.fixture
def own_broker(tmp_path: Path) -> Generator[Cluster, None, None]:
    """One broker that a test may kill."""
    yield from _cluster(tmp_path / "own", mortal=True)


@pytest.fixture
def deploy(tmp_path: Path) -> Generator[Callable[..., Deployment], None, None]:
    """Makes deployments with names of their own, and closes what they opened."""
    made: list[Deployment] = []

    def make(cluster: Cluster, **options: object) -> Deployment:
        made.append(Deployment(cluster, f"t{uuid.uuid4().hex[:10]}", tmp_path, **options))
        return made[-1]

    yield make
    for deployment in made:
        deployment.close()


@pytest.fixture
def deployment(deploy: Callable[..., Deployment], cluster: Cluster) -> Deployment:
    """A deployment on the shared broker, its topics made: two input partitions."""
    return deploy(cluster).with_topics()


@pytest.fixture
def serve(tmp_path: Path) -> Generator[Callable[..., Service], None, None]:
    """Makes services, each with a directory of its own, and ends what still runs."""
    made: list[Service] = []

    def make(deployment: Deployment, **sections: object) -> Service:
        made.append(Service(deployment, tmp_path / f"service-{len(made)}", **sections))
        return made[-1]

    yield make
    for service in made:
        service.close()
