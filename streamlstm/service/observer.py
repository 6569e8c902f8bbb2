"""
What the daemon tells whoever watches it: facts, at most a few times a step, never once a record.

The daemon calls; metrics, `/status` and `/healthz` keep what they are told. An observer never raises and never blocks:
it is called between the steps of the loop. Durations are seconds, ``*_at_s`` are seconds since the epoch unless a
field says monotonic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from streamlstm.engine.report import StepReport
from streamlstm.records.batch import Range
from streamlstm.recovery.making import Census
from streamlstm.transport.interfaces import Position

Phase = Literal["starting", "replaying", "running", "waiting", "stopping"]


@dataclass(frozen=True, slots=True)
class StepTimings:
    """How long one step took, by stage; ``poll_s`` holds the waiting too."""

    poll_s: float
    decode_s: float
    engine_s: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """
    How this process came up.

    ``source``: nothing there (``fresh``), the newest generation (``checkpoint``), or an older one because newer ones
    were bad (``fallback``). ``rebased``: recorded steps were replayed with other bits than they were made with.
    ``reproducible``: false where the self-test failed, so that this machine would not give its own bits again.
    ``phases_s`` is the time spent by phase (``load``, ``progress``, ``replay``). ``positions`` is where the stream goes
    on, ``checkpoint_positions`` where the checkpoint stands, and ``census`` what the state holds.
    """

    source: Literal["fresh", "checkpoint", "fallback"]
    step: int
    replayed_steps: int
    rebased: bool
    quarantined: int
    phases_s: Mapping[str, float]
    checkpoint_step: int
    checkpoint_at_s: float
    positions: Sequence[Position]
    checkpoint_positions: Sequence[Position]
    census: Census
    reproducible: bool = True


@dataclass(frozen=True, slots=True)
class Committed:
    """
    One transaction: the reports of its steps, in order, and what became visible with them.

    ``positions`` are those after the transaction. ``published_at_s`` is when it was over. ``excluded`` messages lay in
    ranges that are passed over, and are in no report.
    """

    reports: Sequence[StepReport]
    forecasts: int
    dead_letters: int
    bytes: int
    duration_s: float
    published_at_s: float
    positions: Sequence[Position]
    excluded: int = 0


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """
    One attempt to make a checkpoint durable. With ``outcome`` ``failed`` the sizes are 0 and ``error`` says why.

    ``snapshot_s`` is what the loop stood still for; the rest happened in the background.
    """

    outcome: Literal["written", "failed"]
    step: int
    bytes: int
    snapshot_s: float
    write_s: float
    fsync_s: float
    at_s: float
    positions: Sequence[Position]
    error: str = ""


class Observer(Protocol):
    """Told by the daemon what happened. Never raises, never blocks, keeps nothing of the engine's."""

    def observe_phase(self, phase: Phase) -> None:
        """The daemon is in this phase from now on; it is ready while ``running``."""
        ...

    def observe_turn(self, monotonic_s: float) -> None:
        """The loop turned: its heartbeat, also sent for every replayed step."""
        ...

    def observe_resume(self, resumed: Resumed) -> None:
        """Start-up is over."""
        ...

    def observe_step(self, report: StepReport, timings: StepTimings, received_bytes: Mapping[str, int]) -> None:
        """A live step was computed (not yet committed). ``received_bytes`` is by input topic."""
        ...

    def observe_commit(self, committed: Committed) -> None:
        """A transaction became visible."""
        ...

    def observe_commit_failed(self, error: str) -> None:
        """A transaction's outcome is unknown; the process is about to end."""
        ...

    def observe_lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """Records behind the end of the log, by (topic, partition)."""
        ...

    def observe_checkpoint(self, checkpointed: Checkpointed) -> None:
        """A checkpoint was made durable, or could not be."""
        ...

    def observe_gap(self, ranges: Sequence[Range]) -> None:
        """Offsets that retention had deleted were passed over."""
        ...


class Observers:
    """Several that are told the same, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def observe_phase(self, phase: Phase) -> None:
        """See :meth:`Observer.observe_phase`."""
        for observer in self._observers:
            observer.observe_phase(phase)

    def observe_turn(self, monotonic_s: float) -> None:
        """See :meth:`Observer.observe_turn`."""
        for observer in self._observers:
            observer.observe_turn(monotonic_s)

    def observe_resume(self, resumed: Resumed) -> None:
        """See :meth:`Observer.observe_resume`."""
        for observer in self._observers:
            observer.observe_resume(resumed)

    def observe_step(self, report: StepReport, timings: StepTimings, received_bytes: Mapping[str, int]) -> None:
        """See :meth:`Observer.observe_step`."""
        for observer in self._observers:
            observer.observe_step(report, timings, received_bytes)

    def observe_commit(self, committed: Committed) -> None:
        """See :meth:`Observer.observe_commit`."""
        for observer in self._observers:
            observer.observe_commit(committed)

    def observe_commit_failed(self, error: str) -> None:
        """See :meth:`Observer.observe_commit_failed`."""
        for observer in self._observers:
            observer.observe_commit_failed(error)

    def observe_lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """See :meth:`Observer.observe_lag`."""
        for observer in self._observers:
            observer.observe_lag(lag)

    def observe_checkpoint(self, checkpointed: Checkpointed) -> None:
        """See :meth:`Observer.observe_checkpoint`."""
        for observer in self._observers:
            observer.observe_checkpoint(checkpointed)

    def observe_gap(self, ranges: Sequence[Range]) -> None:
        """See :meth:`Observer.observe_gap`."""
        for observer in self._observers:
            observer.observe_gap(ranges)
