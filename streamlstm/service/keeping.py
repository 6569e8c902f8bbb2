"""
Generations of a replay: killed at any instruction, it goes on as if it had never stopped.

What a generation names must be durable before it: outputs are synced first, and one that is taken up cuts them back to
the lengths it names. What a dead life wrote beyond is computed again, bit for bit, so no journal is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from streamlstm.config.keys import tell_changes
from streamlstm.engine.report import StepReport
from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError, CheckpointNotWritten, ConfigError, Temporary
from streamlstm.recovery.background import BackgroundWriter, Failed, Outcome
from streamlstm.recovery.checkpoint import CheckpointStore, Refused
from streamlstm.recovery.progress import Value, positions_after
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.service.daemon import CheckpointSchedule, Log
from streamlstm.service.replay import Fed, Tally, pack, unpack
from streamlstm.service.stopping import Stop
from streamlstm.transport.appended import Output
from streamlstm.transport.interfaces import Frozen, Position, TopicIds

_WAIT_S = 1.0


class Begun(NamedTuple):
    """
    A replay as its newest generation left it. ``refused`` were newer and bad.

    ``asked`` is what it was told to do, ``input`` what its input must still be. ``messages`` were read, and in
    ``spent_s``; ``finished``: they were all. ``learning`` are the values of the learning keys that the state was made
    under.
    """

    state: EngineState
    provenance: Provenance
    asked: Mapping[str, object]
    input: Frozen
    tally: Frozen
    outputs: Mapping[str, Frozen]
    messages: int
    finished: bool
    spent_s: float
    learning: Mapping[str, Value]
    refused: Sequence[Refused]


def take_up(store: CheckpointStore, settings: Settings) -> Begun | None:
    """
    The newest generation that a replay under this configuration left, ``None`` where there is none.

    Raises :class:`~streamlstm.errors.CheckpointError` when none is good or they are no replay's, and
    :class:`~streamlstm.errors.ConfigError` when they are of another configuration.
    """
    loaded, refused = store.newest()
    if loaded is None:
        return None
    if loaded.beside is None:
        raise CheckpointError(f"{store.name} holds checkpoints that no replay made; take another --checkpoint-to")
    was = loaded.generation.provenance.settings
    if told := tell_changes({**was.identity, **was.learning}, {**settings.identity, **settings.learning}):
        raise ConfigError(
            f"since the replay in {store.name} was begun {told}; set them back, or begin again with another "
            "--checkpoint-to"
        )
    for bad in refused:
        store.put_aside(bad.step)
    parts = unpack(loaded.beside)
    life = parts["life"].values
    return Begun(
        state=loaded.state,
        provenance=loaded.generation.provenance,
        asked=life["asked"],
        input=parts["input"],
        tally=parts["tally"],
        outputs=unpack(parts["outputs"]),
        messages=life["messages"],
        finished=life["finished"],
        spent_s=life["spent_s"],
        learning=life["learning"],
        refused=refused,
    )


class Keeps(Protocol):
    """Of an engine, what a generation needs."""

    @property
    def step_number(self) -> int:
        """Of the newest step."""
        ...

    @property
    def learning(self) -> Mapping[str, Value]:
        """The values of the learning keys that its state was made under."""
        ...

    def state(self) -> EngineState:
        """A snapshot, immutable."""
        ...


class Input(Protocol):
    """What a replay reads, as far as a generation must know it."""

    def topic_ids(self) -> TopicIds:
        """What tells this input from another: the topics' ids, or a digest of what was read."""
        ...

    def freeze(self) -> Frozen:
        """What must be known beside positions to go on."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What a replay's generations say of where they come from, beside positions."""

    lineage: str
    incarnation: str
    settings: Settings
    fingerprint: Mapping[str, str]
    asked: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Clocks:
    """Since some moment, since 1970, and how long all lives together have taken."""

    monotonic_s: Callable[[], float]
    wall_s: Callable[[], float]
    spent_s: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Live:
    """A replay under way: all that a generation holds of it, and the positions it began at."""

    engine: Keeps
    input: Input
    positions: tuple[Position, ...]
    tally: Tally
    outputs: Mapping[str, Output]


class Keeper:
    """
    Takes generations of a replay while it runs, in the background, and one at its end.

    :meth:`after` is to be told of each step last, once all outputs have it.
    """

    def __init__(
        self,
        writer: BackgroundWriter,
        schedule: CheckpointSchedule,
        terms: Terms,
        live: Live,
        clocks: Clocks,
        log: Log,
        stop: Stop,
    ) -> None:
        self._writer, self._schedule, self._terms, self._live = writer, schedule, terms, live
        self._clocks, self._log, self._stop = clocks, log, stop
        self._positions = live.positions

    def after(self, report: StepReport, fed: Fed) -> None:
        """
        One step is done: take a generation if one is due.

        Asked to stop, it takes one whatever is due, and raises :class:`~streamlstm.errors.Temporary`.
        """
        self._positions = positions_after(self._positions, [fed.messages.cut])
        self._schedule.consumed(len(report.batch) + len(report.batch.rejected))
        self._heed(self._writer.poll())
        if self._stop.requested:
            self.keep(finished=False)
            raise Temporary(
                f"stopped after {self._live.tally.summary.messages:,} messages; the same command with --resume goes on"
            )
        if not self._writer.busy and self._schedule.due(self._live.engine.step_number, self._clocks.monotonic_s()):
            self._submit(finished=False)
        if self._writer.busy and self._schedule.hangs():
            self._wait()

    def keep(self, *, finished: bool) -> None:
        """Take a generation, and wait until it is durable. Raises when it cannot be."""
        self._wait()
        self._submit(finished=finished)
        outcome = self._wait()
        if isinstance(outcome, Failed):
            raise outcome.error

    def _submit(self, *, finished: bool) -> None:
        terms = self._terms
        life = {
            "asked": terms.asked,
            "messages": self._live.tally.summary.messages,
            "finished": finished,
            "spent_s": self._clocks.spent_s(),
            "learning": dict(self._live.engine.learning),
        }
        beside = pack({
            "life": Frozen(life),
            "input": self._live.input.freeze(),
            "tally": self._live.tally.freeze(),
            "outputs": pack({name: output.freeze() for name, output in self._live.outputs.items()}),
        })  # fmt: skip
        provenance = Provenance(
            lineage=terms.lineage,
            incarnation=terms.incarnation,
            positions=self._positions,
            topic_ids=dict(self._live.input.topic_ids()),
            progress=None,
            settings=terms.settings,
            fingerprint=terms.fingerprint,
            created_ms=int(self._clocks.wall_s() * 1000),
        )
        self._schedule.tried(self._clocks.monotonic_s())
        self._writer.submit(self._live.engine.state(), provenance, beside, self._sync)

    def _sync(self) -> None:
        for output in self._live.outputs.values():
            output.sync()

    def _wait(self) -> Outcome | None:
        """The outcome of the one in flight, however long the disk takes: a replay has nothing better to do."""
        while self._writer.busy:
            outcome = self._writer.poll(_WAIT_S)
            if outcome is not None:
                self._heed(outcome)
                return outcome
        return None

    def _heed(self, outcome: Outcome | None) -> None:
        """One that failed is said, and costs time after a kill; a disk that loses data, or fails for long, ends it."""
        if outcome is None:
            return
        if not isinstance(outcome, Failed):
            self._schedule.kept(outcome.written.generation.step)
            if outcome.leftover:
                self._log.warning("old checkpoints stay", error=outcome.leftover)
            return
        self._log.error("checkpoint failed", step=outcome.step, error=str(outcome.error))
        if not outcome.may_pass:
            raise outcome.error
        if self._schedule.too_far():
            raise CheckpointNotWritten(
                f"{self._schedule.since_durable} records were consumed since the last checkpoint; {outcome.error}"
            ) from outcome.error
