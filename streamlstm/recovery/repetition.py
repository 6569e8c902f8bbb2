"""
Publishing again what a kill may have left unpublished.

Without transactions a progress record is durable first and its outputs are published after it, and the next record
follows only when all of them are out. So those of the newest steps record may be out in part, or not at all, and those
of every older one are out. A start computes the newest again anyway, unless a checkpoint stands on it: and a snapshot
is taken only when its outputs are out. What is published again has the same bytes, because it is encoded as it was:
with the hash of the configuration that it was recorded under, and the same revision.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from streamlstm.engine.report import StepReport
from streamlstm.records.batch import Messages
from streamlstm.recovery.progress import Chain, RecordedStep
from streamlstm.recovery.provenance import Generation

Repeat = Callable[[str, int, Sequence[tuple[StepReport, Messages]]], int]
"""
Publish the outputs of these steps, as a process with this configuration's hash and this revision encodes them, and wait
until they are out; the number of messages.
"""


class Repeated(NamedTuple):
    """
    The steps ``first`` … ``last`` were published again, in so many messages.

    They have not the same bytes when other libraries or another machine computed them, or when input is gone.
    """

    first: int
    last: int
    messages: int
    same_bytes: bool


class Repetition:
    """The newest record's steps as they are replayed. Nothing is kept where commits are all or nothing (``None``)."""

    def __init__(self, repeat: Repeat | None, chain: Chain, generation: Generation) -> None:
        self._repeat, self._chain, self._generation = repeat, chain, generation
        self._steps: list[tuple[RecordedStep, StepReport, Messages]] = []

    def wants(self, step: RecordedStep) -> bool:
        """Whether this step must be computed by itself, because what it gives may have to be published again."""
        return self._repeat is not None and step.number >= self._chain.newest

    def add(self, step: RecordedStep, report: StepReport, messages: Messages) -> None:
        """A step that was computed again, of these messages."""
        if self.wants(step):
            self._steps.append((step, report, messages))

    def publish(self, told: Callable[[Repeated], None], *, rebased: bool) -> None:
        """Publish what was kept, if anything was, and tell of it. ``rebased``: other bits were computed than before."""
        if self._repeat is None or not self._steps:
            return
        newest, *_ = self._steps[-1]
        maker, made = self._chain.incarnation(newest.incarnation), self._generation.provenance
        config = maker.config if maker else made.settings.hash  # trimmed away: then it wrote the checkpoint too
        revision = max(self._chain.revision, made.revision)
        messages = self._repeat(config, revision, [(report, messages) for _, report, messages in self._steps])
        same = not rebased and all(step.digest is not None for step, *_ in self._steps)
        told(Repeated(self._steps[0][0].number, newest.number, messages, same))
