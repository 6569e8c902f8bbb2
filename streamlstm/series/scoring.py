"""
Scoring: what each expert's forecasts were worth, per series and horizon.

Exponentially weighted means of the absolute and squared prequential errors, with the plain average's weights until the
half-life is reached. Per series only: a sum over series would depend on how the log was divided into steps.

Axes: B series side by side, N rows: wave by wave, the w-th row of the first ``waves[w]`` series; X experts, K horizons.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamlstm.series.table import Column

HALF_LIFE = 300
ALPHA = 1 - 0.5 ** (1 / HALF_LIFE)

# Rows that are prepared together: what is in between stays in the cache.
_TOGETHER = 1024


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


def score(state: Scores, error_NXK: Tensor, waves: Sequence[int]) -> Scores:
    """
    Take in the errors that N rows settled, NaN = none; the state after the last row of each series.

    >>> zero = torch.zeros(1, 1, dtype=torch.float64)
    >>> state = Scores(zero, zero.unsqueeze(1), zero.unsqueeze(1))
    >>> errors = torch.tensor([1.0, -3.0, float("nan")], dtype=torch.float64)
    >>> state = score(state, errors.view(3, 1, 1), [1, 1, 1])
    >>> state.scored.item(), state.absolute.item(), state.squared.item()
    (2.0, 2.0, 5.0)
    """
    scored, means = state.scored.clone(), torch.stack([state.absolute, state.squared], 1)
    start = 0
    for widths in _slabs(waves):
        count = sum(widths)
        _take_in(scored, means, error_NXK[start : start + count], widths)
        start += count
    return Scores(scored, *means.unbind(1))


def _slabs(waves: Sequence[int]) -> Iterator[list[int]]:
    """Waves in groups of about 1024 rows."""
    widths: list[int] = []
    for width in waves:
        if widths and sum(widths) + width > _TOGETHER:
            yield widths
            widths = []
        widths.append(width)
    yield widths


def _take_in(scored_BK: Tensor, means_B2XK: Tensor, error_NXK: Tensor, widths: list[int]) -> None:
    """Move the state, in place. Only what is a recurrence goes wave by wave."""
    missing_NK = error_NXK[:, 0].isnan()
    here_NK = (~missing_NK).double()
    count_NK = torch.empty_like(here_NK)
    for here, count in zip(here_NK.split(widths), count_NK.split(widths), strict=True):
        count.copy_(scored_BK[: len(here)].add_(here))
    weight_NK = (1 / count_NK.clamp(min=1)).clamp(min=ALPHA) * here_NK

    # What is not scored has weight zero; it stands as 0, so nothing here is ever NaN.
    error_NXK = error_NXK.masked_fill(missing_NK.unsqueeze(1), 0)
    worth_N2XK = error_NXK.new_empty((len(error_NXK), 2, *error_NXK.shape[1:]))
    torch.abs(error_NXK, out=worth_N2XK[:, 0])
    torch.mul(error_NXK, error_NXK, out=worth_N2XK[:, 1])
    for worth, weight in zip(worth_N2XK.split(widths), weight_NK[:, None, None].split(widths), strict=True):
        mean = means_B2XK[: len(weight)]
        mean.add_(worth.sub_(mean).mul_(weight))
