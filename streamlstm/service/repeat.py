"""The outputs of the newest transaction once more, where a kill may have left some of them unpublished."""

from collections.abc import Callable, Sequence
from typing import Protocol

from streamlstm.engine.report import StepReport
from streamlstm.records.batch import Messages
from streamlstm.service.daemon import Encode, encode_outputs
from streamlstm.transport.interfaces import OutMessage


class Repeating(Protocol):
    """A publisher that is not all-or-nothing."""

    def publish(self, forecasts: Sequence[OutMessage], dead_letters: Sequence[OutMessage]) -> None:
        """All of these, and wait until they are out."""
        ...


class Repeater:
    """
    Publishes recomputed steps, encoded as they were the first time: under the hash of the configuration they were
    recorded with, and its revision. See :data:`~streamlstm.recovery.repetition.Repeat`.
    """

    def __init__(self, publisher: Repeating, encoder: Callable[[str, int], Encode]) -> None:
        self._publisher, self._encoder = publisher, encoder

    def __call__(self, config: str, revision: int, steps: Sequence[tuple[StepReport, Messages]]) -> int:
        """The number of messages."""
        encoder = self._encoder(config, revision)
        forecasts: list[OutMessage] = []
        dead_letters: list[OutMessage] = []
        for report, messages in steps:
            forecast, dead = encode_outputs(encoder, report, messages)
            forecasts += forecast
            dead_letters += dead
        self._publisher.publish(forecasts, dead_letters)
        return len(forecasts) + len(dead_letters)
