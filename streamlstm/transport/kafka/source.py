"""
The source: every partition of the input topics, by positions that are ours, in turns.

The client is asked for what it has and no more: it fetches in the background and remembers nothing we rely on. What
it hands over waits here, by partition, because its own ``poll`` empties one partition before it looks at the next,
and a cut must not: see :mod:`streamlstm.transport.kafka.turns`.

Offsets are positions, not counts. Transaction markers, compaction and aborted transactions leave holes, so a range
begins where the last one of its partition ended, and ends where the client's position is.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
from kafka import errors as kafka_errors
from kafka.structs import TopicPartition

from streamlstm.config.model import Config
from streamlstm.errors import LogCutBack, LogGap, StreamlstmError, Temporary, TopicChanged
from streamlstm.records.batch import Cut, Messages, Range
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import LeaderEpochs, Position, TopicIds
from streamlstm.transport.kafka.batches import read_batches
from streamlstm.transport.kafka.clients import admin, close_consumer, news, open_consumer, seek_after
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.group import GroupOffsets
from streamlstm.transport.kafka.topics import Topic, describe, missing
from streamlstm.transport.kafka.turns import take_turns
from streamlstm.transport.kafka.waiting import Records, Waiting

BUFFER_BYTES = 64 << 20
"""What may wait in all buffers together, besides what the client holds (``fetch_max_bytes``, 16 MiB per broker)."""

CUT_BYTES = 1 << 20
"""
Keys and values in one cut, unless its only message is larger: a step's forecasts must fit a transaction's time, and
one message may hold as many numbers as it has room for.
"""

OFFSETS_TIMEOUT_S = 10.0

SILENCE_S = 5.0
"""How long nothing may come before the broker is asked whether it is there: the client itself never says."""

GONE_AFTER_S = 3.0
"""How long a topic must be missing from what the broker says before it counts as deleted: a young one may not know."""

_ASK_TIMEOUT_S = 2.0
_NONE = np.empty(0, np.int64)
_WAIT_S = 0.2


@dataclass(slots=True)
class _Partition:
    """
    What is known of one partition.

    ``cut_end`` is where the last cut ended, ``read_end`` the client's position, ``None`` before the first seek;
    ``records`` are those between them. ``epoch`` is the leader epoch of the last record before ``cut_end``, -1 when it
    is not known.
    """

    tp: TopicPartition
    records: Waiting = field(default_factory=Waiting)
    cut_end: int | None = None
    read_end: int | None = None
    epoch: int = -1
    paused: bool = False

    def forget(self, position: int, epoch: int) -> None:
        self.records.clear()
        self.cut_end = self.read_end = position
        self.epoch = epoch

    def take(self, count: int) -> list[Records]:
        taken = self.records.take(count)
        if taken:
            self.epoch = taken[-1].leader_epoch
        return taken


class KafkaSource:
    """
    A :class:`~streamlstm.transport.interfaces.LiveSource` over the topics of ``config.source``.

    Not for several threads. Its calls raise :class:`~streamlstm.errors.LogGap` when a needed offset is no longer
    retained, :class:`~streamlstm.errors.LogCutBack` when what was read is not what the log holds,
    :class:`~streamlstm.errors.DataError` for a damaged batch, :class:`~streamlstm.errors.NotAuthorised` when we may
    not read, :class:`~streamlstm.errors.TopicChanged` when an input was made anew, is gone or has other partitions,
    and :class:`~streamlstm.errors.Temporary` for what waiting or a restart mends, a broker that is away included.
    """

    def __init__(self, config: Config, deadline: Deadline) -> None:
        """Find the partitions. Raises :class:`~streamlstm.errors.ConfigError` for a topic that does not exist."""
        self._config = config
        self._deadline = deadline
        with deadline.guard("connecting to read the input"):
            topics = self._describe()
            self._consumer = open_consumer(config)
        self._passed_over: Sequence[Range] = ()
        read_batches(self._consumer, config.decode.max_batch_bytes, self._is_passed_over)
        self._partitions = [
            _Partition(TopicPartition(topic.name, partition)) for topic in topics for partition in topic.partitions
        ]
        self._by_name = {p.tp: p for p in self._partitions}
        self._first = 0
        self._ids = {topic.name: topic.id for topic in topics}
        self._heard_s = time.monotonic()
        self._told_ms = 0.0
        self._gone_since_s: float | None = None
        self._most = config.source.poll.max_records
        self._most_bytes = max(1 << 20, BUFFER_BYTES // max(1, len(self._partitions)))
        self._group = GroupOffsets(config)

    @property
    def partitions(self) -> list[tuple[str, int]]:
        """Topic and partition, in the order they take turns."""
        return [(p.tp.topic, p.tp.partition) for p in self._partitions]

    def topic_ids(self) -> TopicIds:
        """See :class:`~streamlstm.transport.interfaces.LiveSource`."""
        with self._deadline.guard("asking for the ids of the input topics"):
            return {topic.name: topic.id for topic in self._describe()}

    def resolve_start(self, start: str) -> list[Position]:
        """See :class:`~streamlstm.transport.interfaces.LiveSource`. After the last record is the end."""
        if start == "earliest":
            return self.beginning_offsets()
        end = self.end_offsets()
        if start == "latest":
            return end
        since_ms = int(datetime.fromisoformat(start.removeprefix("timestamp:")).timestamp() * 1000)
        found = self._offsets("offsets_for_times", {p.tp: since_ms for p in self._partitions})
        return [
            position if (at := found[TopicPartition(position.topic, position.partition)]) is None
            else position._replace(next_offset=at.offset)
            for position in end
        ]  # fmt: skip

    def beginning_offsets(self) -> list[Position]:
        """The oldest retained offset of every partition."""
        return self._positions("beginning_offsets")

    def end_offsets(self) -> list[Position]:
        """One past the last committed offset of every partition."""
        return self._positions("end_offsets")

    def seek(self, positions: Sequence[Position], leader_epochs: LeaderEpochs = MappingProxyType({})) -> None:
        """
        See :class:`~streamlstm.transport.interfaces.LiveSource`. Where a partition stands already it is left alone.

        Raises :class:`~streamlstm.errors.TopicChanged` unless the positions are those of all partitions there are.
        """
        wanted = {TopicPartition(p.topic, p.partition): p.next_offset for p in positions}
        if wanted.keys() != self._by_name.keys():
            new = ", ".join(_name(tp) for tp in self._by_name if tp not in wanted)
            gone = ", ".join(_name(tp) for tp in wanted if tp not in self._by_name)
            raise TopicChanged(
                "the partitions of the input are not those of the positions to go on from"
                + (f"; new: {new}" if new else "") + (f"; gone: {gone}" if gone else "")
            )  # fmt: skip
        for tp, offset in wanted.items():
            epoch = leader_epochs.get((tp.topic, tp.partition), -1)
            if self._by_name[tp].cut_end != offset or epoch >= 0:
                self._seek(self._by_name[tp], offset, epoch)

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:
        """See :class:`~streamlstm.transport.interfaces.Source`."""
        try:
            self._fill(0.0)
        except LogGap as error:
            # What came before the gap is handed over first. The client says it again.
            if not any(self._by_name[TopicPartition(topic, at)].records for topic, at, _, _ in error.gaps):
                raise
        if not any(p.records for p in self._partitions):
            self._fill(timeout_s)
        awaited = self._awaits_news()
        self._listen(idle=awaited or not any(p.records for p in self._partitions))
        if awaited:
            return None
        turns, self._first = take_turns(
            [len(p.records) for p in self._partitions],
            [p.records.payloads() for p in self._partitions],
            self._first,
            max_records,
            CUT_BYTES,
        )
        pieces: list[tuple[Range, list[Records]]] = []
        for turn in turns:
            partition = self._partitions[turn.partition]
            pieces.append(_cut(partition, partition.take(turn.messages)))
        # What holds no record is consumed with the next cut, or alone when there is nothing else.
        idle = [p for p in self._partitions if not p.records and p.cut_end != p.read_end]
        pieces.extend(_cut(p, []) for p in idle)
        return _messages(pieces) if pieces else None

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        """See :class:`~streamlstm.transport.interfaces.Source`. Reading cuts in their order costs no seek."""
        until_s = time.monotonic() + timeout_s
        pieces: list[tuple[Range, list[Records]]] = []
        for wanted in cut:
            partition = self._by_name.get(TopicPartition(wanted.topic, wanted.partition))
            if partition is None:
                raise TopicChanged(f"{wanted.topic}/{wanted.partition} was consumed before and is no more")
            if partition.cut_end != wanted.start:
                self._seek(partition, wanted.start)
            while (partition.read_end or 0) < wanted.end:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise self._missing(wanted, timeout_s)
                self._fill(min(_WAIT_S, left_s), needed=partition)
            pieces.append((wanted, partition.take(partition.records.before(wanted.end))))
            partition.cut_end = wanted.end
        return _messages(pieces)

    def lag(self) -> Mapping[tuple[str, int], int]:
        """See :class:`~streamlstm.transport.interfaces.LiveSource`. As of the last fetch of each partition."""
        lag: dict[tuple[str, int], int] = {}
        for p in self._sought():
            end = self._consumer.highwater(p.tp)
            position = p.cut_end if p.records else p.read_end
            if end is not None and position is not None:
                lag[p.tp.topic, p.tp.partition] = max(0, end - position)
        return lag

    def leader_epochs(self) -> LeaderEpochs:
        """See :class:`~streamlstm.transport.interfaces.LiveSource`."""
        return {(p.tp.topic, p.tp.partition): p.epoch for p in self._partitions if p.epoch >= 0}

    def commit_group_offsets(self, positions: Sequence[Position]) -> None:
        """See :class:`~streamlstm.transport.interfaces.LiveSource`. The group is ``config.name``."""
        self._group.offer(positions)

    def pass_over(self, ranges: Sequence[Range]) -> None:
        """See :class:`~streamlstm.transport.interfaces.LiveSource`."""
        self._passed_over = ranges

    def close(self) -> None:
        """See :class:`~streamlstm.transport.interfaces.Source`."""
        self._group.close()
        close_consumer(self._consumer)

    def _is_passed_over(self, tp: TopicPartition, first: int, last: int) -> bool:
        return any(
            (r.topic, r.partition) == (tp.topic, tp.partition) and r.start <= first and last < r.end
            for r in self._passed_over
        )

    def _describe(self) -> list[Topic]:
        names = self._config.source.topics
        with admin(self._config.source) as client:
            found = describe(client, names)
        topics = [topic for name in names if (topic := found[name]) is not None]
        if len(topics) < len(names):
            raise missing(self._config, (name for name in names if found[name] is None))
        return topics

    def _listen(self, *, idle: bool) -> None:
        """After a silence, ask the broker whether it is there. An empty log and a dead broker look alike otherwise."""
        now_s = time.monotonic()
        if idle:
            if now_s - self._heard_s < SILENCE_S:
                return
            self._offsets("end_offsets", [self._partitions[0].tp], _ASK_TIMEOUT_S)
        self._heard_s = time.monotonic()

    def _awaits_news(self) -> bool:
        """
        Whether the client has reason to ask what became of the topics, and has no answer yet.

        A topic that is made anew between two fetches would be read on as if nothing had happened, for fetching goes by
        name and offset. But the fetch it interrupts fails, and makes the client ask: until it knows, nothing it
        brought is handed over. Raises :class:`~streamlstm.errors.TopicChanged` for what it was told.
        """
        told = news(self._consumer, self._ids)
        if told.told_ms != self._told_ms or self._gone_since_s is not None:
            self._heed(told.ids, told.partitions)
            self._told_ms = told.told_ms
        return told.awaited

    def _heed(self, ids: Mapping[str, str], partitions: Mapping[str, Iterable[int]]) -> None:
        """What became of the topics: made anew, with more partitions, or gone."""
        self._refuse_anew(ids)
        new = [
            _name(TopicPartition(topic, partition))
            for topic in self._ids
            for partition in sorted(partitions[topic])
            if TopicPartition(topic, partition) not in self._by_name
        ]
        if new:
            raise TopicChanged(
                f"the input has partitions that were not there at the start; new: {', '.join(new)}; keys may live "
                "elsewhere from now on, so start anew with `run --fresh`"
            )
        gone = [topic for topic in self._ids if not partitions[topic]]
        if gone and self._gone_since_s is not None and time.monotonic() - self._gone_since_s >= GONE_AFTER_S:
            raise TopicChanged(f"{', '.join(gone)}: deleted while it was read")
        self._gone_since_s = (self._gone_since_s or time.monotonic()) if gone else None

    def _refuse_anew(self, ids: TopicIds) -> None:
        if anew := [topic for topic, ident in self._ids.items() if ids.get(topic, ident) != ident]:
            raise TopicChanged(
                f"{', '.join(anew)}: re-created while it was read (id {self._ids[anew[0]]}, now {ids[anew[0]]}): its "
                "offsets mean other records; start anew with `run --fresh`"
            )

    def _seek(self, partition: _Partition, offset: int, epoch: int = -1) -> None:
        """Assign it, too, if this is its first position: the client polls nothing while any partition has none."""
        if partition.read_end is None:
            self._consumer.assign([p.tp for p in self._sought()] + [partition.tp])
        seek_after(self._consumer, partition.tp, offset, epoch)
        partition.forget(offset, epoch)

    def _sought(self) -> list[_Partition]:
        return [p for p in self._partitions if p.read_end is not None]

    def _fill(self, timeout_s: float, needed: _Partition | None = None) -> None:
        """
        Take over what the client has fetched, waiting up to ``timeout_s`` for the first of it.

        A partition whose buffer is full is paused, so that the client keeps the rest and goes on with the others;
        ``needed`` never is.
        """
        sought = self._sought()
        for p in sought:
            self._pause(p, p is not needed and self._full(p))
        wait_ms = int(1000 * timeout_s)
        try:
            while not all(p.paused for p in sought):
                fetched = self._fetch(wait_ms)
                wait_ms = 0
                for tp, records in fetched.items():
                    partition = self._by_name[tp]
                    for some in records:
                        partition.records.add(some)
                    self._pause(partition, partition is not needed and self._full(partition))
                if not fetched or (needed is not None and self._full(needed)):
                    break
        finally:
            for p in sought:
                p.read_end = self._position(p)

    def _full(self, partition: _Partition) -> bool:
        return len(partition.records) >= self._most or partition.records.size >= self._most_bytes

    def _pause(self, partition: _Partition, pause: bool) -> None:  # noqa: FBT001, because it is the state to have
        if pause != partition.paused:
            (self._consumer.pause if pause else self._consumer.resume)(partition.tp)
            partition.paused = pause

    def _fetch(self, wait_ms: int) -> Mapping[TopicPartition, Sequence[Records]]:
        with self._deadline.guard("reading the input"):
            try:
                return self._consumer.poll(timeout_ms=wait_ms, max_records=self._most)
            except kafka_errors.KafkaError as error:
                raise self._explain(error) from error

    def _position(self, partition: _Partition) -> int | None:
        with self._deadline.guard("asking for a position"):
            try:
                return self._consumer.position(partition.tp, timeout_ms=0)
            except kafka_errors.KafkaError as error:
                raise self._explain(error) from error

    def _explain(self, error: kafka_errors.KafkaError) -> StreamlstmError:
        if isinstance(error, kafka_errors.OffsetOutOfRangeError):
            return self._out_of_range(error.args[0])
        divergent: Mapping[TopicPartition, Any] | None = getattr(error, "divergent_offsets", None)
        if divergent is not None:  # LogTruncationError
            try:
                # A shorter topic of the same name looks like one that was cut back.
                self._refuse_anew(self.topic_ids())
            except (TopicChanged, Temporary) as anew:
                return anew
            had = {tp: self._by_name[tp].cut_end or 0 for tp in divergent}
            return _cut_back(had, {tp: 0 if at is None else at.offset for tp, at in divergent.items()})
        return explain(error, "reading the input")

    def _out_of_range(self, wanted: Mapping[TopicPartition, int]) -> StreamlstmError:
        """A gap when the log begins later than what is needed; else it is another log, or less of it."""
        try:
            self._refuse_anew(self.topic_ids())
            earliest = self._offsets("beginning_offsets", list(wanted))
            latest = self._offsets("end_offsets", list(wanted))
        except (TopicChanged, Temporary) as error:
            return error
        beyond = {tp: latest[tp] for tp, offset in wanted.items() if offset > latest[tp]}
        if beyond:
            return _cut_back(wanted, beyond)
        return LogGap(
            "; ".join(
                f"{_name(tp)}: offset {offset} is needed, but the log holds {earliest[tp]} to {latest[tp]}: retention "
                f"deleted {earliest[tp] - offset} offsets"
                for tp, offset in wanted.items()
            )
            + "; set source.on_gap: skip to go on without them, or start anew with `run --fresh`",
            [(tp.topic, tp.partition, offset, earliest[tp]) for tp, offset in wanted.items() if offset < earliest[tp]],
        )

    def _missing(self, wanted: Range, timeout_s: float) -> StreamlstmError:
        tp = TopicPartition(wanted.topic, wanted.partition)
        end = self._offsets("end_offsets", [tp])[tp]
        if end < wanted.end:
            return self._out_of_range({tp: wanted.end})
        return Temporary(f"{_name(tp)}: offsets {wanted.start} to {wanted.end} did not arrive within {timeout_s:g} s")

    def _positions(self, which: str) -> list[Position]:
        found = self._offsets(which, [p.tp for p in self._partitions])
        return [Position(p.tp.topic, p.tp.partition, found[p.tp]) for p in self._partitions]

    def _offsets(self, which: str, what: object, timeout_s: float = OFFSETS_TIMEOUT_S) -> dict[TopicPartition, Any]:
        doing = f"asking for {which.replace('_', ' ')}"
        with self._deadline.guard(doing):
            try:
                return getattr(self._consumer, which)(what, timeout_ms=int(1000 * timeout_s))
            except kafka_errors.KafkaError as error:
                raise explain(error, doing) from error


def _cut_back(had: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> LogCutBack:
    told = "; ".join(
        f"{_name(tp)}: it was read up to offset {had[tp]}, but the log was cut back at "
        f"{f'offset {end}' if end else 'an unknown offset'} since (unclean leader election)"
        for tp, end in ends.items()
    )
    return LogCutBack(told, {(tp.topic, tp.partition): end for tp, end in ends.items()})


def _name(tp: TopicPartition) -> str:
    return f"{tp.topic}/{tp.partition}"


def _cut(partition: _Partition, taken: list[Records]) -> tuple[Range, list[Records]]:
    """The next range of a partition, up to its position if that is all there is, else up to the last record taken."""
    start = partition.cut_end
    end = int(taken[-1].offset[-1]) + 1 if partition.records else partition.read_end
    assert start is not None
    assert end is not None
    partition.cut_end = end
    return Range(partition.tp.topic, partition.tp.partition, start, end), taken


def _messages(pieces: Sequence[tuple[Range, list[Records]]]) -> Messages:
    taken = [records for _, some in pieces for records in some]
    counts = [sum(map(len, some)) for _, some in pieces]
    starts = accumulate(map(len, taken), initial=0)
    return Messages(
        cut=tuple(range_ for range_, _ in pieces),
        range_index=np.repeat(np.arange(len(pieces), dtype=np.int32), counts),
        offset=np.concatenate([_NONE, *(records.offset for records in taken)]),
        broker_ns=np.concatenate([_NONE, *(records.broker_ns for records in taken)]),
        key=[key for records in taken for key in records.key],
        value=[value for records in taken for value in records.value],
        headers=[headers for records in taken for headers in records.headers or [[]] * len(records)]
        if any(records.headers for records in taken)
        else None,
        unread={at: records.unread for at, records in zip(starts, taken, strict=False) if records.unread is not None},
    )
