"""
A world in memory: an input log with partitions, a broker with transactions and fencing, a clock moved by hand, and a
tiny engine whose every output can be told in advance. :class:`Fate` ends the process at any call of any of them.
"""

import hashlib
import json
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal

import numpy as np
import torch

from streamlstm.config.keys import hash_values
from streamlstm.engine.report import Forecasts, Outcome, StepReport
from streamlstm.engine.state import EngineState
from streamlstm.errors import LogGap
from streamlstm.records.batch import Cut, Messages, Range, RecordBatch, Rejected, SeriesId
from streamlstm.recovery.background import BackgroundWriter
from streamlstm.recovery.branching import revert
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.journal import DIRECTORY
from streamlstm.recovery.journal import Journal as StepJournal
from streamlstm.recovery.making import Census, EngineMaker
from streamlstm.recovery.provenance import Settings
from streamlstm.recovery.resume import Ready, Terms, World, resume
from streamlstm.service.daemon import Daemon, Encode, Pace, Startup
from streamlstm.service.observer import Observers
from streamlstm.service.repeat import Repeater
from streamlstm.service.stopping import Stop
from streamlstm.transport.interfaces import Fenced, OutMessage, Outputs, Position, ProgressEntry


class Crash(BaseException):
    """The process is gone: nothing after this is executed by it."""


@dataclass
class Fate:
    """
    Counts the calls a process makes to the world and ends it at the ``at``-th (``None``: never).

    A dead process makes no further call: every later one ends the same way.
    """

    at: int | None = None
    calls: int = 0
    dead: bool = False

    def point(self, what: str = "") -> None:
        """A call to the world."""
        if self.dead:
            raise Crash
        self.calls += 1
        if self.at is not None and self.calls > self.at:
            self.dead = True
            raise Crash


@dataclass
class Clock:
    """Moved by hand, and by polls."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Broker:
    """
    Topics in memory. ``inputs[topic][partition]`` is a list of values; ``None`` there is an offset without a record.

    ``published`` is what a read_committed reader sees. The progress log has a gap after every transaction, as Kafka's
    markers make.
    """

    inputs: dict[str, list[list[bytes | None]]]
    topic_ids: dict[str, str] = field(default_factory=lambda: {"in": "id-1"})
    beginning: dict[tuple[str, int], int] = field(default_factory=dict)
    published: list[OutMessage] = field(default_factory=list)
    dead_letters: list[OutMessage] = field(default_factory=list)
    progress: list[ProgressEntry] = field(default_factory=list)
    next_progress: int = 0
    epoch: int = 0

    def first(self, topic: str, partition: int) -> int:
        """The oldest offset that retention has left."""
        return self.beginning.get((topic, partition), 0)

    def ends(self) -> dict[tuple[str, int], int]:
        return {(t, p): len(log) for t, logs in self.inputs.items() for p, log in enumerate(logs)}


class MemorySource:
    """Takes turns between partitions with a quantum; ``sizes`` is how many each poll may take, over and over."""

    def __init__(
        self,
        broker: Broker,
        fate: Fate,
        clock: Clock,
        sizes: Sequence[int] = (7,),
        at_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.broker, self.fate, self.clock, self.sizes, self.at_end = broker, fate, clock, sizes, at_end
        self.at: dict[tuple[str, int], int] = {}
        self.polls = 0
        self.group: list[Sequence[Position]] = []

    def seek(self, positions: Sequence[Position], leader_epochs: object = None) -> None:
        self.fate.point()
        self.at = {(p.topic, p.partition): p.next_offset for p in positions}

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:
        self.fate.point()
        self.clock.advance(0.01)
        gone = [
            (*place, at, first) for place, at in sorted(self.at.items()) if at < (first := self.broker.first(*place))
        ]
        if gone:
            raise LogGap("retention deleted what is needed", gone)
        left = min(max_records, self.sizes[self.polls % len(self.sizes)])
        self.polls += 1
        ranges: list[Range] = []
        places = sorted(self.at)
        for place in places[self.polls % len(places) :] + places[: self.polls % len(places)]:
            start = self.at[place]
            end = min(start + min(left, 3), self.broker.ends()[place])
            if end > start:
                ranges.append(Range(*place, start, end))
                self.at[place] = end
                left -= end - start
        if not ranges:
            self.clock.advance(timeout_s)
            self.at_end()
            return None
        return self._messages(tuple(ranges))

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        self.fate.point()
        assert self.at, "a client without any position cannot read"
        for r in cut:
            if r.start < (first := self.broker.first(r.topic, r.partition)):
                raise LogGap(f"{r.topic}-{r.partition}: {r.start} is gone", [(r.topic, r.partition, r.start, first)])
        return self._messages(cut)

    def _messages(self, cut: Cut) -> Messages:
        index, offset, value = [], [], []
        for i, r in enumerate(cut):
            for at in range(r.start, r.end):
                held = self.broker.inputs[r.topic][r.partition][at]
                if held is not None:
                    index.append(i)
                    offset.append(at)
                    value.append(held)
        return Messages(
            cut=cut,
            range_index=np.array(index, np.int32),
            offset=np.array(offset, np.int64),
            broker_ns=np.full(len(value), -1, np.int64),
            key=[None] * len(value),
            value=value,
        )

    def leader_epochs(self) -> dict[tuple[str, int], int]:
        return {}

    def pass_over(self, ranges: Sequence[Range]) -> None: ...

    def topic_ids(self) -> dict[str, str]:
        self.fate.point()
        return dict(self.broker.topic_ids)

    def resolve_start(self, start: str) -> list[Position]:
        self.fate.point()
        if start == "latest":
            return [Position(t, p, end) for (t, p), end in sorted(self.broker.ends().items())]
        return [Position(t, p, self.broker.first(t, p)) for (t, p) in sorted(self.broker.ends())]

    def lag(self) -> dict[tuple[str, int], int]:
        ends = self.broker.ends()
        return {place: ends[place] - at for place, at in self.at.items()}

    def commit_group_offsets(self, positions: Sequence[Position]) -> None:
        self.group.append(positions)

    def close(self) -> None: ...


class MemoryPublisher:
    """All or nothing, and only by the newest session. Before and after each commit the process may end."""

    def __init__(self, broker: Broker, fate: Fate) -> None:
        self.broker, self.fate = broker, fate
        self.epoch = -1

    def begin_session(self) -> None:
        self.fate.point()
        self.broker.epoch += 1
        self.epoch = self.broker.epoch

    def commit(self, outputs: Outputs) -> int:
        self.fate.point()
        if self.epoch != self.broker.epoch:
            raise Fenced("error 90")
        offset = self.broker.next_progress
        self.broker.next_progress += 2
        self.broker.progress.append(ProgressEntry(offset, outputs.progress))
        self.broker.published += outputs.forecasts
        self.broker.dead_letters += outputs.dead_letters
        self.fate.point()
        return offset

    def close(self) -> None: ...


class MemoryIdempotentPublisher:
    """
    One message after the other, in whatever order, once the progress record is in the journal. The process may end
    before and after each.
    """

    def __init__(self, broker: Broker, fate: Fate, journal: StepJournal) -> None:
        self.broker, self.fate, self.journal = broker, fate, journal
        self.dice = random.Random(len(broker.published))

    def begin_session(self) -> None:
        self.fate.point()
        self.journal.open()

    def commit(self, outputs: Outputs) -> int:
        offset = self.journal.append(outputs.progress)
        self.publish(outputs.forecasts, outputs.dead_letters)
        return offset

    def publish(self, forecasts: Sequence[OutMessage], dead_letters: Sequence[OutMessage]) -> None:
        ways = [(self.broker.published, m) for m in forecasts] + [(self.broker.dead_letters, m) for m in dead_letters]
        for topic, message in self.dice.sample(ways, len(ways)):
            self.fate.point()
            topic.append(message)
        self.fate.point()

    def close(self) -> None:
        self.journal.close()


class MemoryProgress:
    """The progress log."""

    def __init__(self, broker: Broker, fate: Fate) -> None:
        self.broker, self.fate = broker, fate

    def read(self, start: int = 0) -> list[ProgressEntry]:
        self.fate.point()
        return [entry for entry in self.broker.progress if entry.offset >= start]

    def trim(self, before: int) -> None:
        self.fate.point()
        self.broker.progress = [entry for entry in self.broker.progress if entry.offset >= before]
        self.fate.point()


class FatedDisk(Disk):
    """
    A disk on which the process may end before and after every operation, or every ``error``-numbered one fails.

    Nothing is really synced: what survives a power cut is another test's question, and this is faster.
    """

    def __init__(self, fate: Fate) -> None:
        self.fate = fate

    def make_directory(self, path: Path) -> None:
        self.fate.point()
        super().make_directory(path)

    def create(self, path: Path) -> BinaryIO:
        self.fate.point()
        return super().create(path)

    def reopen(self, path: Path) -> BinaryIO:
        self.fate.point()
        return super().reopen(path)

    def truncate(self, file: BinaryIO, size: int) -> None:
        self.fate.point()
        super().truncate(file, size)

    def extend(self, path: Path, length: int) -> BinaryIO:
        self.fate.point()
        return super().extend(path, length)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self.fate.point()
        half = len(data) // 2
        super().write(file, data[:half])
        self.fate.point()
        super().write(file, data[half:])

    def sync(self, file: BinaryIO) -> None:
        self.fate.point()

    def sync_data(self, file: BinaryIO) -> None:
        self.fate.point()

    def sync_directory(self, path: Path) -> None:
        self.fate.point()

    def link(self, old: Path, new: Path) -> None:
        self.fate.point()
        super().link(old, new)
        self.fate.point()

    def rename(self, old: Path, new: Path) -> None:
        self.fate.point()
        super().rename(old, new)
        self.fate.point()

    def remove_tree(self, path: Path) -> None:
        self.fate.point()
        super().remove_tree(path)


def message(key: str, value: float) -> bytes:
    return json.dumps({"key": key, "value": value}).encode()


def decode(messages: Messages) -> RecordBatch:
    """``{"key", "value"}`` per message; anything else is rejected."""
    series: dict[SeriesId, int] = {}
    code, index, offset, target = [], [], [], []
    rejected: list[Rejected] = []
    for i, at, value in zip(messages.range_index.tolist(), messages.offset.tolist(), messages.value, strict=True):
        r = messages.cut[i]
        try:
            told = json.loads(value or b"")
            ident = SeriesId(r.topic, r.partition, told["key"])
        except (ValueError, KeyError):
            rejected.append(Rejected(r.topic, r.partition, at, 0, "decode", "$", "not JSON"))
            continue
        code.append(series.setdefault(ident, len(series)))
        index.append(i)
        offset.append(at)
        target.append(told["value"])
    n = len(code)
    return RecordBatch(
        cut=messages.cut,
        series=tuple(series),
        code=np.array(code, np.int32),
        range_index=np.array(index, np.int32),
        offset=np.array(offset, np.int64),
        row=np.zeros(n, np.int32),
        time_ns=np.array(offset, np.int64),
        broker_ns=np.full(n, -1, np.int64),
        target=np.array(target, np.float64),
        rejected=tuple(rejected),
    )


def decode_in_time(messages: Messages) -> RecordBatch:
    """The same, ten seconds apart by offset."""
    batch = decode(messages)
    return replace(batch, time_ns=batch.offset * np.int64(10_000_000_000))


class TinyEngine:
    """
    Forecasts a series' running mean times a shared weight, which every fifth record moves.

    Small enough to be obvious, and with all that a state can have: scalars, vectors, weights, moments and meta.
    ``gain`` is a learning key: with another one it learns otherwise.
    """

    def __init__(self, gain: float = 0.5) -> None:
        self.gain = gain
        self.step_number = 0
        self.records = 0
        self.weight = torch.tensor([1.0], dtype=torch.float64)
        self.moment = torch.zeros(2)
        self.slots: dict[SeriesId, int] = {}
        self.count = torch.zeros(0, dtype=torch.int64)
        self.recent = torch.zeros(0, 3)

    def step(self, batch: RecordBatch) -> StepReport:
        yhat: list[float] = []
        clock: list[int] = []
        for i in range(len(batch)):
            ident, y = batch.series[batch.code[i]], float(batch.target[i])
            slot = self._slot(ident)
            self.count[slot] += 1
            self.recent[slot] = torch.cat([self.recent[slot, 1:], torch.tensor([y])])
            clock.append(int(self.count[slot]))
            yhat.append(float(self.recent[slot].mean()) * float(self.weight))
            self.records += 1
            if self.records % 5 == 0:
                self.weight = self.weight + self.gain * 0.01 * y
                self.moment = self.moment * 0.9 + y
        self.step_number += batch.steps
        m = len(yhat)
        return StepReport(
            step=self.step_number,
            batch=batch,
            outcome_N=np.full(len(batch), Outcome.FORECAST, np.uint8),
            rejected=batch.rejected,
            forecasts=Forecasts(
                record_M=np.arange(m, dtype=np.int32),
                clock_M=np.array(clock, np.int64),
                age_M=np.array(clock, np.int64),
                interval_ns_M=np.zeros(m, np.int64),
                update_M=np.zeros(m, np.int64),
                warming_M=np.zeros(m, np.bool_),
                yhat_MK=np.array(yhat, np.float64).reshape(m, 1),
                settled_error_MXK=np.full((m, 3, 1), np.nan),
                settled_offset_MK=np.full((m, 1), -1, np.int64),
            ),
            updates=(),
            resets=MappingProxyType({}),
            series_total=len(self.slots),
            series_warming=0,
        )

    def _slot(self, ident: SeriesId) -> int:
        if ident not in self.slots:
            self.slots[ident] = len(self.slots)
            self.count = torch.cat([self.count, torch.zeros(1, dtype=torch.int64)])
            self.recent = torch.cat([self.recent, torch.zeros(1, 3)])
        return self.slots[ident]

    def census(self) -> Census:
        return Census(self.records // 5, len(self.slots), 0, 0)

    def state(self) -> EngineState:
        return EngineState(
            step=self.step_number,
            series=tuple(self.slots),
            columns={"count": [self.count.clone()], "recent": [self.recent.clone()]},
            weights={"weight": self.weight.clone()},
            training={"moment": self.moment.clone()},
            meta={"records": self.records},
        )

    @classmethod
    def restore(cls, state: EngineState, gain: float = 0.5) -> "TinyEngine":
        engine = cls(gain)
        engine.step_number = state.step
        engine.records = state.meta["records"]
        engine.weight = state.weights["weight"].clone()
        engine.moment = state.training["moment"].clone()
        engine.slots = {ident: i for i, ident in enumerate(state.series)}
        engine.count = state.column("count").clone()
        engine.recent = state.column("recent").clone()
        return engine


class TinyEncoder:
    """One line per forecast: its coordinates and its number."""

    def encode_forecasts(self, report: StepReport) -> list[OutMessage]:
        batch, out = report.batch, report.forecasts
        messages = []
        for i, yhat in zip(out.record_M.tolist(), out.yhat_MK[:, 0].tolist(), strict=True):
            r = batch.cut[batch.range_index[i]]
            value = f"{r.topic}-{r.partition}@{int(batch.offset[i])}={yhat!r}"
            messages.append(OutMessage(None, value.encode(), [], None))
        return messages

    def encode_dead_letters(self, report: StepReport, messages: Messages) -> list[OutMessage]:
        return [OutMessage(None, f"{r.partition}@{r.offset}".encode(), [], None) for r in report.rejected]


class Journal:
    """A log and a witness that remember what they were told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []

    def info(self, event: str, **facts: object) -> None:
        self.lines.append(("info", event, facts))

    def warning(self, event: str, **facts: object) -> None:
        self.lines.append(("warning", event, facts))

    def error(self, event: str, **facts: object) -> None:
        self.lines.append(("error", event, facts))

    def events(self, level: str) -> list[str]:
        return [event for at, event, _ in self.lines if at == level]


class Watching(Observers):
    """An observer that keeps what it is told, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[str] = []
        self.checkpoints: list[object] = []
        self.commits: list[object] = []
        self.failed_commits: list[str] = []
        self.resumed: list[object] = []
        self.gaps: list[Range] = []
        self.turns = 0

    def observe_phase(self, phase: str) -> None:
        self.phases.append(phase)

    def observe_turn(self, monotonic_s: float) -> None:
        self.turns += 1

    def observe_commit(self, committed: object) -> None:
        self.commits.append(committed)

    def observe_commit_failed(self, error: str) -> None:
        self.failed_commits.append(error)

    def observe_checkpoint(self, checkpointed: object) -> None:
        self.checkpoints.append(checkpointed)

    def observe_resume(self, resumed: object) -> None:
        self.resumed.append(resumed)

    def observe_gap(self, ranges: Sequence[Range]) -> None:
        self.gaps += ranges


PACE = Pace(
    max_records=100,
    poll_timeout_s=0.05,
    commit_every_s=0.025,
    checkpoint_every_s=1e9,
    checkpoint_every_records=25,
    trim=True,
    trouble_limit_s=5.0,
    shutdown_timeout_s=10.0,
    fail_on_rejected=False,
)


def make_settings(identity: dict[str, object], learning: dict[str, object]) -> Settings:
    return Settings("n", hash_values({**identity, **learning}), identity, learning)


SETTINGS = make_settings({"name": "n", "source.start": "earliest"}, {"gain": 0.5})


class Process:
    """
    One life of the service over a broker and a state directory, in memory and without threads.

    :meth:`run` goes on until the input is consumed, or to its :class:`Fate`.
    """

    def __init__(
        self,
        broker: Broker,
        directory: Path | CheckpointStore,
        fate: Fate | None = None,
        *,
        settings: Settings = SETTINGS,
        pace: Pace = PACE,
        cpu: str = "any",
        on_mismatch: Literal["rebase", "fail"] = "rebase",
        sizes: Sequence[int] = (7,),
        keep: int = 3,
        disk: Disk | None = None,
        start: str = "earliest",
        delivery: Literal["exactly_once", "idempotent"] = "exactly_once",
        on_gap: Literal["fail", "skip"] = "fail",
        fresh: bool = False,
        rebuild: bool = False,
    ) -> None:
        self.fate = fate or Fate()
        self.clock, self.stop, self.journal, self.watching = Clock(), Stop(), Journal(), Watching()
        self.source = MemorySource(broker, self.fate, self.clock, sizes, at_end=self.stop.request)
        disk = disk or FatedDisk(self.fate)
        progress, repeat = MemoryProgress(broker, self.fate), None
        if delivery == "exactly_once":
            self.publisher = MemoryPublisher(broker, self.fate)
        else:
            progress = StepJournal(directory / DIRECTORY, disk, segment_bytes=2000)
            self.publisher = MemoryIdempotentPublisher(broker, self.fate, progress)
            repeat = Repeater(self.publisher, lambda *_: TinyEncoder())
        self.store = open_store(directory, disk) if isinstance(directory, Path) else directory
        self.world = World(
            store=self.store,
            source=self.source,
            publisher=self.publisher,
            progress=progress,
            decode=decode,
            maker=EngineMaker(
                lambda learning: TinyEngine(learning["gain"]),
                lambda state, _, learning: TinyEngine.restore(state, learning["gain"]),
            ),
            monotonic_s=self.clock,
            wall_s=self.clock,
            new_id=lambda: uuid.uuid4().hex,
            repeat=repeat,
        )
        self.terms = Terms(settings, start, fingerprint(cpu), on_mismatch, 1.0, on_gap, fresh, rebuild)
        self.pace, self.keep = pace, keep
        self.ready: Ready | None = None
        self.daemon: Daemon | None = None

    def begin(self) -> Ready:
        """Start up, and no more."""
        startup = Startup(self.watching, self.journal, self.stop, self.clock, self.terms.fingerprint)
        self.ready = resume(self.world, self.terms, startup)
        startup.ready(self.ready)
        self.daemon = Daemon(
            self.world,
            self.terms,
            self.ready,
            self.pace,
            self.encoder_for(self.ready),
            self.watching,
            self.journal,
            self.stop,
            self.writer(),
        )
        return self.ready

    def encoder_for(self, ready: Ready) -> Encode:
        """What this session publishes with."""
        return TinyEncoder()

    def writer(self) -> BackgroundWriter:
        """Writes at once, in the loop's own thread."""
        return BackgroundWriter(self.store, Keep(self.keep), start=lambda work: work())

    def run(self) -> TinyEngine:
        """A whole life. What the operating system does when a process ends is done here too: the lock is let go."""
        try:
            engine = self.begin().engine
            assert self.daemon is not None
            self.daemon.run()
            return engine
        finally:
            self.publisher.close()
            self.store.close()


def fingerprint(cpu: str = "any") -> dict[str, str]:
    return {"cpu": cpu}


def digest_directory(path: Path) -> str:
    """Of every file's name and bytes."""
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            sha.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return sha.hexdigest()


def revert_without(broker: Broker, state: Path, length: int) -> Range:
    """Have the chain go back to the second checkpoint, without so many offsets that follow it: which ones."""
    back = Process(broker, state)
    step = back.store.steps()[1]
    at = back.store.verify(step).provenance.positions[0].next_offset
    poison = Range("in", 0, at + 1, at + 1 + length)
    revert(back.store, back.publisher, back.world.progress, "n", step, [poison], back.world.new_id)
    back.store.close()
    return poison
