"""Messages on their way: sent, and nothing believed but the result of each."""

import contextlib
from collections.abc import Sequence
from typing import Any

from kafka import errors as kafka_errors
from kafka.partitioner.default import murmur2

from streamlstm.errors import StartOver, StreamlstmError, Temporary
from streamlstm.transport.interfaces import OutMessage
from streamlstm.transport.kafka.clients import Producer
from streamlstm.transport.kafka.explain import explain

_REMEMBERED_KEYS = 200_000
_LONGEST_REMEMBERED = 256
"""Bytes of a key. A dead letter keeps the key it came with, which may be as long as a message."""


class Partitioner:
    """
    Every Kafka client's default: murmur2 of the key, modulo the number of partitions. Hashes are remembered.

    kafka-python computes the same in Python for every send, which costs a third of it; keys here repeat.

    >>> Partitioner().choose(b"foobar", 1000), Partitioner().choose(None, 1000)
    (166, None)
    """

    def __init__(self) -> None:
        self._hashes: dict[bytes, int] = {}

    def choose(self, key: bytes | None, partitions: int) -> int | None:
        """The partition for a key; without one, the client spreads."""
        if key is None:
            return None
        hashed = self._hashes.get(key)
        if hashed is None:
            hashed = murmur2(key) & 0x7FFFFFFF
            if len(key) <= _LONGEST_REMEMBERED:
                if len(self._hashes) >= _REMEMBERED_KEYS:
                    self._hashes.clear()
                self._hashes[key] = hashed
        return hashed % partitions


class Sending:
    """
    What one commit sends. After the last message :meth:`settle` says whether all of it has arrived.

    Raises :class:`kafka.errors.KafkaError` or what :func:`~streamlstm.transport.kafka.explain.explain` makes of it.
    """

    def __init__(self, producer: Producer, partitions: Partitioner, timeout_s: float) -> None:
        self._producer, self._partitions, self._timeout_s = producer, partitions, timeout_s
        self._sent: list[tuple[str, Any]] = []
        self._refused: kafka_errors.KafkaError | None = None

    def send(self, topic: str, messages: Sequence[OutMessage]) -> None:
        """Hand these to the client. After a refusal no more is sent, and :meth:`settle` raises it."""
        if not messages or self._refused is not None:
            return
        try:
            count = len(self._producer.partitions_for(topic))
            for message in messages:
                # kafka-python refuses a message with neither key nor value, which Kafka itself allows.
                value = b"" if message.key is None and message.value is None else message.value
                future = self._producer.send(
                    topic,
                    value,
                    key=message.key,
                    headers=message.headers,
                    partition=self._partitions.choose(message.key, count),
                    timestamp_ms=message.timestamp_ms,
                )
                self._sent.append((topic, future))
        except kafka_errors.KafkaError as error:
            self._refused = error

    def send_value(self, topic: str, value: bytes, partition: int) -> None:
        """A message that is nothing but a value, to a partition of ours."""
        if self._refused is not None:
            return
        try:
            self._sent.append((topic, self._producer.send(topic, value, partition=partition)))
        except kafka_errors.KafkaError as error:
            self._refused = error

    def settle(self) -> int | None:
        """Wait for every result, and raise the first that is an error; the last message's offset."""
        with contextlib.suppress(kafka_errors.KafkaError):
            # It may raise "Future not done" after a failed batch, or return after a lost one: the results decide.
            self._producer.flush(timeout=self._timeout_s)
        for topic, future in self._sent:
            try:
                future.get(timeout=self._timeout_s)
            except kafka_errors.KafkaError as error:
                raise explain(error, f"publishing to {topic}") from error
        # After the results, because an earlier one failed, most likely: that one's result has the reason.
        if self._refused is not None:
            raise self._refused
        return self._sent[-1][1].value.offset if self._sent else None


def to_start_over(told: StreamlstmError) -> StreamlstmError:
    """What is only temporary, and was not a fence, is mended by a new producer and another start-up."""
    return StartOver(str(told)) if type(told) is Temporary else told
