"""One life of the service in the simulated world, and how it ended."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from fakes import SETTINGS, Crash, Encode, Process, TinyEncoder, TinyEngine, decode, decode_in_time
from streams import small_config

from simulator.bucket import Bucket
from simulator.disk import Kernel, SimulatedDisk
from simulator.log import (
    Input,
    Output,
    SimulatedIdempotentPublisher,
    SimulatedProgress,
    SimulatedPublisher,
    SimulatedSource,
)
from simulator.weather import Beside, Weather
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.report import StepReport
from streamlstm.errors import CheckpointError, StreamlstmError
from streamlstm.records.batch import Messages, Range, RecordBatch
from streamlstm.recovery.background import BackgroundWriter, Outcome
from streamlstm.recovery.branching import revert
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.journal import DIRECTORY as JOURNAL
from streamlstm.recovery.journal import Journal
from streamlstm.recovery.making import EngineMaker
from streamlstm.recovery.manifest import MANIFEST
from streamlstm.recovery.resume import Ready
from streamlstm.recovery.stored import SCRATCH, Room, TieredEngine
from streamlstm.service.daemon import Daemon, Pace, StoppedEarly
from streamlstm.service.encode import ForecastEncoder
from streamlstm.service.repeat import Repeater
from streamlstm.service.sessions import run_sessions
from streamlstm.service.stopping import Stop
from streamlstm.transport.interfaces import OutMessage, ProgressEntry

SECOND_NS = 10**9


Coordinates = tuple[str, int, int]
"""Topic, partition, offset: what names a forecast."""


@dataclass(frozen=True)
class Mind:
    """
    Which engine, how messages reach it, how its forecasts leave it under a revision, and how a reader tells theirs.

    An engine that is made without a room keeps every series in memory.
    """

    maker: Callable[[Room | None], EngineMaker]
    decode: Callable[[Messages], RecordBatch]
    encoder: Callable[[int], Encode]
    read: Callable[[bytes], tuple[Coordinates, int]]


class RevisedEncoder(TinyEncoder):
    """The tiny engine's forecasts with their revision."""

    def __init__(self, revision: int) -> None:
        self._head = b"%d " % revision

    def encode_forecasts(self, report: StepReport) -> list[OutMessage]:
        return [m._replace(value=self._head + (m.value or b"")) for m in super().encode_forecasts(report)]


def tiny() -> Mind:
    maker = EngineMaker(lambda _: TinyEngine(), lambda state, _then, _now: TinyEngine.restore(state))

    def read(value: bytes) -> tuple[Coordinates, int]:
        revision, _, told = value.decode().partition(" ")
        place, offset = told.partition("=")[0].split("@")
        topic, _, partition = place.rpartition("-")
        return (topic, int(partition), int(offset)), int(revision)

    return Mind(lambda _: maker, decode, RevisedEncoder, read)


def real() -> Mind:
    return _real(small_config(training={"k1": 2, "k2": 6, "batch_series": 3, "max_wait": 12}))


def forgetful() -> Mind:
    """Memory for a few series only; the others wait in the scratch file, and in time are forgotten."""
    return _real(
        small_config(
            series={"max_series": 4, "ttl": "600s"},
            training={"k1": 2, "k2": 6, "batch_series": 3, "max_wait": 4},
            model={"hidden_size": 3},
        )
    )


def _real(config: Config) -> Mind:
    torch.set_num_threads(1)  # as the service does

    def maker(room: Room | None) -> EngineMaker:
        if room is None:
            roomy = config.model_copy(update={"series": config.series.model_copy(update={"max_series": 10**6})})
            return EngineMaker(
                lambda _: Engine.create(roomy, "cpu"), lambda state, _then, _now: Engine.restore(roomy, "cpu", state)
            )
        return EngineMaker(
            lambda _: TieredEngine(Engine.create(config, "cpu"), room),
            lambda state, _then, _now: TieredEngine.of(Engine.restore(config, "cpu", state), room, state),
        )

    def read(value: bytes) -> tuple[Coordinates, int]:
        told = json.loads(value)
        source = told["source"]
        return (source["topic"], source["partition"], source["offset"]), told["model"]["revision"]

    return Mind(
        maker, decode_in_time, lambda revision: ForecastEncoder("0" * 64, config.model.horizons, revision), read
    )


CONFIG = Config.model_validate({
    "name": "n",
    "source": {"bootstrap_servers": ["nowhere:1"], "topics": ["in"]},
    "decode": {"series_id": ["$.key"], "timestamp": {"path": "$.ts"}, "target": "$.value"},
})  # fmt: skip


@dataclass
class World:
    """What outlives a process."""

    mind: Mind
    input: Input
    output: Output
    kernel: Kernel
    pace: Pace
    keep: int = 2
    ids: int = 0
    delivery: Literal["exactly_once", "idempotent"] = "exactly_once"
    on_gap: Literal["fail", "skip"] = "fail"
    bucket: Bucket | None = None
    history: list[ProgressEntry] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.kernel.root / "state"

    @property
    def begun(self) -> bool:
        """Whether any process was here before."""
        return bool(self.bucket.objects) if self.bucket else self.directory.exists()

    def store(self) -> CheckpointStore:
        """The checkpoints as they are, seen by nobody's process."""
        return self.bucket.store() if self.bucket else open_store(self.directory)

    def files(self, step: int) -> dict[str, bytes]:
        """Those of a generation, by their full names; none where nobody can tell which they are."""
        if self.bucket:
            try:
                header = self.store().header(step)
            except CheckpointError:
                return {}
            root = f"bucket/prefix/{step:020d}"
            names = [
                f"{root}/{MANIFEST}",
                *(f"{root}/{header.manifest.attempt}/{name}" for name in header.manifest.files),
            ]
            return {name: self.bucket.objects[name] for name in names}
        return {str(path): path.read_bytes() for path in sorted((self.directory / f"{step:020d}").iterdir())}

    def change(self, name: str, data: bytes) -> None:
        """Somebody or something writes to a file in place."""
        if self.bucket:
            self.bucket.objects[name] = data
        else:
            Path(name).write_bytes(data)
            self.kernel.adopt()

    def lose_checkpoints(self) -> None:
        """Somebody deletes them all."""
        if self.bucket:
            self.bucket.objects.clear()
        else:
            shutil.rmtree(self.directory)
            self.kernel.adopt()

    def chain(self) -> list[ProgressEntry]:
        """All that was ever decided, trimmed or not."""
        if self.delivery == "exactly_once":
            return [ProgressEntry(s.offset, s.value) for s in self.output.committed(CONFIG.progress_topic)]
        if (self.directory / JOURNAL).is_dir():
            there = Journal(self.directory / JOURNAL).read()
            first = there[0].offset if there else 0
            self.history = [entry for entry in self.history if entry.offset < first] + there
        return self.history

    def begins(self) -> int:
        """The oldest offset of the chain that was not trimmed."""
        if self.delivery == "exactly_once":
            return self.output.begins.get(CONFIG.progress_topic, 0)
        return next((entry.offset for entry in Journal(self.directory / JOURNAL).read()), 0)

    def lose_chain(self) -> None:
        """Somebody deletes the progress topic's records, or the journal."""
        if self.delivery == "exactly_once":
            self.output.begins[CONFIG.progress_topic] = self.output.next_offset[CONFIG.progress_topic]
        else:
            shutil.rmtree(self.directory / JOURNAL)
            self.kernel.adopt()


class RememberedJournal(Journal):
    """What it acknowledges stays in the world's history, for it is trimmed."""

    def __init__(self, world: World, disk: SimulatedDisk) -> None:
        super().__init__(world.directory / JOURNAL, disk, segment_bytes=2000)
        self._world = world

    def append(self, value: bytes) -> int:
        offset = super().append(value)
        earlier = [entry for entry in self._world.history if entry.offset < offset]
        self._world.history = [*earlier, ProgressEntry(offset, value)]
        return offset


class PatientStop(Stop):
    """Waiting moves the clock and takes no time."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def wait(self, timeout_s: float) -> bool:
        self._advance(timeout_s)
        return self.requested

    def left_s(self, timeout_s: float) -> float:
        return timeout_s


class MovedWriter(BackgroundWriter):
    """Whoever waits for the outcome lets the thread run to its end."""

    def __init__(self, store: CheckpointStore, keep: int, beside: Beside) -> None:
        super().__init__(store, Keep(keep), start=beside.start)
        self._beside = beside

    def poll(self, timeout_s: float = 0.0) -> Outcome | None:
        if timeout_s > 0:
            self._beside.finish()
        return super().poll()


class Life(Process):
    """A process under its weather. What it announced is durable, and the ids it drew tell whose records are whose."""

    def __init__(self, world: World, weather: Weather, sizes: tuple[int, ...] = (7,)) -> None:
        self.disk = disk = SimulatedDisk(world.kernel, weather)
        super().__init__(
            world.input,
            world.bucket.store(weather) if world.bucket else world.directory,
            weather,
            pace=world.pace,
            keep=world.keep,
            sizes=sizes,
            disk=disk,
            on_gap=world.on_gap,
        )
        self.weather, self.outside = weather, world
        self.made: set[str] = set()
        self.doing = "starting"
        self.scratch = (self.store.directory or world.kernel.root) / SCRATCH
        self.stop = PatientStop(self.clock.advance)
        self.source = SimulatedSource(world.input, weather, self.clock, sizes, at_end=self.stop.request)
        repeat = None
        if world.delivery == "exactly_once":
            progress: Any = SimulatedProgress(world.output, CONFIG.progress_topic, weather, self.clock)
            self.publisher = SimulatedPublisher(CONFIG, world.output, weather)
        else:
            progress = RememberedJournal(world, disk)
            self.publisher = SimulatedIdempotentPublisher(CONFIG, progress, world.output, weather)
            repeat = Repeater(self.publisher, lambda _, revision: world.mind.encoder(revision))
        self.world = replace(
            self.world,
            source=self.source,
            publisher=self.publisher,
            progress=progress,
            repeat=repeat,
            decode=world.mind.decode,
            maker=world.mind.maker(Room(self.scratch)),
            new_id=self._new_id,
        )
        self.end: str | StreamlstmError = "running"

    def _new_id(self) -> str:
        self.outside.ids += 1
        self.made.add(f"{self.outside.ids:016x}")
        return f"{self.outside.ids:016x}"

    def writer(self) -> BackgroundWriter:
        return MovedWriter(self.store, self.keep, self.weather.beside)

    def begin(self) -> Ready:
        self.ready, self.doing = None, "starting"
        return super().begin()

    def encoder_for(self, ready: Ready) -> Encode:
        self.doing = "running"
        return self.outside.mind.encoder(ready.revision)

    def run(self) -> Any:
        """As the service does: a failed transaction costs a start-up, three in a row the process."""

        def session(*, first: bool) -> Daemon:
            self.begin()
            assert self.daemon is not None
            return self.daemon

        run_sessions(session, self.stop, self.journal)
        assert self.ready is not None
        return self.ready.engine

    def live(self) -> Any:
        """From start to end, whatever the end: :attr:`end` says which. The engine, if it stopped cleanly."""
        return self._do(self.run)

    def go_back(self, step: int, exclude: Sequence[Range]) -> Any:
        """Not the service, but its operator: ``checkpoint revert``."""
        self.doing = "going back"
        world = self.world
        return self._do(
            lambda: revert(self.store, self.publisher, world.progress, SETTINGS_NAME, step, exclude, self._new_id)
        )

    def _do(self, work: Callable[[], Any]) -> Any:
        result = None
        try:
            result = work()
            self.end = "stopped"
        except StoppedEarly:
            self.end = "stopped while starting"
        except Crash:
            self.end = "killed"
            self._leave_scratch()
        except StreamlstmError as error:
            self.end = error
        finally:
            self.store.close()
            self.weather.end()
            self.disk.end()
        how = self.end if isinstance(self.end, str) else f"exit {self.end.exit_code}: {self.end}"
        self.weather.tell(f"{how}, {self.doing}")
        return result

    def _leave_scratch(self) -> None:
        """A killed process removes nothing; ours will, once the engine is forgotten."""
        for path in self.scratch.glob("*.sqlite"):
            shutil.copy(path, path.with_name(f"stored-left-by-{self.outside.ids}-{path.name}"))

    @property
    def announced(self) -> int:
        """The newest step that was said to be durable, or -1."""
        steps = [c.step for c in self.watching.checkpoints if c.outcome == "written"]
        started = [self.ready.generation.step] if self.ready else []
        return max(steps + started, default=-1)


def sizes(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(1, 14) for _ in range(rng.randrange(1, 5)))


SETTINGS_NAME = SETTINGS.name
