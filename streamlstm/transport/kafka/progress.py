"""The progress log: one partition per shard of a topic that only transactions write."""

import logging

from kafka import errors as kafka_errors
from kafka.structs import TopicPartition

from streamlstm.config.model import Config
from streamlstm.errors import ProgressError, StreamlstmError
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import ProgressEntry
from streamlstm.transport.kafka.clients import Consumer, admin, close_consumer, open_consumer
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.settings import SHARD

_log = logging.getLogger(__name__)
_WAIT_MS = 100
_TRIM_TIMEOUT_MS = 5000


class KafkaProgressLog:
    """A :class:`~streamlstm.transport.interfaces.ProgressLog` on ``config.progress_topic``."""

    def __init__(self, config: Config, deadline: Deadline) -> None:
        self._config = config
        self._deadline = deadline
        self._tp = TopicPartition(config.progress_topic, SHARD)
        self._trim_refused = False

    def read(self, start: int = 0) -> list[ProgressEntry]:
        """
        See :class:`~streamlstm.transport.interfaces.ProgressLog`.

        All that was committed before the call is there: reading ends at the high watermark, not at the last stable
        offset, so a transaction that is being committed is waited for rather than overlooked. A new consumer each
        time, because an old one remembers an older end.
        """
        with self._deadline.guard("reading the progress log"):
            consumer = open_consumer(self._config, fetch_max_wait_ms=_WAIT_MS)
            try:
                return self._read(consumer, start)
            except kafka_errors.OffsetOutOfRangeError as error:
                raise ProgressError(
                    f"{self._tp.topic} was deleted from, or made anew, while it was read: start again"
                ) from error
            except kafka_errors.KafkaError as error:
                raise explain(error, "reading the progress log") from error
            finally:
                close_consumer(consumer)

    def trim(self, before: int) -> None:
        """
        See :class:`~streamlstm.transport.interfaces.ProgressLog`.

        A convenience, so it never raises: without the right to delete, that is told once.
        """
        try:
            with self._deadline.guard("trimming the progress log"), admin(self._config.source) as client:
                client.delete_records({self._tp: before}, timeout_ms=_TRIM_TIMEOUT_MS)
        except (kafka_errors.KafkaError, StreamlstmError) as error:
            level = logging.DEBUG if self._trim_refused else logging.WARNING
            _log.log(level, "%s: not trimmed below offset %d: %s", self._tp.topic, before, error)
            self._trim_refused = True

    def _read(self, consumer: Consumer, start: int) -> list[ProgressEntry]:
        tp, timeout_ms = self._tp, int(1000 * self._deadline.limit_s)
        consumer.assign([tp])

        def oldest() -> int:
            return consumer.beginning_offsets([tp], timeout_ms=timeout_ms)[tp]

        position = max(start, oldest())
        consumer.seek(tp, position)
        entries: list[ProgressEntry] = []
        end: int | None = None
        while end is None or position < end:
            try:
                polled = consumer.poll(timeout_ms=_WAIT_MS, max_records=1000)
            except kafka_errors.OffsetOutOfRangeError:
                front = oldest()
                if front < start:
                    return []  # The log ends before: it was made anew, or cut back.
                if front <= position:
                    raise
                # A service that runs beside us has trimmed what was to be read.
                entries, position, end = [], front, None
                consumer.seek(tp, position)
                continue
            for record in polled.get(tp, ()):
                if record.value is None:
                    raise ProgressError(f"{tp.topic}: the record at offset {record.offset} is empty: not one of ours")
                entries.append(ProgressEntry(record.offset, record.value))
            position = consumer.position(tp, timeout_ms=0)
            told = consumer.highwater(tp)
            # Less than where we are is of before the log was trimmed.
            if end is None and told is not None and told >= position:
                end = told
        return entries
