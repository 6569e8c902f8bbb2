"""
From what the broker sent to records, batch by batch: kafka-python's own unpacking, with bounds and with words.

It takes the place of the client's, because that one decompresses without limit, stops at the first batch that it
cannot unpack, at every start again, and does not say which partition a damaged batch is of.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kafka import errors as kafka_errors
from kafka.consumer.fetcher import Fetcher
from kafka.protocol.consumer import IsolationLevel
from kafka.structs import TopicPartition

from streamlstm.errors import DataError
from streamlstm.records.batch import Unread
from streamlstm.transport.kafka.unpack import CannotUnpack, unpack

_V2 = 2
"""The message format since Kafka 0.11: transactions need it, and brokers write no other."""

Headers = list[tuple[str, bytes | None]]
Excluded = Callable[[TopicPartition, int, int], bool]
"""Whether all offsets from the first to the last given are to be passed over."""


_PartitionRecords: Any = Fetcher.PartitionRecords


class Record(NamedTuple):
    """
    One record as the broker keeps it; ``timestamp`` is in ms, -1 for none, ``leader_epoch`` that of its batch.

    With ``unread`` it stands for a whole batch, at its last offset.
    """

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    leader_epoch: int
    unread: Unread | None = None


def read_batches(consumer: Any, limit: int, excluded: Excluded) -> None:  # noqa: ANN401, because the client's types are untyped
    """
    Let a consumer hand over :class:`Record`, of batches that become no more than ``limit`` bytes each.

    What is ``excluded`` is neither checked nor unpacked, so that a damaged batch can be left out by name.
    """

    class Bounded(_Batches):
        pass

    Bounded.limit, Bounded.excluded = limit, staticmethod(excluded)
    consumer._fetcher.PartitionRecords = Bounded  # noqa: SLF001, because nothing public reaches it


class _Batches(_PartitionRecords):
    """
    What one fetch brought of one partition. The base class hands the records out and keeps the next offset.

    Only :meth:`_unpack_records` is ours. It is a generator: nothing is unpacked before it is asked for.
    """

    limit: int
    excluded: Excluded

    def _unpack_records(self, tp: TopicPartition, records: Any, *_: object) -> Iterator[Record]:  # noqa: ANN401, because see above
        last = None
        while (batch := self._next(tp, records)) is not None:
            last = batch
            self.bytes_read += batch.size_in_bytes
            self.leader_epoch = batch.leader_epoch
            excluded = self.excluded(tp, batch.base_offset, batch.last_offset)
            # First of all: what is excluded begins and ends transactions all the same.
            aborted = self._aborted(tp, batch, excluded=excluded)
            if not (aborted or batch.is_control_batch):
                if excluded:
                    yield self._instead(batch, "excluded")
                else:
                    yield from self._records(tp, batch)
            self.next_fetch_offset = batch.next_offset
        if last is not None:
            # Compaction may have taken a batch's last record; the position is behind the batch all the same.
            self.next_fetch_offset = last.next_offset
        self.drain()

    def _next(self, tp: TopicPartition, records: Any) -> Any:  # noqa: ANN401, because see above
        """The next batch, whole and of the format we read."""
        try:
            batch = records.next_batch()
        except (kafka_errors.CorruptRecordError, struct.error) as error:
            # To be left out a batch must have an end, and this one has none.
            raise DataError(
                f"{tp.topic}/{tp.partition}: what is at offset {self.next_fetch_offset} is no batch: "
                f"{_in_a_line(error)}; mend the log"
            ) from error
        if batch is None:
            return None
        if batch.magic < _V2:
            raise DataError(
                f"{tp.topic}/{tp.partition}: offset {batch.base_offset} has the message format from before Kafka "
                "0.11, which is not read: write the topic anew"
            )
        passed_over = self.excluded(tp, batch.base_offset, batch.last_offset)
        if self.check_crcs and not passed_over and not batch.validate_crc():
            raise _damaged(tp, batch.base_offset, batch.last_offset, "its checksum is wrong")
        return batch

    def _aborted(self, tp: TopicPartition, batch: Any, *, excluded: bool) -> bool:  # noqa: ANN401, because see above
        """Whether a batch belongs to a transaction that came to nothing. Keeps track of which are."""
        if self.isolation_level != IsolationLevel.READ_COMMITTED or not batch.has_producer_id():
            return False
        self._consume_aborted_transactions_up_to(batch.last_offset)
        if self._ends_aborted(tp, batch, excluded=excluded):
            self.aborted_producer_ids.discard(batch.producer_id)
            return False
        return self._is_batch_aborted(batch)

    def _ends_aborted(self, tp: TopicPartition, batch: Any, *, excluded: bool) -> bool:  # noqa: ANN401, because see above
        """Whether a batch is the marker that ends an aborted transaction."""
        if excluded:
            # Not to be looked into. A producer has one transaction at a time: if that came to nothing, this ends it.
            return batch.is_control_batch
        try:
            return self._contains_abort_marker(batch)
        except (kafka_errors.CorruptRecordError, struct.error, TypeError, StopIteration) as error:
            raise _damaged(tp, batch.base_offset, batch.last_offset, _in_a_line(error)) from error

    def _records(self, tp: TopicPartition, batch: Any) -> Iterator[Record]:  # noqa: ANN401, because see above
        if batch.compression_type:
            packed = memoryview(batch._buffer)[batch._pos :].tobytes()  # noqa: SLF001, because see above
            try:
                unpacked = unpack(batch.compression_type, packed, self.limit)
            except CannotUnpack as why:
                yield self._instead(batch, str(why))
                return
            batch._buffer, batch._pos, batch._decompressed = unpacked, 0, True  # noqa: SLF001, because see above
        try:
            for record in batch:
                self.records_read += 1
                self.next_fetch_offset = record.offset + 1
                yield Record(
                    record.offset, record.timestamp, record.key, record.value, record.headers, batch.leader_epoch
                )
        except kafka_errors.CorruptRecordError as error:
            raise _damaged(tp, batch.base_offset, batch.last_offset, _in_a_line(error)) from error

    def _instead(self, batch: Any, why: str) -> Record:  # noqa: ANN401, because see above
        """One record for a batch; reading may have begun in the middle of it, and goes on behind it."""
        last = batch.last_offset
        # Before it is handed out: whoever takes no more than this one asks for the position next.
        self.next_fetch_offset = batch.next_offset
        first = min(max(batch.base_offset, self.fetch_offset), last)
        records = max(1, min(batch.records_count, last - first + 1))
        unread = Unread(first, last, records, why)
        return Record(last, batch.max_timestamp, None, None, [], batch.leader_epoch, unread)


def _damaged(tp: TopicPartition, first: int, last: int, what: str) -> DataError:
    return DataError(
        f"{tp.topic}/{tp.partition}: the batch of offsets {first} to {last} is damaged: {what}; mend the log, or leave "
        f"them out: `streamlstm checkpoint revert ID --exclude {tp.topic}:{tp.partition}:{first}-{last + 1}`"
    )


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
