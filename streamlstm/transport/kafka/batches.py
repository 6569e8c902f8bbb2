"""
From what the broker sent to records: as kafka-python unpacks it, with bounds, with words, and many records at once.

It takes the place of the client's, because that one decompresses without limit, stops at the first batch that it
cannot unpack, at every start again, and does not say which partition a damaged batch is of.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from kafka import errors as kafka_errors
from kafka.consumer.fetcher import Fetcher
from kafka.protocol.consumer import IsolationLevel
from kafka.structs import TopicPartition

from streamlstm.errors import DataError
from streamlstm.records.batch import Unread
from streamlstm.transport.kafka.columns import Run, broker_ns, read
from streamlstm.transport.kafka.unpack import CannotUnpack, unpack
from streamlstm.transport.kafka.waiting import Records

_V2 = 2
"""The message format since Kafka 0.11: transactions need it, and brokers write no other."""

_MOST = 4096
"""Most records that are unpacked at once, and about how many bytes of batches: a large batch comes in parts."""
_MOST_BYTES = 1 << 20

Excluded = Callable[[TopicPartition, int, int], bool]
"""Whether all offsets from the first to the last given are to be passed over."""


_PartitionRecords: Any = Fetcher.PartitionRecords


def read_batches(consumer: Any, limit: int, excluded: Excluded) -> None:  # noqa: ANN401, because the client's types are untyped
    """
    Let a consumer hand over :class:`Records`, of batches that become no more than ``limit`` bytes each.

    What is ``excluded`` is neither checked nor unpacked, so that a damaged batch can be left out by name.
    """

    class Bounded(_Batches):
        pass

    Bounded.limit, Bounded.excluded = limit, staticmethod(excluded)
    consumer._fetcher.PartitionRecords = Bounded  # noqa: SLF001, because nothing public reaches it


class _Counted:
    """Records on their way through the client, which counts them, and moves what is in here as one."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Records]:
        yield self._records


class _Batches(_PartitionRecords):
    """
    What one fetch brought of one partition. The base class hands the records out and keeps the next offset.

    It unpacks no more than it is asked for, but that at once: some small batches together, a large one in parts.
    """

    limit: int
    excluded: Excluded
    _wanted = _MOST
    _last = False
    _room = _room_bytes = 0
    """How much may still join what is unpacked next."""

    def take(self, n: int | None = None) -> "_Counted | list[Records]":
        """
        The next records, about ``n`` at most; none when there are no more.

        An error is met again by the next fetch, which begins where the last good record ended.
        """
        self._wanted = min(_MOST, n or _MOST)
        try:
            taken = super().take(1)
        except Exception:
            self.drain()
            raise
        return _Counted(taken[0]) if taken else taken

    def _maybe_skip_record(self, _: Records) -> bool:
        return False

    def _unpack_records(self, tp: TopicPartition, records: Any, *_: object) -> Iterator[Records]:  # noqa: ANN401, because see above
        """A generator: nothing is unpacked before it is asked for."""
        self._behind, self._epoch = self.fetch_offset, self.leader_epoch
        begun = False
        for group in self._groups(self._runs(tp, records)):
            found, damage = read(group)
            self.records_read += len(found)
            if not begun and len(found) and found.offset[0] < self.fetch_offset:
                found = self._from_fetch_offset(found)
            if len(found):
                begun = True
                self.next_fetch_offset, self.leader_epoch = int(found.offset[-1]) + 1, found.leader_epoch
                if self._last and damage is None:
                    self._end()
                yield found
            if damage is not None:
                raise _damaged(tp, damage.batch, _in_a_line(damage.error)) from damage.error
        self._end()

    def _end(self) -> None:
        """Nothing is left but what is being handed out, and nobody need ask for more."""
        # Compaction may have taken a batch's last record; the position is behind the batch all the same.
        self.next_fetch_offset, self.leader_epoch = self._behind, self._epoch
        self.drain()

    def _from_fetch_offset(self, found: Records) -> Records:
        """Batches are sent whole, though reading begins in the middle of one."""
        before = (found.offset < self.fetch_offset).tolist()
        return found.part(before.index(False), len(found)) if False in before else found.part(0, 0)

    def _groups(self, runs: Iterator[Run]) -> Iterator[list[Run]]:
        """Runs that are read together. What is sound before an error is handed out before it."""
        group: list[Run] = []
        self._room, self._room_bytes = self._wanted, _MOST_BYTES
        try:
            for run in runs:
                if group and (run.instead or run.batch.leader_epoch != group[0].batch.leader_epoch):
                    yield group
                    group = []
                group.append(run)
                if run.instead or not run.whole or min(self._room, self._room_bytes) <= 0:
                    yield group
                    group = []
                    self._room, self._room_bytes = self._wanted, _MOST_BYTES
        except Exception:
            if group:
                yield group
            raise
        if group:
            self._last = True
            yield group

    def _runs(self, tp: TopicPartition, records: Any) -> Iterator[Run]:  # noqa: ANN401, because see above
        """What is to be read of each batch, in the order of the log."""
        while (batch := self._next(tp, records)) is not None:
            self.bytes_read += batch.size_in_bytes
            excluded = self.excluded(tp, batch.base_offset, batch.last_offset)
            if self.check_crcs and not excluded and not batch.validate_crc():
                raise _damaged(tp, batch, "its checksum is wrong")
            # First of all: what is excluded begins and ends transactions all the same.
            aborted = self._aborted(tp, batch, excluded=excluded)
            if not (aborted or batch.is_control_batch):
                why = "excluded" if excluded else self._unpack(batch)
                if why is None:
                    yield from self._parts(batch)
                else:
                    yield Run(batch, 1, whole=True, instead=self._instead(batch, why))
            self._behind, self._epoch = batch.next_offset, batch.leader_epoch

    def _parts(self, batch: Any) -> Iterator[Run]:  # noqa: ANN401, because see above
        """An unpacked batch, in as many runs as there must be. Every part but the last is read before the next one."""
        left = max(0, batch.records_count)
        while True:
            size = len(batch._buffer) - batch._pos  # noqa: SLF001, because nothing public reaches the bytes
            if left <= self._room and size <= self._room_bytes:
                break
            count = max(1, min(self._room, left * self._room_bytes // max(1, size)))
            if count >= left:
                break
            yield Run(batch, count, whole=False)
            left -= count
        self._room -= left
        self._room_bytes -= size
        yield Run(batch, left, whole=True)

    def _next(self, tp: TopicPartition, records: Any) -> Any:  # noqa: ANN401, because see above
        """The next batch, whole and of the format we read."""
        try:
            batch = records.next_batch()
        except (kafka_errors.CorruptRecordError, struct.error) as error:
            # To be left out a batch must have an end, and this one has none.
            raise DataError(
                f"{tp.topic}/{tp.partition}: what is at offset {self._behind} is no batch: "
                f"{_in_a_line(error)}; mend the log"
            ) from error
        if batch is None:
            return None
        if batch.magic < _V2:
            raise DataError(
                f"{tp.topic}/{tp.partition}: offset {batch.base_offset} has the message format from before Kafka "
                "0.11, which is not read: write the topic anew"
            )
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
            raise _damaged(tp, batch, _in_a_line(error)) from error

    def _unpack(self, batch: Any) -> str | None:  # noqa: ANN401, because see above
        """Unpack a batch, or say why it cannot be."""
        if batch.compression_type:
            packed = memoryview(batch._buffer)[batch._pos :].tobytes()  # noqa: SLF001, because see above
            try:
                unpacked = unpack(batch.compression_type, packed, self.limit)
            except CannotUnpack as why:
                return str(why)
            batch._buffer, batch._pos, batch._decompressed = unpacked, 0, True  # noqa: SLF001, because see above
        return None

    def _instead(self, batch: Any, why: str) -> Records:  # noqa: ANN401, because see above
        """One record for a batch; reading may have begun in the middle of it, and goes on behind it."""
        last = batch.last_offset
        first = min(max(batch.base_offset, self.fetch_offset), last)
        records = max(1, min(batch.records_count, last - first + 1))
        return Records(
            offset=np.array([last]),
            broker_ns=np.array([broker_ns(batch.max_timestamp)]),
            key=[None],
            value=[None],
            headers=None,
            payload=[0],
            leader_epoch=batch.leader_epoch,
            unread=Unread(first, last, records, why),
        )


def _damaged(tp: TopicPartition, batch: Any, what: str) -> DataError:  # noqa: ANN401, because see above
    first, last = batch.base_offset, batch.last_offset
    return DataError(
        f"{tp.topic}/{tp.partition}: the batch of offsets {first} to {last} is damaged: {what}; mend the log, or leave "
        f"them out: `streamlstm checkpoint revert ID --exclude {tp.topic}:{tp.partition}:{first}-{last + 1}`, where ID "
        "is a checkpoint that has not read them (`streamlstm checkpoint list` shows how far each has)"
    )


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
