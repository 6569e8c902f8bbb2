"""
Every error a broker may answer a transactional request with, by librdkafka's mock cluster: 13 codes, 6 requests.

``AddOffsetsToTxn`` and ``TxnOffsetCommit`` belong to a consumer group inside the transaction. Our positions are in the
progress record, so these two are never sent, and a broker that would answer them badly is not noticed.
"""

import contextlib
import threading
import time
from collections.abc import Generator
from typing import Any

import pytest
from broker import wait_until
from deployment import outputs
from mock_cluster import APIS, MockCluster, reach_mock_clusters

from streamlstm.config.model import Config
from streamlstm.errors import DataError, NotAuthorised, StartOver, StreamlstmError, Temporary
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import Fenced
from streamlstm.transport.kafka.publisher import KafkaPublisher

PASSING = (6, 7, 13, 16, 19)
"""Not the leader, timed out, network, not the coordinator, not enough replicas: the client asks again."""

CODES = (*PASSING, 10, 29, 45, 47, 59, 87, 90, 120)

BAD_ENDS: dict[str, dict[int, type[StreamlstmError]]] = {
    # 10 once: the client sends it again in smaller batches.
    "Produce": {29: NotAuthorised, 45: StartOver, 47: Fenced, 59: StartOver, 87: DataError, 90: Fenced, 120: StartOver},
    # A broker answers none of these with 10, 29, 45, 59 or 87. If one does, a restart is never wrong.
    "InitProducerId": dict.fromkeys((10, 29, 45, 59, 87, 120), Temporary) | dict.fromkeys((47, 90), Fenced),
    "AddPartitionsToTxn": dict.fromkeys((10, 45, 59, 87, 120), StartOver)
    | dict.fromkeys((47, 90), Fenced)
    | {29: NotAuthorised},
    "EndTxn": dict.fromkeys((10, 29, 45, 59, 87, 120), StartOver) | dict.fromkeys((47, 90), Fenced),
    "AddOffsetsToTxn": {},
    "TxnOffsetCommit": {},
}


class Witness:
    """A producer that knows whether a commit was asked for although a send had failed, or nobody knew."""

    def __init__(self, producer: Any) -> None:
        self._producer_, self._sent = producer, []
        self.believed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer_, name)

    def send(self, *args: object, **kwargs: object) -> Any:
        self._sent.append(self._producer_.send(*args, **kwargs))
        return self._sent[-1]

    def commit_transaction(self) -> None:
        self.believed += any(not future.succeeded() for future in self._sent)
        self._producer_.commit_transaction()


class Cell:
    """A publisher whose broker answers one request badly."""

    def __init__(self, cluster: MockCluster, limit_s: float = 30.0) -> None:
        self.cluster = cluster
        self.expired = threading.Event()
        self.deadline = Deadline(limit_s, expire=lambda _: self.expired.set())
        self.publisher = KafkaPublisher(config(cluster), self.deadline)
        self.witness: Witness | None = None

    def publish(self, api: str, code: int, times: int) -> None:
        if api == "InitProducerId":
            self.cluster.answer(api, code, times)
        self.publisher.begin_session()
        self.witness = Witness(self.publisher._producer)
        self.publisher._producer = self.witness
        self.cluster.answer(api, code, times)
        self.publisher.commit(outputs(b"step", [b"a", b"b"], [b"bad"]))

    def close(self) -> None:
        for api in APIS:
            self.cluster.answer_well(api)
        self.publisher.close()
        self.deadline.close()
        assert self.witness is None or self.witness.believed == 0, "a commit with a failed send"


def config(cluster: MockCluster) -> Config:
    return Config.model_validate({
        "name": "n",
        "source": {"bootstrap_servers": cluster.bootstrap, "topics": ["in"]},
        "decode": {"series_id": ["@key"], "timestamp": {"path": "$.ts"}, "target": "$.value"},
        "runtime": {"deadline": "1s"},
    })  # fmt: skip


@pytest.fixture(scope="module")
def mock_cluster() -> Generator[MockCluster, None, None]:
    cluster = MockCluster()
    for topic in ("in", "n", "n.dlq", "n.progress"):
        cluster.make_topic(topic)
    yield cluster
    cluster.wipe()


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    reach_mock_clusters(monkeypatch)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("api", APIS)
def test_an_error_ends_in_a_commit_of_all_or_in_its_own_way(mock_cluster: MockCluster, api: str, code: int) -> None:
    began = time.monotonic()
    cell = Cell(mock_cluster)
    error: StreamlstmError | None = None
    try:
        cell.publish(api, code, times=1)
    except StreamlstmError as raised:
        error = raised
    finally:
        cell.close()

    expected = BAD_ENDS[api].get(code)
    assert type(error) is (expected or type(None)), error
    assert error is None or error.exit_code in (65, 75, 77)
    assert "\n" not in str(error)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("api", ["InitProducerId", "AddPartitionsToTxn", "EndTxn"])
def test_a_right_that_was_taken_away_is_fatal(mock_cluster: MockCluster, api: str) -> None:
    cell = Cell(mock_cluster)
    try:
        with pytest.raises(NotAuthorised) as caught:
            cell.publish(api, 53, times=1)
    finally:
        cell.close()
    assert caught.value.exit_code == 77


@pytest.mark.parametrize(("api", "expected"), [("Produce", StartOver), ("InitProducerId", Temporary)])
def test_an_error_that_does_not_pass_ends_within_the_deadline(
    mock_cluster: MockCluster, api: str, expected: type[StreamlstmError]
) -> None:
    began = time.monotonic()
    cell = Cell(mock_cluster)
    try:
        with pytest.raises(expected):
            cell.publish(api, 19, times=1000)
    finally:
        cell.close()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("api", ["AddPartitionsToTxn", "EndTxn"])
def test_where_the_client_would_ask_for_ever_the_deadline_ends_the_process(mock_cluster: MockCluster, api: str) -> None:
    """The exit is a flag here, so that the test run lives on; then the broker answers well and the thread ends."""
    cell = Cell(mock_cluster, limit_s=1.0)

    def publish() -> None:
        with contextlib.suppress(StreamlstmError):
            cell.publish(api, 16, times=100_000)

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    wait_until(cell.expired.is_set, 20, "the deadline expires")
    mock_cluster.answer_well(api)
    thread.join(30)
    cell.close()
    assert not thread.is_alive()
