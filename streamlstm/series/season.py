"""
One season back: a ring of each series' values by its clock, read for inputs and for the seasonal naive forecast.

Axes: N rows, K horizons, P places of the coming horizons that are shown to the network.
"""

import numpy as np
import torch
from torch import Tensor

from streamlstm.series.table import Column, Selection, SeriesTable

NEVER = -(1 << 62)
PLACES = 8
SEASONS = 7


class SeasonRing:
    """
    Reads and writes the ring's columns of a series table.

    ``block_rows`` is the most a series' clock may span inside one call (see :class:`streamlstm.series.ledger.Ledger`):
    the rows of one call are written together, then read, each looking only at its own and older clocks.
    """

    def __init__(self, season: int, horizons: int, block_rows: int, device: str) -> None:
        self._width = max(SEASONS * season, season + horizons) + block_rows
        ahead_P = np.unique(np.linspace(1, horizons, min(horizons, PLACES)).astype(np.int64))
        self._back_P = torch.from_numpy(_seasons_back(ahead_P, season) - ahead_P).to(device)
        ahead_K = np.arange(1, horizons + 1)
        self._back_K = torch.from_numpy(_seasons_back(ahead_K, season)).to(device)
        self._season = season

    @property
    def features(self) -> int:
        """Inputs per row: the last season and the mean of several, at each of P places."""
        return 2 * len(self._back_P)

    def columns(self) -> list[Column]:
        """Values and the clocks they stand for."""
        return [
            Column("season_clock", (self._width,), torch.int64, NEVER),
            Column("season_value", (self._width,), torch.float64),
        ]

    def clear(self, table: SeriesTable, selection: Selection) -> None:
        """Forget: after a restart the phase is not known."""
        table.fill("season_clock", selection, NEVER)

    def write(self, table: SeriesTable, selection: Selection, clock_N: Tensor, y_N: Tensor) -> None:
        """Enter N values, NaN = missing."""
        place_N = clock_N % self._width
        table.scatter_at("season_clock", selection, place_N, clock_N)
        table.scatter_at("season_value", selection, place_N, y_N)

    def profile(self, table: SeriesTable, selection: Selection, clock_N: Tensor) -> tuple[Tensor, Tensor]:
        """
        The values one season before P places of the coming horizons, and their means over up to seven seasons:
        ``[N, P]`` each, NaN where nothing is known.
        """
        newest_NP = clock_N.unsqueeze(1) - self._back_P
        last_NP = self._at(table, selection, newest_NP)
        total_NP, count_NP = torch.zeros_like(last_NP), torch.zeros_like(last_NP)
        for k in range(SEASONS):
            value_NP = last_NP if k == 0 else self._at(table, selection, newest_NP - k * self._season)
            known_NP = ~value_NP.isnan()
            total_NP = torch.where(known_NP, total_NP + value_NP, total_NP)
            count_NP = count_NP + known_NP
        mean_NP = torch.where(count_NP > 0, total_NP / count_NP.clamp(min=1), torch.nan)
        return last_NP, mean_NP

    def naive(self, table: SeriesTable, selection: Selection, clock_N: Tensor) -> Tensor:
        """
        The seasonal naive forecasts that speak about these rows ``[N, K]``: the newest value at the same phase that was
        known j intervals before, NaN where there was none.
        """
        return self._at(table, selection, clock_N.unsqueeze(1) - self._back_K)

    def _at(self, table: SeriesTable, selection: Selection, clock_NJ: Tensor) -> Tensor:
        place_NJ = clock_NJ % self._width
        there_NJ = table.gather_at("season_clock", selection, place_NJ) == clock_NJ
        return torch.where(there_NJ, table.gather_at("season_value", selection, place_NJ), torch.nan)


def _seasons_back(ahead: "np.typing.NDArray[np.int64]", season: int) -> "np.typing.NDArray[np.int64]":
    """How far back from a place ahead the newest value of the same phase is known: whole seasons, rounded up."""
    return -(-ahead // season) * season
