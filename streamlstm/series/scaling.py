"""
Scaling: where a series is, and how much it moves.

An exponentially weighted mean and variance, with the plain average's weights until enough values were seen. The scale
adds a fraction of the lifelong standard deviation, so that a quiet spell does not turn the next step into thousands of
units, and a sliver of the mean's magnitude, so that a constant series has a scale at all. No constant has a unit: a
series times a thousand has the same inputs.

Axes: B series side by side, N rows: wave by wave, the w-th row of the first ``waves[w]`` series.
"""

from collections.abc import Sequence
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


def advance(state: Scaler, y_N: Tensor, waves: Sequence[int], alpha: float) -> tuple[Scaler, Scaled]:
    """
    Take in N values, NaN = missing, which moves nothing; the state after every row ``[N]``, and what rows are measured
    with.

    Only what is a recurrence goes wave by wave, both means and both spreads in one.

    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> state = Scaler(zero, zero, zero, zero, zero, zero)
    >>> y_N = torch.tensor([1.0, 3.0, float("nan"), 5.0], dtype=torch.float64)
    >>> after, rows = advance(state, y_N, [1, 1, 1, 1], 0.01)
    >>> rows.mean.tolist()  # the plain mean so far
    [1.0, 2.0, 2.0, 3.0]
    >>> after.variance.round(decimals=6).tolist()  # and variance
    [0.0, 1.0, 1.0, 2.666667]
    """
    widths = list(waves)
    missing_N = y_N.isnan()
    y_N = torch.where(missing_N, 0, y_N)
    present_N = (~missing_N).double()

    observed_N, last_N, former_N = torch.empty_like(y_N), torch.empty_like(y_N), torch.empty_like(y_N)
    observed, last = state.observed, state.last
    outputs = (observed_N.split(widths), last_N.split(widths), former_N.split(widths))
    for y, missing, present, observed_W, last_W, former_W in zip(
        y_N.split(widths), missing_N.split(widths), present_N.split(widths), *outputs, strict=True
    ):
        former_W.copy_(last[: len(y)])
        observed = torch.add(observed[: len(y)], present, out=observed_W)
        last = torch.where(missing, former_W, y, out=last_W)

    # A missing value has weight zero; it stands as 0, so nothing here is ever NaN.
    count_N = observed_N.clamp(min=1)
    weight_N = (1 / count_N).clamp(min=alpha) * present_N
    weights_2N = torch.stack([weight_N, present_N / count_N])
    gain_2N = torch.stack([torch.ones_like(y_N), count_N - 1])
    keep_2N = torch.stack([1 - weight_N, torch.ones_like(y_N)])
    mean_2N, spread_2N = torch.empty_like(keep_2N), torch.empty_like(keep_2N)
    mean, spread = torch.stack([state.mean, state.life_mean]), torch.stack([state.variance, state.life_squares])
    columns = (weights_2N, gain_2N, keep_2N, mean_2N, spread_2N)
    for y, weight, gain, keep, mean_W, spread_W in zip(
        y_N.split(widths), *(column.split(widths, 1) for column in columns), strict=True
    ):
        before = mean[:, : len(y)]
        error = y - before
        moved = error * weight
        mean = torch.add(before, moved, out=mean_W)
        moved.mul_(error).mul_(gain).add_(spread[:, : len(y)])
        spread = torch.mul(moved, keep, out=spread_W)

    (mean_N, life_mean_N), (variance_N, life_squares_N) = mean_2N.unbind(), spread_2N.unbind()
    base_N = torch.where(observed_N > 0, last_N, torch.nan)
    previous_N = torch.where(observed_N > present_N, former_N, base_N)
    scale_N = variance_N.sqrt() + LIFE_SHARE * (life_squares_N / count_N).sqrt() + MEAN_SHARE * mean_N.abs() + FLOOR
    after = Scaler(observed_N, last_N, mean_N, variance_N, life_mean_N, life_squares_N)
    return after, Scaled(base_N, previous_N, mean_N, scale_N)
