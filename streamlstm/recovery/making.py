"""What recovery and the service ask of an engine, and of whoever makes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from streamlstm.engine.report import StepReport
from streamlstm.engine.state import EngineState
from streamlstm.records.batch import RecordBatch
from streamlstm.recovery.progress import Value


class Census(NamedTuple):
    """How many updates were made, and how many series are in memory, warming among these, and stored beyond it."""

    updates: int
    active: int
    warming: int
    stored: int


class Steppable(Protocol):
    """What recovery and the daemon ask of an engine."""

    @property
    def step_number(self) -> int:
        """The last step's; 0 before the first."""
        ...

    def step(self, batch: RecordBatch) -> StepReport:
        """Take in one cut."""
        ...

    def state(self) -> EngineState:
        """A snapshot, immutable."""
        ...

    def census(self) -> Census:
        """What there is, between two steps."""
        ...


@dataclass(frozen=True, slots=True)
class EngineMaker:
    """
    How an engine comes to be under given values of the learning keys: fresh, or from a state.

    ``restore(state, then, now)`` takes a state that was made under the learning values ``then`` on to ``now``. It
    raises ``ValueError`` naming what in the state does not fit.
    """

    create: Callable[[Mapping[str, Value]], Steppable]
    restore: Callable[[EngineState, Mapping[str, Value], Mapping[str, Value]], Steppable]
