"""
Prequential scores: every error is of a forecast made before its truth was seen.

``skill`` is the mean square error skill score, 1 − MSE of the model / MSE of the reference (Murphy, Mon. Wea. Rev. 116,
1988): 1 is perfect, 0 no better, below 0 worse.

Axes: M forecast records, X experts, K horizons, B horizon buckets, W records of the window, S series.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlstm.engine.report import EXPERTS
from streamlstm.records.batch import F64, I32, I64
from streamlstm.transport.interfaces import Frozen

MODEL = EXPERTS.index("lstm")
LAST_VALUE = EXPERTS.index("last_value")
SEASONAL_NAIVE = EXPERTS.index("seasonal_naive")

_MOST_LABELS = 24


class HorizonBucket(NamedTuple):
    """Horizons ``first`` … ``last`` under one label."""

    first: int
    last: int

    @property
    def label(self) -> str:
        """``4``, or ``4-5``."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def bucket_horizons(horizons: int) -> tuple[HorizonBucket, ...]:
    """
    The values of a ``horizon`` label: each horizon up to 24 of them; of more, two buckets per octave.

    >>> [b.label for b in bucket_horizons(3)]
    ['1', '2', '3']
    >>> " ".join(b.label for b in bucket_horizons(30))
    '1 2 3 4-5 6-7 8-11 12-15 16-23 24-30'
    """
    if horizons <= _MOST_LABELS:
        return tuple(HorizonBucket(j, j) for j in range(1, horizons + 1))
    starts = sorted({s for octave in range(horizons.bit_length()) for s in (2**octave, 3 * 2**octave // 2)})
    starts = [s for s in starts if s <= horizons]
    return tuple(HorizonBucket(a, b - 1) for a, b in zip(starts, [*starts[1:], horizons + 1], strict=True))


@dataclass(frozen=True, slots=True)
class WindowScore:
    """Scores by horizon bucket over the window, in units of the target; NaN where there is nothing to say."""

    samples_B: I64
    mae_B: F64
    rmse_B: F64
    mase_B: F64
    skill_B: F64


class WindowedScores:
    """
    Scores over the newest ``window`` records that settled a forecast.

    A pair counts when both the model's and the last value's error are known. ``mase`` divides the model's MAE by the
    naive forecast's MAE one interval ahead over the same window: the seasonal naive with a season, else the last value
    (Hyndman & Koehler, Int. J. Forecasting 22, 2006).

    >>> scores = WindowedScores(horizons=1, window=100, seasonal=False)
    >>> scores.add(np.array([[[1.0], [2.0], [np.nan]], [[-1.0], [2.0], [np.nan]]]))
    >>> now = scores.score()
    >>> now.samples_B.item(), now.mae_B.item(), now.rmse_B.item(), now.mase_B.item(), now.skill_B.item()
    (2, 1.0, 1.0, 0.5, 0.75)
    """

    def __init__(self, horizons: int, window: int, *, seasonal: bool) -> None:
        self.buckets = bucket_horizons(horizons)
        self._starts_B = np.array([b.first - 1 for b in self.buckets])
        self._naive = SEASONAL_NAIVE if seasonal else LAST_VALUE
        # Per record and bucket: pairs, Σ|e|, Σe² of the model, Σe² of the last value; then pairs, Σ|e| of the naive.
        self._sums_W4B = np.zeros((window, 4, len(self.buckets)))
        self._naive_W2 = np.zeros((window, 2))
        self._next = 0

    def add(self, error_MXK: F64) -> None:
        """The settled errors of one step, in record order."""
        window = len(self._sums_W4B)
        settled_M = np.isfinite(error_MXK[:, MODEL]).any(axis=1)
        error_MXK = error_MXK[settled_M][-window:]
        if not len(error_MXK):
            return
        model_MK, last_MK, naive_M = error_MXK[:, MODEL], error_MXK[:, LAST_VALUE], error_MXK[:, self._naive, 0]
        paired_MK = np.isfinite(model_MK) & np.isfinite(last_MK)
        model_MK, last_MK = np.where(paired_MK, model_MK, 0.0), np.where(paired_MK, last_MK, 0.0)
        sums_M4K = np.stack([paired_MK, np.abs(model_MK), model_MK**2, last_MK**2], axis=1)
        known_M = np.isfinite(naive_M)
        at = (self._next + np.arange(len(error_MXK))) % window
        self._sums_W4B[at] = np.add.reduceat(sums_M4K, self._starts_B, axis=2)
        self._naive_W2[at] = np.stack([known_M, np.where(known_M, np.abs(naive_M), 0.0)], axis=1)
        self._next = (self._next + len(error_MXK)) % window

    def score(self) -> WindowScore:
        """The scores now."""
        n_B, abs_B, square_B, last_B = self._sums_W4B.sum(axis=0)
        naive_n, naive_abs = self._naive_W2.sum(axis=0)
        mae_B = _ratio(abs_B, n_B)
        return WindowScore(
            samples_B=n_B.astype(np.int64),
            mae_B=mae_B,
            rmse_B=np.sqrt(_ratio(square_B, n_B)),
            mase_B=_ratio(mae_B, _ratio(naive_abs, naive_n)),
            skill_B=1.0 - _ratio(square_B, last_B),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """
    Scores by expert and horizon over a whole stream; column K (the last) is over all horizons.

    ``skill_XK1[x]`` is the model's skill against expert x, over the forecasts that both made.
    ``left_out`` counts series that could not be standardised: constant, or too short.
    """

    pairs_XK1: I64
    mse_XK1: F64
    mae_XK1: F64
    skill_XK1: F64
    left_out: int


class StreamScores:
    """
    Scores over a stream, raw or standardised.

    :param score_from: a (forecast, horizon) pair counts when its first target is data row ``score_from`` (0-based
        offset) or later: it was issued at row ``score_from`` − 1 or later.
    :param standardise: divide each series' errors by the population standard deviation of its first so many values;
        0 = raw. The divisor is known at the end, so sums are kept by series.
    """

    def __init__(self, horizons: int, *, score_from: int = 0, standardise: int = 0) -> None:
        self._score_from = score_from
        self._standardise = standardise
        # Pairs, Σ|e|, Σe², and over the pairs the model knows too: Σe² of the model, Σe² of the expert.
        self._sums_5SXK = np.zeros((5, 0 if standardise else 1, len(EXPERTS), horizons))
        self._series = 0
        self._values_4S = np.zeros((4, 0))  # values seen, the first of them, Σ(v − first), Σ(v − first)²

    def add(self, series_M: I64 | I32, value_M: F64, error_MXK: F64, settled_offset_MK: I64) -> None:
        """
        The forecast records of one step, in record order.

        ``series_M`` numbers the series over the whole stream, from 0; ``value_M`` are the truths that arrived.
        """
        if not len(series_M):
            return
        self._series = max(self._series, int(np.max(series_M)) + 1)
        self._learn_values(np.asarray(series_M, np.int64), value_M)
        counts_MK = settled_offset_MK >= max(0, self._score_from - 1)
        known_MXK = np.isfinite(error_MXK) & counts_MK[:, None, :]
        both_MXK = known_MXK & known_MXK[:, MODEL : MODEL + 1]
        error_MXK = np.where(known_MXK, error_MXK, 0.0)
        square_MXK = error_MXK**2
        sums = (
            known_MXK.astype(np.float64),
            np.abs(error_MXK),
            square_MXK,
            np.where(both_MXK, square_MXK[:, MODEL : MODEL + 1], 0.0),
            np.where(both_MXK, square_MXK, 0.0),
        )
        if not self._standardise:
            for total_SXK, sum_MXK in zip(self._sums_5SXK, sums, strict=True):
                total_SXK[0] += sum_MXK.sum(axis=0)
            return
        self._sums_5SXK = _widen(self._sums_5SXK, self._series)
        order_M = np.argsort(series_M, kind="stable")
        present, start = np.unique(np.asarray(series_M)[order_M], return_index=True)
        for total_SXK, sum_MXK in zip(self._sums_5SXK, sums, strict=True):
            total_SXK[present] += np.add.reduceat(sum_MXK[order_M], start, axis=0)

    def _learn_values(self, series_M: I64, value_M: F64) -> None:
        """Take the first values of each series, as far as they are wanted."""
        if not self._standardise:
            return
        self._values_4S = _widen(self._values_4S, self._series)
        n_S, first_S, sum_S, square_S = self._values_4S
        known_M = ~np.isnan(value_M)
        series_M, value_M = series_M[known_M], value_M[known_M]
        order_M = np.argsort(series_M, kind="stable")
        series_M, value_M = series_M[order_M], value_M[order_M]
        present, start, count = np.unique(series_M, return_index=True, return_counts=True)
        rank_M = np.arange(len(series_M)) - np.repeat(start, count) + np.repeat(n_S[present], count)
        new = present[n_S[present] == 0]
        first_S[new] = value_M[start[n_S[present] == 0]]
        wanted_M = rank_M < self._standardise
        series_M, shifted_M = series_M[wanted_M], value_M[wanted_M] - first_S[series_M[wanted_M]]
        n_S += np.bincount(series_M, minlength=len(n_S))
        sum_S += np.bincount(series_M, shifted_M, len(n_S))
        square_S += np.bincount(series_M, shifted_M**2, len(n_S))

    def _scales(self) -> NDArray[np.float64]:
        """The divisor of each series, 0 where there is none."""
        if not self._standardise:
            return np.ones(1)
        n_S, _, sum_S, square_S = self._values_4S
        mean_S = _ratio(sum_S, n_S)
        return np.nan_to_num(np.sqrt(np.maximum(_ratio(square_S, n_S) - mean_S**2, 0.0)))

    def freeze(self) -> Frozen:
        """All of it as a value."""
        return Frozen(self._series, {"sums": self._sums_5SXK.copy(), "values": self._values_4S.copy()})

    def thaw(self, frozen: Frozen) -> None:
        """Go on from what :meth:`freeze` gave, with the same arguments."""
        self._series = frozen.values
        self._sums_5SXK, self._values_4S = (np.array(frozen.arrays[name]) for name in ("sums", "values"))

    def score(self) -> Score:
        """The scores now."""
        scale_S = self._scales()
        used_S = scale_S > 0
        scale_S11 = scale_S[used_S][:, None, None]
        n, absolute, square, model, expert = (
            _with_total(sums_SXK[used_S] / scale_S11**power)
            for sums_SXK, power in zip(self._sums_5SXK, (0, 1, 2, 2, 2), strict=True)
        )
        return Score(
            pairs_XK1=n.astype(np.int64),
            mse_XK1=_ratio(square, n),
            mae_XK1=_ratio(absolute, n),
            skill_XK1=1.0 - _ratio(model, expert),
            left_out=int(np.count_nonzero(~used_S[: self._series])),
        )


def _with_total(sums_SXK: F64) -> F64:
    """Sums over series, with the sum over all horizons as one more column."""
    sums_XK = sums_SXK.sum(axis=0)
    return np.concatenate([sums_XK, sums_XK.sum(axis=1, keepdims=True)], axis=1)


def _widen(sums: F64, series: int) -> F64:
    """Room for so many series along axis 1, by doubling."""
    have = sums.shape[1]
    if series <= have:
        return sums
    pad = np.zeros((sums.shape[0], max(series, 2 * have) - have, *sums.shape[2:]))
    return np.concatenate([sums, pad], axis=1)


def _ratio(a: F64, b: F64) -> F64:
    """``a / b``, NaN where b is 0."""
    b = np.asarray(b)
    return np.asarray(a / np.where(b == 0, np.nan, b))
