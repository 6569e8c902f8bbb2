"""
Phases of the event time: where in the day and in the week a record lies, in UTC.

Read from tables: a sine computed in bulk has other bits at the end of an array than in its middle.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MINUTES = {"hour": 24 * 60, "weekday": 7 * 24 * 60}


class Calendar:
    """Sine and cosine of each named phase, by the minute."""

    def __init__(self, phases: Sequence[str], device: str) -> None:
        self._tables = [_circle(_MINUTES[phase]).to(device) for phase in phases]

    @property
    def features(self) -> int:
        """Inputs per row."""
        return 2 * len(self._tables)

    def inputs(self, minute_N: Tensor) -> Tensor:
        """
        From minutes since the epoch, ``[N, features]`` float32.

        >>> noon = torch.tensor([12 * 60])
        >>> Calendar(["hour"], "cpu").inputs(noon).round(decimals=3).tolist()
        [[0.0, -1.0]]
        """
        phases = [table[minute_N % len(table)] for table in self._tables]
        return torch.cat([torch.empty((len(minute_N), 0), device=minute_N.device), *phases], 1)


def _circle(steps: int) -> Tensor:
    """``[steps, 2]``: sine and cosine, once around."""
    angles = [2 * math.pi * step / steps for step in range(steps)]
    return torch.tensor([[math.sin(angle), math.cos(angle)] for angle in angles])
