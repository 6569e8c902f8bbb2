"""
The checked commit.

kafka-python 3.0.12 can report a lost transaction as committed: ``begin → send → commit_transaction()`` returns
normally while every send has failed. So nothing is believed here but the result of each send. And its ``commit``,
``abort`` and ``init`` wait without limit for a broker that is gone, so each runs against the
:class:`~streamlstm.transport.deadline.Deadline`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from kafka import errors as kafka_errors
from kafka.partitioner.default import murmur2

from streamlstm.config.model import Config
from streamlstm.errors import StartOver, StreamlstmError, Temporary
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import OutMessage, Outputs
from streamlstm.transport.kafka.clients import Producer, close_producer, open_transactional_producer
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.settings import SHARD

_REMEMBERED_KEYS = 200_000
_LONGEST_REMEMBERED = 256
"""Bytes of a key. A dead letter keeps the key it came with, which may be as long as a message."""


class KafkaPublisher:
    """
    A :class:`~streamlstm.transport.interfaces.Publisher`, by transactions under the name ``<config.name>-<shard>``.

    Not for several threads. After any error it refuses to go on: the state of a transaction that failed is not known
    here, and mending it in place is how results are lost. Begin a new session, or better a new process.
    """

    def __init__(self, config: Config, deadline: Deadline) -> None:
        self._config = config
        self._deadline = deadline
        self._producer: Producer = None
        self._partitions = Partitioner()

    def begin_session(self) -> None:
        """
        See :class:`~streamlstm.transport.interfaces.Publisher`.

        When this returns, a transaction that somebody else had open under this name is aborted, one that was being
        committed is committed, and nobody else can commit any more.
        """
        self.close()
        with self._deadline.guard("taking over the transactional id"):
            producer = open_transactional_producer(self._config)
            try:
                producer.init_transactions()
            except kafka_errors.KafkaError as error:
                close_producer(producer)
                raise explain(error, "taking over the transactional id") from error
        self._producer = producer

    def commit(self, outputs: Outputs) -> int:
        """
        See :class:`~streamlstm.transport.interfaces.Publisher`. The order is the whole point:

        1. begin;
        2. send forecasts, dead letters, and last the progress record;
        3. flush, whose own result says nothing either way;
        4. take the result of *every* send: one that failed, or is not known, ends it here;
        5. only then commit.
        """
        if self._producer is None:
            raise Temporary("nothing can be published before a session has begun, or after one has failed")
        with self._deadline.guard("committing a transaction"):
            try:
                return self._commit(outputs)
            except Exception as error:
                self.close()
                if isinstance(error, kafka_errors.KafkaError | StreamlstmError):
                    raise _to_start_over(explain(error, "committing a transaction")) from error
                raise

    def close(self) -> None:
        """See :class:`~streamlstm.transport.interfaces.Publisher`. A transaction that is open is left to be aborted."""
        producer, self._producer = self._producer, None
        if producer is not None:
            close_producer(producer)

    def _commit(self, outputs: Outputs) -> int:
        producer, timeout_s = self._producer, self._deadline.limit_s
        producer.begin_transaction()
        sent: list[tuple[str, Any]] = []
        refused: kafka_errors.KafkaError | None = None
        try:
            sent.extend(self._send(self._config.forecast_topic, outputs.forecasts))
            sent.extend(self._send(self._config.dead_letter_topic, outputs.dead_letters))
            progress = self._config.progress_topic
            sent.append((progress, producer.send(progress, outputs.progress, partition=SHARD)))
        except kafka_errors.KafkaError as error:
            refused = error  # because an earlier one failed, most likely: that one's result has the reason
        with contextlib.suppress(kafka_errors.KafkaError):
            # It may raise "Future not done" after a failed batch, or return after a lost one: the results decide.
            producer.flush(timeout=timeout_s)
        for topic, future in sent:
            _believe(topic, future, timeout_s)
        if refused is not None:
            raise refused
        producer.commit_transaction()
        return sent[-1][1].value.offset

    def _send(self, topic: str, messages: Sequence[OutMessage]) -> Iterator[tuple[str, Any]]:
        if not messages:
            return
        producer = self._producer
        count = len(producer.partitions_for(topic))
        for message in messages:
            # kafka-python refuses a message with neither key nor value, which Kafka itself allows.
            value = b"" if message.key is None and message.value is None else message.value
            future = producer.send(
                topic,
                value,
                key=message.key,
                headers=message.headers,
                partition=self._partitions.choose(message.key, count),
                timestamp_ms=message.timestamp_ms,
            )
            yield topic, future


def _to_start_over(told: StreamlstmError) -> StreamlstmError:
    """What is only temporary, and was not a fence, is mended by a new producer and another start-up."""
    return StartOver(str(told)) if type(told) is Temporary else told


def _believe(topic: str, future: Any, timeout_s: float) -> None:  # noqa: ANN401, because the client is untyped
    """Take a result, or say what became of it."""
    try:
        future.get(timeout=timeout_s)
    except kafka_errors.KafkaError as error:
        raise explain(error, f"publishing to {topic}") from error


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
