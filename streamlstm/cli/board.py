"""What a live table shows of each series: the last value, the next forecasts, the last error, the skill of late."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamlstm.engine.report import StepReport
from streamlstm.records.batch import SeriesId
from streamlstm.service.scores import LAST_VALUE, MODEL

_KEPT = 0.5 ** (1 / 30)


@dataclass(slots=True)
class Row:
    """
    One series. ``soon`` and ``later`` are forecasts one interval and ``ahead`` intervals from ``now``.

    ``error`` is that of the forecast made one interval ago. NaN is what is not known yet.
    """

    series: str
    now: float = math.nan
    soon: float = math.nan
    later: float = math.nan
    error: float = math.nan
    warming: bool = True
    model_square: float = 0.0
    naive_square: float = 0.0

    @property
    def skill(self) -> float:
        """1 − MSE / MSE of the last value over all horizons, where errors 30 records ago count half."""
        return 1.0 - self.model_square / self.naive_square if self.naive_square else math.nan


class Board:
    """Rows by series, in order of first appearance."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self._rows: dict[SeriesId, Row] = {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def update(self, report: StepReport) -> None:
        """Take in one step."""
        batch, out = report.batch, report.forecasts
        error_MXK = out.settled_error_MXK
        both_MK = np.isfinite(error_MXK[:, MODEL]) & np.isfinite(error_MXK[:, LAST_VALUE])
        square_MX = np.where(both_MK[:, None], error_MXK**2, 0.0).sum(axis=2)
        for i, record in enumerate(out.record_M.tolist()):
            series = batch.series[batch.code[record]]
            row = self._rows.setdefault(series, Row(series.key))
            row.now = float(batch.target[record])
            row.soon = float(out.yhat_MK[i, 0])
            row.later = float(out.yhat_MK[i, self.ahead - 1])
            row.error = float(error_MXK[i, MODEL, 0])
            row.warming = bool(out.warming_M[i])
            row.model_square = _KEPT * row.model_square + float(square_MX[i, MODEL])
            row.naive_square = _KEPT * row.naive_square + float(square_MX[i, LAST_VALUE])


def show(value: float) -> str:
    """
    A number in few characters, ``–`` for none.

    >>> [show(v) for v in (0.0, 1e-12, 3.14159, 1234.5, 5.0e9, -0.002, math.nan)]
    ['0', '0', '3.142', '1,234', '5.00e+09', '-0.002', '–']
    """
    if math.isnan(value):
        return "–"
    size = abs(value)
    if size < 1e-9:  # what arithmetic leaves of a zero
        return "0"
    if size >= 1e7 or size < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def show_skill(value: float) -> str:
    """
    A skill, always with its sign.

    >>> show_skill(0.1234), show_skill(math.nan)
    ('+0.12', '–')
    """
    return "–" if math.isnan(value) else f"{value:+.2f}"
