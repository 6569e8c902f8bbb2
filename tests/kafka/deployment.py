"""A deployment under test: its configuration, its topics, and hands to fill and read them."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from broker import Cluster
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition

from streamlstm.config.model import Config
from streamlstm.recovery.progress import Chain, read_chain
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import OutMessage, Outputs
from streamlstm.transport.kafka.progress import KafkaProgressLog
from streamlstm.transport.kafka.publisher import KafkaPublisher
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.topics import create_topics


class Deployment:
    """Named apart from every other, so that tests share a broker without meeting."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        directory: Path,
        *,
        deadline: str = "20s",
        delivery: str = "exactly_once",
        decode: Mapping[str, Any] = MappingProxyType({}),
        **source: Any,
    ) -> None:
        self.cluster = cluster
        self.name = name
        self.input = f"{name}.in"
        self.directory = directory
        self.config = Config.model_validate({
            "name": name,
            "source": {"bootstrap_servers": cluster.bootstrap, "topics": [self.input], **source},
            "decode": {"series_id": ["@key"], "timestamp": {"path": "$.ts"}, "target": "$.value", **decode},
            "runtime": {"deadline": deadline},
            "sink": {"delivery": delivery},
            "checkpoint": {"url": str(directory / "state")},
        })  # fmt: skip
        self.expired: list[str] = []
        # Longer than the clients' own time-outs, whatever the machine; and it must not end the test run.
        self.deadline = Deadline(60.0, expire=self.expired.append)
        self._open: list[Any] = []

    def with_topics(self, partitions: int = 2, **input_settings: str) -> "Deployment":
        """The input, and those of the deployment."""
        self.make_topic(self.input, partitions, **{"retention_ms": "-1", **input_settings})
        create_topics(self.config)
        return self

    def make_topic(self, name: str, partitions: int, replicas: int = -1, **settings: str) -> None:
        configs = {key.replace("_", "."): value for key, value in settings.items()}
        with self.admin() as admin:
            admin.create_topics(
                {name: {"num_partitions": partitions, "replication_factor": replicas, "configs": configs}}
            )
            admin.wait_for_topics([name])

    def admin(self) -> Any:
        return KafkaAdminClient(bootstrap_servers=self.cluster.bootstrap)

    def source(self) -> KafkaSource:
        return self._opened(KafkaSource(self.config, self.deadline))

    def publisher(self) -> KafkaPublisher:
        return self._opened(KafkaPublisher(self.config, self.deadline))

    def progress(self) -> KafkaProgressLog:
        return KafkaProgressLog(self.config, self.deadline)

    def producer(self, **settings: object) -> Any:
        """A plain kafka-python producer, for what the product must cope with."""
        return self._opened(KafkaProducer(bootstrap_servers=self.cluster.bootstrap, **{"linger_ms": 5, **settings}))

    def fill(self, partition: int, values: Iterable[bytes], **record: Any) -> None:
        """Append to a partition of the input."""
        producer = self.producer()
        futures = [producer.send(self.input, value, partition=partition, **record) for value in values]
        producer.flush()
        for future in futures:
            future.get(10)

    def committed(self, topic: str) -> list[bytes]:
        """What a reader of a topic sees, up to the end."""
        return [value for values in self.committed_by_partition(topic) for value in values]

    def committed_by_partition(self, topic: str, isolation: str = "read_committed") -> list[list[bytes]]:
        consumer = KafkaConsumer(
            bootstrap_servers=self.cluster.bootstrap,
            isolation_level=isolation,
            auto_offset_reset="none",
            enable_auto_commit=False,
        )
        try:
            partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
            consumer.assign(partitions)
            for tp, offset in consumer.beginning_offsets(partitions).items():
                consumer.seek(tp, offset)
            ends = consumer.end_offsets(partitions)
            seen: dict[TopicPartition, list[bytes]] = {tp: [] for tp in partitions}
            while any(consumer.position(tp) < ends[tp] for tp in partitions):
                for tp, records in consumer.poll(200).items():
                    seen[tp] += [r.value for r in records]
            return [seen[tp] for tp in partitions]
        finally:
            consumer.close(autocommit=False)

    def close(self) -> None:
        for opened in self._open:
            if isinstance(opened, KafkaProducer):
                opened.close(timeout=1)
            else:
                opened.close()
        self.deadline.close()
        assert not self.expired, self.expired

    def _opened(self, it: Any) -> Any:
        self._open.append(it)
        return it


def fill(deployment: Deployment, records: int, first: int = 0, partitions: int = 2) -> None:
    """Twenty series that swing, from number ``first`` on."""
    producer = deployment.producer()
    now = int(time.time())
    futures = [
        producer.send(
            deployment.input,
            json.dumps({"ts": now + i, "value": math.sin(i / 50)}).encode(),
            key=b"s%d" % (i % 20),
            partition=i % 20 % partitions,
        )
        for i in range(first, first + records)
    ]
    producer.flush()
    for future in futures:
        future.get(30)


def chain_of(deployment: Deployment) -> Chain:
    """What the progress topic says."""
    return read_chain(deployment.progress().read(), deployment.name)


def coordinates(deployment: Deployment) -> list[tuple[int, int]]:
    """Partition and offset of every input record that a forecast was published for."""
    told = [json.loads(value)["source"] for value in deployment.committed(deployment.config.forecast_topic)]
    return [(source["partition"], source["offset"]) for source in told]


def outputs(progress: bytes, forecasts: Sequence[bytes] = (), dead_letters: Sequence[bytes] = ()) -> Outputs:
    """Forecasts keyed by themselves."""
    return Outputs(
        forecasts=[OutMessage(value, value, [], None) for value in forecasts],
        dead_letters=[
            OutMessage(None, value, [("streamlstm.error.reason", b"decode")], None) for value in dead_letters
        ],
        progress=progress,
    )
