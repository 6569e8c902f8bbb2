"""One life of the service in the simulated world, and how it ended."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from fakes import SETTINGS, Crash, Encode, Process, TinyEncoder, TinyEngine, decode
from streams import small_config

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
from streamlstm.errors import StreamlstmError
from streamlstm.records.batch import Messages, RecordBatch
from streamlstm.recovery.background import BackgroundWriter, Outcome
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.journal import DIRECTORY as JOURNAL
from streamlstm.recovery.journal import Journal
from streamlstm.recovery.making import EngineMaker
from streamlstm.recovery.resume import Ready
from streamlstm.service.daemon import Daemon, Pace, StoppedEarly
from streamlstm.service.encode import ForecastEncoder
from streamlstm.service.repeat import Repeater
from streamlstm.service.sessions import run_sessions
from streamlstm.service.stopping import Stop
from streamlstm.transport.interfaces import ProgressEntry

SECOND_NS = 10**9


@dataclass(frozen=True)
class Mind:
    """Which engine, how messages reach it, and how its forecasts leave it."""

    maker: EngineMaker
    decode: Callable[[Messages], RecordBatch]
    encoder: Encode


def tiny() -> Mind:
    return Mind(
        EngineMaker(lambda _: TinyEngine(), lambda state, _then, _now: TinyEngine.restore(state)),
        decode,
        TinyEncoder(),
    )


def real() -> Mind:
    torch.set_num_threads(1)  # as the service does
    config = small_config(training={"k1": 2, "k2": 6, "batch_series": 3, "max_wait": 12})
    return Mind(
        EngineMaker(
            lambda _: Engine.create(config, "cpu"), lambda state, _then, _now: Engine.restore(config, "cpu", state)
        ),
        timed,
        ForecastEncoder("0" * 64, config.model.horizons),
    )


def timed(messages: Messages) -> RecordBatch:
    """As the tiny engine's, ten seconds apart by offset."""
    batch = decode(messages)
    return replace(batch, time_ns=batch.offset * np.int64(10 * SECOND_NS))


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
    history: list[ProgressEntry] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.kernel.root / "state"

    def store(self) -> CheckpointStore:
        return open_store(self.directory)

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
            world.input, world.directory, weather, pace=world.pace, keep=world.keep, sizes=sizes, disk=disk
        )
        self.weather, self.outside = weather, world
        self.made: set[str] = set()
        self.stop = PatientStop(self.clock.advance)
        self.source = SimulatedSource(world.input, weather, self.clock, sizes, at_end=self.stop.request)
        self.encoder = world.mind.encoder
        repeat = None
        if world.delivery == "exactly_once":
            progress: Any = SimulatedProgress(world.output, CONFIG.progress_topic, weather, self.clock)
            self.publisher = SimulatedPublisher(CONFIG, world.output, weather)
        else:
            progress = RememberedJournal(world, disk)
            self.publisher = SimulatedIdempotentPublisher(CONFIG, progress, world.output, weather)
            repeat = Repeater(self.publisher, lambda *_: world.mind.encoder)
        self.world = replace(
            self.world,
            source=self.source,
            publisher=self.publisher,
            progress=progress,
            repeat=repeat,
            decode=world.mind.decode,
            maker=world.mind.maker,
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
        self.ready = None
        return super().begin()

    def run(self) -> Any:
        """As the service does: a failed transaction costs a start-up, three in a row the process."""

        def session(*, first: bool) -> Daemon:
            self.begin()
            assert self.daemon is not None
            return self.daemon

        try:
            run_sessions(session, self.stop, self.journal)
            assert self.ready is not None
            return self.ready.engine
        finally:
            self.store.close()

    def live(self) -> Any:
        """From start to end, whatever the end: :attr:`end` says which. The engine, if it stopped cleanly."""
        engine = None
        try:
            engine = self.run()
            self.end = "stopped"
        except StoppedEarly:
            self.end = "stopped while starting"
        except Crash:
            self.end = "killed"
        except StreamlstmError as error:
            self.end = error
        finally:
            self.weather.end()
            self.disk.end()
        how = self.end if isinstance(self.end, str) else f"exit {self.end.exit_code}: {self.end}"
        self.weather.tell(f"{how}{'' if self.ready else ', before it was ready'}")
        return engine

    @property
    def announced(self) -> int:
        """The newest step that was said to be durable, or -1."""
        steps = [c.step for c in self.watching.checkpoints if c.outcome == "written"]
        started = [self.ready.generation.step] if self.ready else []
        return max(steps + started, default=-1)


def sizes(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(1, 14) for _ in range(rng.randrange(1, 5)))


SETTINGS_NAME = SETTINGS.name
