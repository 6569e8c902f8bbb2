"""
Recorded steps computed together.

How the log is divided into steps changes no bit, and many short steps cost several times what one long step does: live
they were as short as records came, and when they are computed again nobody waits for the next record. Each step's own
digest is still told.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from streamlstm.engine.report import StepReport
from streamlstm.errors import ProgressError
from streamlstm.records.batch import Cut, Messages, Range, RecordBatch
from streamlstm.recovery.exclusions import drop_excluded
from streamlstm.recovery.making import Steppable
from streamlstm.recovery.progress import RecordedStep

MOST_OFFSETS = 16384
MOST_STEPS = 64
"""What is joined is read at once: so many cuts, of about 1 MiB each, bound the memory."""


class Computed(NamedTuple):
    """
    Steps that were computed again, with the digests they have now; ``read`` messages were read for it.

    ``report`` and ``used``, without what is excluded, are of all of them together.
    """

    steps: Sequence[RecordedStep]
    digests: Sequence[str]
    report: StepReport
    used: Messages
    read: int


def join_steps(
    steps: Iterable[RecordedStep], ends: Container[int] = (), alone: Callable[[RecordedStep], bool] = lambda _: False
) -> Iterator[list[RecordedStep]]:
    """
    Consecutive steps of one process, to be computed together.

    None goes on beyond a step whose number is in ``ends``; one that is to be ``alone`` is.
    """
    joined: list[RecordedStep] = []
    offsets = 0
    for step in steps:
        size = sum(r.end - r.start for r in step.cut)
        if joined and (
            joined[0].incarnation != step.incarnation
            or len(joined) >= MOST_STEPS
            or offsets + size > MOST_OFFSETS
            or joined[-1].number in ends
            or alone(joined[-1])
            or alone(step)
        ):
            yield joined
            joined, offsets = [], 0
        joined.append(step)
        offsets += size
    if joined:
        yield joined


def compute_together(
    engine: Steppable,
    steps: Sequence[RecordedStep],
    read: Callable[[Cut], Messages],
    decode: Callable[[Messages], RecordBatch],
    excluded: Sequence[Range],
) -> Computed:
    """Compute these steps again. Raises :class:`~streamlstm.errors.ProgressError` when the engine stands elsewhere."""
    messages = read(tuple(r for step in steps for r in step.cut))
    used, _ = drop_excluded(messages, excluded)
    report = engine.step(replace(decode(used), steps=len(steps)))
    if report.step != steps[-1].number:
        raise ProgressError(f"computing step {steps[-1].number} again, the engine counts {report.step}")
    digests = [digest.hex() for digest in report.digests([len(step.cut) for step in steps])]
    return Computed(steps, digests, report, used, len(messages))
