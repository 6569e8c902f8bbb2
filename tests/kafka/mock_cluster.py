"""
librdkafka's mock cluster, out of confluent-kafka's wheel: a broker that answers with the error it is told to.

It knows topics, coordinators and produce requests. It does not enforce fencing, keeps no markers, and shows uncommitted
records to everybody: what it can prove is how a client takes an error, and nothing about what readers see.
"""

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from kafka.net.connection import KafkaConnection

PRODUCER = 0
APIS = {
    "Produce": 0,
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "AddOffsetsToTxn": 25,
    "EndTxn": 26,
    "TxnOffsetCommit": 28,
}
_READABLE_API_VERSIONS = 2


@cache
def _library() -> Any:
    (path,) = Path(confluent_kafka.__file__).parent.parent.glob("confluent_kafka.libs/librdkafka*.so*")
    library = ctypes.CDLL(str(path))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "conf_new": (pointer, []),
        "new": (pointer, [number, pointer, text, ctypes.c_size_t]),
        "destroy": (None, [pointer]),
        "mock_cluster_new": (pointer, [pointer, number]),
        "mock_cluster_destroy": (None, [pointer]),
        "mock_cluster_bootstraps": (text, [pointer]),
        "mock_topic_create": (number, [pointer, text, number, number]),
        "mock_push_request_errors_array": (
            None,
            [pointer, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(number)],
        ),
        "mock_clear_request_errors": (None, [pointer, ctypes.c_int16]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"rd_kafka_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class MockCluster:
    """Some brokers in this process. A :class:`broker.Cluster`, as far as it goes."""

    secure = None

    def __init__(self, brokers: int = 1) -> None:
        self._rdkafka = _library()
        error = ctypes.create_string_buffer(512)
        self._client = self._rdkafka.rd_kafka_new(PRODUCER, self._rdkafka.rd_kafka_conf_new(), error, len(error))
        assert self._client, error.value
        self._cluster = self._rdkafka.rd_kafka_mock_cluster_new(self._client, brokers)
        self.bootstrap: list[str] = self._rdkafka.rd_kafka_mock_cluster_bootstraps(self._cluster).decode().split(",")

    def make_topic(self, name: str, partitions: int = 1) -> None:
        assert self._rdkafka.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1) == 0

    def answer(self, api: str, code: int, times: int) -> None:
        """The next so many requests of this kind are answered with this error."""
        codes = (ctypes.c_int * times)(*itertools.repeat(code, times))
        self._rdkafka.rd_kafka_mock_push_request_errors_array(self._cluster, APIS[api], times, codes)

    def answer_well(self, api: str) -> None:
        self._rdkafka.rd_kafka_mock_clear_request_errors(self._cluster, APIS[api])

    def wipe(self) -> None:
        self._rdkafka.rd_kafka_mock_cluster_destroy(self._cluster)
        self._rdkafka.rd_kafka_destroy(self._client)


def reach_mock_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Let kafka-python begin with a version of ApiVersions that it can read the mock's answer to.

    The mock answers version 3 with a header that the protocol forbids for this one request.
    """
    begin: Callable[..., None] = KafkaConnection.__init__

    def begin_lower(self: KafkaConnection, *args: object, **settings: object) -> None:
        begin(self, *args, **settings)
        self._api_versions_idx = _READABLE_API_VERSIONS

    monkeypatch.setattr(KafkaConnection, "__init__", begin_lower)
