"""
When the model learns: the update queue, fired by counts of the log only.

Joins follow from admission alone, so all updates of a step are planned before any forecast of it is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Fire(NamedTuple):
    """After the forecast of fresh record ``position`` of the step, the ``windows`` oldest queued windows are learnt."""

    position: int
    windows: int
    rule: str


class Join(NamedTuple):
    """A window that joins the queue: at which fresh record of the step, and whose it is."""

    position: int
    slot: int


@dataclass(slots=True)
class UpdateQueue:
    """
    Who waits to be learnt from, and since when. Records are counted by ``fresh``, the shard's fresh records so far.

    S is the number of series seen in the last ``max_wait`` fresh records, taken when a window joins an empty queue. The
    queue fires

    - (A) when it holds min(``batch_series``, S) windows: everybody is here;
    - (B) when a series that has a window queued reaches its next boundary: fire first, then join;
    - (C) ``max_wait`` fresh records after the oldest joined;
    - (D) max(S, 4·k1) fresh records after the newest joined: nobody else is coming.

    A, C and D are tested after the join. Without A, seven series would learn once in hundreds of records; without D,
    257 series in lockstep would learn with a lag of rounds.
    """

    k1: int
    batch_series: int
    max_wait: int
    slots: list[int] = field(default_factory=list[int])
    joined: list[int] = field(default_factory=list[int])
    wanted: int = 0
    quiet: int = 0

    def plan(self, fresh: int, count: int, joins: Sequence[Join], seen: Callable[[int], int]) -> list[Fire]:
        """
        The fires of a step of ``count`` fresh records, after ``fresh`` earlier ones; the queue is as they leave it.

        ``seen(position)`` is S as of that record of the step. It is asked with ascending positions only.
        """
        fires: list[Fire] = []
        queued = set(self.slots)

        def fire(position: int, rule: str) -> None:
            fires.append(Fire(position, len(self.slots), rule))
            self.slots.clear()
            self.joined.clear()
            queued.clear()

        def expire(before: int) -> None:
            """C and D, for records of the step before this position."""
            if self.slots:
                oldest, newest = self.joined[0] + self.max_wait, self.joined[-1] + self.quiet
                # Overdue before this step only if the rules changed between two runs: then at its first record.
                due = max(0, min(oldest, newest) - fresh - 1)
                if due < before:
                    fire(due, "C" if oldest <= newest else "D")

        for position, slot in joins:
            expire(position)
            if slot in queued:
                fire(position, "B")
            now = fresh + 1 + position
            if not self.slots:
                series = seen(position)
                self.wanted, self.quiet = min(self.batch_series, series), max(series, 4 * self.k1)
            self.slots.append(slot)
            self.joined.append(now)
            queued.add(slot)
            if len(self.slots) >= self.wanted:
                fire(position, "A")
        expire(count)
        return fires
