"""
History through the same loop: decode → ``engine.step`` → score, and nothing published.

Feeds give cuts: a file's are one partition, a topic's merge the heads of its partitions, and recorded cuts are taken as
they were. Only recorded cuts are promised to equal the live run.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from heapq import merge
from itertools import groupby, islice
from typing import NamedTuple, Protocol

import numpy as np

from streamlstm.config.keys import changed
from streamlstm.engine.report import Outcome, StepReport
from streamlstm.engine.state import EngineState
from streamlstm.errors import ConfigError
from streamlstm.records.batch import Cut, Headers, Messages, Range, RecordBatch, Rejected, Unread
from streamlstm.recovery.exclusions import drop_excluded
from streamlstm.recovery.making import EngineMaker, Steppable
from streamlstm.recovery.progress import Value
from streamlstm.service.scores import StreamScores
from streamlstm.transport.forecasts import SeriesNumbers
from streamlstm.transport.interfaces import Frozen, Position

_FETCH = 2000


class Computes(Protocol):
    """The engine, as far as a replay needs it."""

    def step(self, batch: RecordBatch) -> StepReport:
        """Take in one cut."""
        ...


class Made(NamedTuple):
    """Under what a step was computed when it was live: of what a forecast says of itself, all but the numbers."""

    config_hash: str
    version: str
    revision: int


class Fed(NamedTuple):
    """
    One cut to replay; where it was recorded, the digest (hex) of its outputs when it was live, who made them, and under
    which values of the learning keys.
    """

    messages: Messages
    digest: str | None = None
    made: Made | None = None
    learning: Mapping[str, Value] | None = None


class Recorded(NamedTuple):
    """One recorded step. ``digest`` is ``None`` where it says nothing any more."""

    cut: Cut
    digest: str | None
    made: Made | None = None
    learning: Mapping[str, Value] | None = None


class ReadsCuts(Protocol):
    """A source that can read what it is told to."""

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        """Exactly the messages of a cut."""
        ...


@dataclass(slots=True)
class Summary:
    """What a replay came to. ``differing`` counts steps whose digest was recorded and is another now."""

    messages: int = 0
    steps: int = 0
    records: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    rejected: Counter[str] = field(default_factory=Counter[str])
    first_rejected: Rejected | None = None
    updates: int = 0
    skipped_updates: int = 0
    compared: int = 0
    differing: int = 0

    def add(self, report: StepReport, messages: int, recorded: str | None) -> None:
        """One step more."""
        self.messages += messages
        self.steps += 1
        for outcome, count in report.counts().items():
            self.records[outcome] += count
        for rejected in report.rejected:
            self.rejected[rejected.reason] += rejected.records
        if self.first_rejected is None and report.rejected:
            self.first_rejected = report.rejected[0]
        skipped = sum(u.skipped for u in report.updates)
        self.skipped_updates += skipped
        self.updates += len(report.updates) - skipped
        if recorded is not None:
            self.compared += 1
            self.differing += report.digest().hex() != recorded

    def freeze(self) -> Frozen:
        """All of it as a value."""
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        values["records"] = [[outcome.name, n] for outcome, n in self.records.items()]
        values["rejected"] = [list(item) for item in self.rejected.items()]  # in order: it decides between equals
        return Frozen(values)

    @classmethod
    def thaw(cls, frozen: Frozen) -> "Summary":
        """What :meth:`freeze` gave, to be added to."""
        values = dict(frozen.values)
        values["records"] = {Outcome[name]: n for name, n in values["records"]}
        values["rejected"] = Counter[str](dict(values["rejected"]))
        first = values["first_rejected"]
        values["first_rejected"] = Rejected(*first) if first else None
        return cls(**values)


class Learner:
    """
    An engine that is remade where recorded steps were computed under other values of the learning keys.

    Files and topics were recorded by nobody: all of them is computed under the ``learning`` it begins with.
    """

    def __init__(self, maker: EngineMaker, engine: Steppable, learning: Mapping[str, Value]) -> None:
        self._maker, self._engine, self.learning = maker, engine, learning

    @property
    def step_number(self) -> int:
        """Of the newest step."""
        return self._engine.step_number

    def step(self, batch: RecordBatch) -> StepReport:
        """Take in one cut."""
        return self._engine.step(batch)

    def state(self) -> EngineState:
        """A snapshot, immutable; made under :attr:`learning`."""
        return self._engine.state()

    def heed(self, cuts: Iterable[Fed]) -> Generator[Fed, None, None]:
        """
        The same cuts; before each the engine is as it is to be computed.

        Raises :class:`~streamlstm.errors.ConfigError` where the state cannot be taken over.
        """
        for fed in cuts:
            if fed.learning is not None and changed(self.learning, fed.learning):
                try:
                    self._engine = self._maker.restore(self._engine.state(), self.learning, fed.learning)
                except ValueError as error:
                    keys = ", ".join(changed(self.learning, fed.learning))
                    raise ConfigError(f"the state cannot take over {keys}: {error}") from error
                self.learning = fed.learning
            yield fed


class Tally:
    """
    What a replay comes to, step by step: counts, scores, and the numbers that its series have.

    :param frozen: what :meth:`freeze` gave, to go on from there.
    """

    def __init__(self, horizons: int, score_from: int = 0, standardise: int = 0, frozen: Frozen | None = None) -> None:
        parts = unpack(frozen) if frozen else {}
        self.summary = Summary.thaw(parts["summary"]) if parts else Summary()
        self.scores = StreamScores(horizons, score_from=score_from, standardise=standardise)
        self.numbers = SeriesNumbers(parts["series"].values if parts else ())
        if parts:
            self.scores.thaw(parts["scores"])

    def add(self, report: StepReport, messages: int, recorded: str | None) -> None:
        """One step more."""
        batch, out = report.batch, report.forecasts
        series_M = self.numbers.number(batch)[batch.code[out.record_M]] if len(out) else np.empty(0, np.int64)
        self.scores.add(series_M, batch.target[out.record_M], out.settled_error_MXK, out.settled_offset_MK)
        self.summary.add(report, messages, recorded)

    def freeze(self) -> Frozen:
        """All of it as a value."""
        series = Frozen(self.numbers.series())
        return pack({"summary": self.summary.freeze(), "scores": self.scores.freeze(), "series": series})


def replay(
    feed: Iterable[Fed],
    decode: Callable[[Messages], RecordBatch],
    engine: Computes,
    tally: Tally,
    each: Callable[[StepReport, Fed], None],
) -> None:
    """Drive ``engine`` over ``feed``; ``each`` is told of every step once it was counted and scored."""
    for fed in feed:
        report = engine.step(decode(fed.messages))
        tally.add(report, len(fed.messages), fed.digest)
        each(report, fed)


def pack(parts: Mapping[str, Frozen]) -> Frozen:
    """
    Several parts as one.

    >>> unpack(pack({"a": Frozen(1), "b": Frozen(None, {"x": np.zeros(1)})}))
    {'a': Frozen(values=1, arrays={}), 'b': Frozen(values=None, arrays={'x': array([0.])})}
    """
    arrays = {f"{name}/{key}": array for name, part in parts.items() for key, array in part.arrays.items()}
    return Frozen({name: part.values for name, part in parts.items()}, arrays)


def unpack(frozen: Frozen) -> dict[str, Frozen]:
    """What :func:`pack` was given."""
    parts = {name: Frozen(values, {}) for name, values in frozen.values.items()}
    for key, array in frozen.arrays.items():
        name, _, rest = key.partition("/")
        parts[name] = Frozen(parts[name].values, {**parts[name].arrays, rest: array})
    return parts


def feed_source(
    poll: Callable[[int], Messages | None], max_messages: int, limit: int | None = None
) -> Generator[Fed, None, None]:
    """All that ``poll(count)`` gives until it gives nothing, or the first ``limit`` messages."""
    left = limit
    while left is None or left > 0:
        messages = poll(max_messages if left is None else min(max_messages, left))
        if messages is None:
            return
        if left is not None:
            left -= len(messages)
        yield Fed(messages)


def feed_recorded(
    steps: Iterable[Recorded], source: ReadsCuts, timeout_s: float, excluded: Sequence[Range] = ()
) -> Generator[Fed, None, None]:
    """The recorded cuts without the excluded ranges, each with its digest, if it still says something."""
    for step in steps:
        messages, _ = drop_excluded(source.read(step.cut, timeout_s), excluded)
        yield Fed(messages, step.digest, step.made, step.learning)


def feed_merged(
    source: ReadsCuts,
    starts: Sequence[Position],
    ends: Sequence[Position],
    timeout_s: float,
    max_messages: int,
    limit: int | None = None,
) -> Generator[Fed, None, None]:
    """
    The messages between ``starts`` and ``ends``, partitions merged by (broker timestamp, partition, offset).

    It is their heads that are compared, so the order inside a partition stays. Partitions count in the order of
    ``starts``. One partition is read at a time, when its head is wanted: memory does not grow with how far the
    timestamps of two partitions are apart.
    """
    end = {(p.topic, p.partition): p.next_offset for p in ends}
    streams = [
        _stream(source, index, start, end[start.topic, start.partition], timeout_s)
        for index, start in enumerate(starts)
    ]
    merged: Iterator[_Head] = merge(*streams, key=lambda head: head[:3])
    if limit is not None:
        merged = islice(merged, limit)
    position = {index: start.next_offset for index, start in enumerate(starts)}
    while heads := list(islice(merged, max_messages)):
        yield Fed(_as_messages(heads, starts, position))


class _Head(NamedTuple):
    """One message; its first three fields are the order of merging."""

    broker_ns: int
    place: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    unread: Unread | None


def _stream(source: ReadsCuts, index: int, start: Position, end: int, timeout_s: float) -> Generator[_Head, None, None]:
    """One partition's messages, read a piece at a time."""
    waiting: deque[_Head] = deque()
    at = start.next_offset
    while waiting or at < end:
        if not waiting:
            piece = Range(start.topic, start.partition, at, min(at + _FETCH, end))
            messages, at = source.read((piece,), timeout_s), piece.end
            waiting.extend(
                _Head(broker_ns, index, offset, key, value, headers, messages.unread.get(m))
                for m, (broker_ns, offset, key, value, headers) in enumerate(
                    zip(
                        messages.broker_ns.tolist(),
                        messages.offset.tolist(),
                        messages.key,
                        messages.value,
                        messages.headers or [[] for _ in messages.value],
                        strict=True,
                    )
                )
            )
            continue
        yield waiting.popleft()


def _as_messages(heads: Sequence[_Head], starts: Sequence[Position], position: dict[int, int]) -> Messages:
    """One cut: a range for each run of one partition, each beginning where the partition's last one ended."""
    cut: list[Range] = []
    range_index = np.empty(len(heads), np.int32)
    at = 0
    for index, run in groupby(heads, key=lambda head: head.place):
        count, last = 0, -1
        for head in run:
            count, last = count + 1, head.offset
        where = starts[index]
        range_index[at : at + count] = len(cut)
        cut.append(Range(where.topic, where.partition, position[index], last + 1))
        position[index], at = last + 1, at + count
    return Messages(
        cut=tuple(cut),
        range_index=range_index,
        offset=np.array([h.offset for h in heads], np.int64),
        broker_ns=np.array([h.broker_ns for h in heads], np.int64),
        key=[h.key for h in heads],
        value=[h.value for h in heads],
        headers=[h.headers for h in heads] if any(h.headers for h in heads) else None,
        unread={m: h.unread for m, h in enumerate(heads) if h.unread is not None},
    )
