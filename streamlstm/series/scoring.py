"""
Scoring: what each expert's forecasts were worth, per series and horizon.

Exponentially weighted means of the absolute and squared prequential errors, with the plain average's weights until the
half-life is reached. Per series only: a sum over series would depend on how the log was divided into steps.

Axes: B series side by side, X experts, K horizons.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from streamlstm.series.table import Column

HALF_LIFE = 300
ALPHA = 1 - 0.5 ** (1 / HALF_LIFE)


def columns(experts: int, horizons: int) -> list[Column]:
    """Scored forecasts per horizon; mean absolute and mean squared error per expert and horizon."""
    return [
        Column("score_count", (horizons,), torch.float64),
        Column("score_absolute", (experts, horizons), torch.float64),
        Column("score_squared", (experts, horizons), torch.float64),
    ]


class Scores(NamedTuple):
    """``scored [B, K]``, ``absolute`` and ``squared [B, X, K]``."""

    scored: Tensor
    absolute: Tensor
    squared: Tensor


def score(state: Scores, error_BXK: Tensor) -> Scores:
    """
    Take in the errors that one record per series settled; NaN = none.

    >>> zero = torch.zeros(1, 1, dtype=torch.float64)
    >>> state = Scores(zero, zero.unsqueeze(1), zero.unsqueeze(1))
    >>> for error in (1.0, -3.0, float("nan")):
    ...     state = score(state, torch.tensor([[[error]]], dtype=torch.float64))
    >>> state.scored.item(), state.absolute.item(), state.squared.item()
    (2.0, 2.0, 5.0)
    """
    scored_BK = ~error_BXK[:, 0].isnan()
    scored = state.scored + scored_BK
    weight_B1K = (1 / scored.clamp(min=1)).clamp(min=ALPHA).unsqueeze(1)
    scored_B1K = scored_BK.unsqueeze(1)
    absolute = state.absolute + weight_B1K * (error_BXK.abs() - state.absolute)
    squared = state.squared + weight_B1K * (error_BXK * error_BXK - state.squared)
    return Scores(
        scored,
        torch.where(scored_B1K, absolute, state.absolute),
        torch.where(scored_B1K, squared, state.squared),
    )
