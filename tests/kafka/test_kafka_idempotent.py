"""Publishing without transactions, against real brokers."""

import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from broker import Cluster, wait_until
from deployment import Deployment, outputs

from streamlstm.errors import CheckpointNotWritten, DataError, StartOver, Temporary
from streamlstm.recovery.journal import Journal
from streamlstm.transport.interfaces import OutMessage, Outputs
from streamlstm.transport.kafka.idempotent import IdempotentPublisher
from streamlstm.transport.kafka.topics import check_topics, create_topics


@pytest.fixture
def open_publisher(tmp_path: Path) -> Generator[Callable[..., IdempotentPublisher], None, None]:
    made: list[IdempotentPublisher] = []

    def make(deployment: Deployment, log: Journal | None = None) -> IdempotentPublisher:
        made.append(IdempotentPublisher(deployment.config, log or Journal(tmp_path / "journal"), deployment.deadline))
        made[-1].begin_session()
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


def journalled(tmp_path: Path) -> list[bytes]:
    return [entry.value for entry in Journal(tmp_path / "journal").read()]


def test_a_commit_is_in_the_journal_and_any_reader_sees_its_outputs(
    deployment: Deployment, open_publisher: Callable[..., IdempotentPublisher], tmp_path: Path
) -> None:
    publisher = open_publisher(deployment)
    assert publisher.commit(outputs(b"step 1", [b"a", b"b"], [b"bad"])) == 0
    assert publisher.commit(outputs(b"step 2", [b"c"])) == 1

    assert sorted(deployment.committed(deployment.config.forecast_topic)) == [b"a", b"b", b"c"]
    assert deployment.committed(deployment.config.dead_letter_topic) == [b"bad"]
    assert journalled(tmp_path) == [b"step 1", b"step 2"]
    assert deployment.committed(deployment.config.progress_topic) == []


def test_nothing_is_sent_before_its_record_is_durable(
    deployment: Deployment, open_publisher: Callable[..., IdempotentPublisher], tmp_path: Path
) -> None:
    class Looking(Journal):
        seen: list[bytes] | None = None

        def append(self, value: bytes) -> int:
            self.seen = deployment.committed(deployment.config.forecast_topic)
            if value == b"step 2":
                raise CheckpointNotWritten("no space")
            return super().append(value)

    log = Looking(tmp_path / "journal")
    publisher = open_publisher(deployment, log)
    publisher.commit(outputs(b"step 1", [b"a"]))
    assert log.seen == []
    with pytest.raises(CheckpointNotWritten):
        publisher.commit(outputs(b"step 2", [b"b"]))

    assert deployment.committed(deployment.config.forecast_topic) == [b"a"]
    with pytest.raises(Temporary, match="session"):
        publisher.commit(outputs(b"step 3", [b"c"]))


def test_a_message_too_large_for_its_topic_is_refused_by_name_and_ends_it(
    deploy: Callable[..., Deployment], cluster: Cluster, open_publisher: Callable[..., IdempotentPublisher]
) -> None:
    deployment = deploy(cluster)
    deployment.make_topic(deployment.config.forecast_topic, 1, max_message_bytes="2000")
    deployment.make_topic(deployment.config.dead_letter_topic, 1)
    publisher = open_publisher(deployment)
    incompressible = bytes((i * i * 31 + i // 7) % 251 for i in range(50_000))
    with pytest.raises(DataError, match=rf"{deployment.config.forecast_topic}\b.*max\.message\.bytes"):
        publisher.commit(Outputs([OutMessage(b"k", incompressible, [], None)], [], b"step"))
    with pytest.raises(Temporary, match="session"):
        publisher.commit(outputs(b"step"))


def test_a_broker_that_freezes_is_an_error_in_time_and_what_was_journalled_is_published_again(
    deploy: Callable[..., Deployment],
    own_broker: Cluster,
    open_publisher: Callable[..., IdempotentPublisher],
    tmp_path: Path,
) -> None:
    deployment = deploy(own_broker, deadline="5s").with_topics()
    publisher = open_publisher(deployment)
    publisher.commit(outputs(b"step 1", [b"a"]))
    own_broker.do("pause")
    try:
        raised: list[BaseException] = []
        thread = threading.Thread(target=lambda: raised.append(_error(publisher)), daemon=True)
        thread.start()
        thread.join(15)
        assert not thread.is_alive(), "it hangs"
    finally:
        own_broker.do("resume")
    assert isinstance(raised[0], StartOver)
    assert raised[0].exit_code == 75
    assert journalled(tmp_path) == [b"step 1", b"step 2"]

    wait_until(lambda: _begun(publisher), 30, "a session begins, once the broker is back")
    publisher.publish([OutMessage(b"b", b"b", [], None)], [])
    publisher.commit(outputs(b"step 3", [b"c"]))
    assert sorted(set(deployment.committed(deployment.config.forecast_topic))) == [b"a", b"b", b"c"]
    assert journalled(tmp_path) == [b"step 1", b"step 2", b"step 3"]


def _error(publisher: IdempotentPublisher) -> BaseException:
    try:
        publisher.commit(outputs(b"step 2", [b"b"]))
    except Exception as error:  # noqa: BLE001, because the test says which it is
        return error
    return AssertionError("it went through")


def _begun(publisher: IdempotentPublisher) -> bool:
    try:
        publisher.begin_session()
    except Temporary:
        return False
    return True


def test_there_is_no_progress_topic_to_make_or_to_miss(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    deployment = deploy(cluster, delivery="idempotent")
    deployment.make_topic(deployment.input, 2)

    assert [m.plan.role for m in create_topics(deployment.config)] == ["forecasts", "dead letters"]
    check_topics(deployment.config)
    with deployment.admin() as admin:
        assert deployment.config.progress_topic not in admin.list_topics()
