"""Loading records into a topic: fast, idempotent, and no record counted as loaded before the broker said so."""

from collections.abc import Iterable
from typing import Any

from kafka import errors as kafka_errors

from streamlstm.config.model import Source
from streamlstm.transport.kafka.clients import close_producer, open_producer
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.sending import Partitioner
from streamlstm.transport.kafka.settings import loader_settings
from streamlstm.transport.kafka.topics import Made, Plan, admin, describe, ensure, no_such_topic

WINDOW = 10_000
"""Results that may be waited for at once; the window before it is settled while this one fills."""

_TIMEOUT_S = 60.0


class Loader:
    """
    Appends records to one topic, in order by key.

    Raises :class:`~streamlstm.errors.ConfigError` when the topic does not exist, and what
    :func:`~streamlstm.transport.kafka.explain.explain` makes of the first record that was not accepted.
    """

    def __init__(self, source: Source, topic: str) -> None:
        self.topic = topic
        self.accepted = 0
        """Records the broker has."""
        with admin(source) as client:
            found = describe(client, [topic])[topic]
        if found is None:
            raise no_such_topic(source, topic)
        self._partitions = len(found.partitions)
        self._partitioner = Partitioner()
        self._producer = open_producer(loader_settings(source))
        self._filling: list[Any] = []
        self._settling: list[Any] = []

    def send(self, records: Iterable[tuple[bytes | None, bytes]]) -> None:
        """Send these keys and values. Waits, when the broker is slower than we are."""
        send, choose, topic, partitions = self._producer.send, self._partitioner.choose, self.topic, self._partitions
        try:
            for key, value in records:
                self._filling.append(send(topic, value, key=key, partition=choose(key, partitions)))
                if len(self._filling) >= WINDOW:
                    self._settle()
        except kafka_errors.KafkaError as error:
            raise explain(error, f"publishing to {topic}") from error

    def finish(self) -> None:
        """Wait until the broker has everything."""
        try:
            self._producer.flush(timeout=_TIMEOUT_S)
            self._settle()
            self._settle()
        except kafka_errors.KafkaError as error:
            raise explain(error, f"publishing to {self.topic}") from error

    def close(self) -> None:
        """Give everything back; what is unsent is not sent. Never raises."""
        close_producer(self._producer)

    def _settle(self) -> None:
        for future in self._settling:
            future.get(timeout=_TIMEOUT_S)
        self.accepted += len(self._settling)
        self._settling, self._filling = self._filling, []


def create_input_topic(source: Source, topic: str, partitions: int) -> Made:
    """Make a topic to load into, unless it is there."""
    with admin(source) as client:
        (made,) = ensure(client, [Plan(topic, "input", partitions, -1)])
    return made
