"""
Scaling: where a series is, and how much it moves.

An exponentially weighted mean and variance, with the plain average's weights until enough values were seen. The scale
adds a fraction of the lifelong standard deviation, so that a quiet spell does not turn the next step into thousands of
units, and a sliver of the mean's magnitude, so that a constant series has a scale at all. No constant has a unit: a
series times a thousand has the same inputs.

Axes: B series side by side, W waves (the w-th record of each series), N rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from streamlstm.series.table import Column

COLUMNS = [
    Column("observed", (), torch.float64),
    Column("last", (), torch.float64),
    Column("mean", (), torch.float64),
    Column("variance", (), torch.float64),
    Column("life_mean", (), torch.float64),
    Column("life_squares", (), torch.float64),
]

LIFE_SHARE = 0.05
MEAN_SHARE = 1e-7
FLOOR = 1e-30


class Scaler(NamedTuple):
    """The state of B series: values seen, the newest, EWMA mean and variance, Welford's mean and sum of squares."""

    observed: Tensor
    last: Tensor
    mean: Tensor
    variance: Tensor
    life_mean: Tensor
    life_squares: Tensor


class Scaled(NamedTuple):
    """
    What N rows were measured with, each ``[N]`` float64.

    ``base`` is the last value known at the row (its own unless it is missing; NaN before any), ``previous`` the one
    before, ``mean`` and ``scale`` those after the row.
    """

    base: Tensor
    previous: Tensor
    mean: Tensor
    scale: Tensor


def smoothing(season: int | None) -> float:
    """The EWMA's weight of the newest value: seven seasons, or a hundred values."""
    return 1 / (7 * season) if season else 1 / 100


def advance(state: Scaler, y_B: Tensor, alpha: float) -> tuple[Scaler, Scaled]:
    """
    Take in one value per series, NaN = missing, which moves nothing.

    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> state = Scaler(zero, zero, zero, zero, zero, zero)
    >>> for y in (1.0, 3.0, 5.0):
    ...     state, row = advance(state, torch.tensor([y], dtype=torch.float64), 0.01)
    >>> round(row.mean.item(), 6), round(state.variance.item(), 6)  # the plain mean and variance so far
    (3.0, 2.666667)
    """
    present = ~y_B.isnan()
    observed = state.observed + present
    count = observed.clamp(min=1)
    weight = (1 / count).clamp(min=alpha)

    error = y_B - state.mean
    mean = torch.where(present, state.mean + weight * error, state.mean)
    variance = torch.where(present, (1 - weight) * (state.variance + weight * (error * error)), state.variance)
    life_error = y_B - state.life_mean
    life_mean = torch.where(present, state.life_mean + life_error / count, state.life_mean)
    life_squares = torch.where(present, state.life_squares + life_error * (y_B - life_mean), state.life_squares)
    known = observed > 0
    last = torch.where(present, y_B, state.last)
    base = torch.where(known, last, torch.nan)
    previous = torch.where(state.observed > 0, state.last, base)
    scale = variance.sqrt() + LIFE_SHARE * (life_squares / count).sqrt() + MEAN_SHARE * mean.abs() + FLOOR
    return Scaler(observed, last, mean, variance, life_mean, life_squares), Scaled(base, previous, mean, scale)
