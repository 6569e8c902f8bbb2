"""
The ledger: the open forecasts of each series, keyed by the series' clock.

A forecast for horizon j made at clock n may be scored, and may train, only once the record at clock n + j is here.
Entries are kept by the clock they were made at, in a ring; the one that speaks about clock n for horizon j is found at
n - j. What falls due on an empty slot is never asked for and is overwritten: it expires unscored.

Axes: N rows, K horizons, X experts.
"""

import torch
from torch import Tensor

from streamlstm.series.season import SeasonRing
from streamlstm.series.table import Column, Selection, SeriesTable

NEVER = -(1 << 62)


class Ledger:
    """
    Writes and settles the ledger's columns of a series table.

    ``block_rows`` is the most a series' clock may span inside one call: the ring is so much longer than the horizons,
    so that the rows of one call can be written together and then settled together, each seeing only older clocks.
    """

    def __init__(self, horizons: int, block_rows: int, device: str) -> None:
        self._width = horizons + block_rows
        self._horizons = horizons
        self._j_K = torch.arange(1, horizons + 1, device=device)

    def columns(self) -> list[Column]:
        """Per entry: the clock it was made at, what it started from and in which unit, and the network's output."""
        return [
            Column("ledger_clock", (self._width,), torch.int64, NEVER),
            Column("ledger_offset", (self._width,), torch.int64, -1),
            Column("ledger_base", (self._width,), torch.float64),
            Column("ledger_scale", (self._width,), torch.float64),
            Column("ledger_output", (self._width * self._horizons,), torch.float32),
        ]

    def clear(self, table: SeriesTable, selection: Selection) -> None:
        """Forget the open forecasts of series that restart."""
        table.fill("ledger_clock", selection, NEVER)

    def expect(
        self,
        table: SeriesTable,
        selection: Selection,
        clock_N: Tensor,
        offset_N: Tensor,
        base_N: Tensor,
        scale_N: Tensor,
        output_NK: Tensor,
    ) -> None:
        """Enter the forecasts of N rows: ``base + scale * output`` for each horizon."""
        place_N = clock_N % self._width
        for name, values in (
            ("ledger_clock", clock_N),
            ("ledger_offset", offset_N),
            ("ledger_base", base_N),
            ("ledger_scale", scale_N),
        ):
            table.scatter_at(name, selection, place_N, values)
        place_NK = (place_N * self._horizons).unsqueeze(1) + (self._j_K - 1)
        table.scatter_at("ledger_output", selection, place_NK, output_NK)

    def settle(
        self, table: SeriesTable, selection: Selection, clock_N: Tensor, y_N: Tensor, season: SeasonRing | None
    ) -> tuple[Tensor, Tensor]:
        """
        Errors of the forecasts that spoke about these rows: truth minus forecast ``[N, X, K]``, NaN where there was
        none or the truth is missing; and the offset of the record that issued each ``[N, K]``, -1 for none.

        Experts: the network, the last value, the seasonal naive (the last value while it has no season to look at).
        """
        made_NK = clock_N.unsqueeze(1) - self._j_K
        place_NK = made_NK % self._width
        there_NK = table.gather_at("ledger_clock", selection, place_NK) == made_NK
        base_NK = table.gather_at("ledger_base", selection, place_NK)
        scale_NK = table.gather_at("ledger_scale", selection, place_NK)
        output_NK = table.gather_at("ledger_output", selection, place_NK * self._horizons + (self._j_K - 1))
        offset_NK = table.gather_at("ledger_offset", selection, place_NK)
        error_NXK = y_N.new_empty((len(y_N), 3, self._horizons))
        network_NK, last_NK, seasonal_NK = error_NXK.unbind(1)
        y_N1 = y_N.unsqueeze(1)
        torch.sub(y_N1, scale_NK.mul_(output_NK).add_(base_NK), out=network_NK)
        torch.sub(y_N1, base_NK, out=last_NK)
        back_NK = base_NK
        if season is not None:
            back_NK = season.naive(table, selection, clock_N)
            back_NK = torch.where(back_NK.isnan(), base_NK, back_NK)
        torch.sub(y_N1, back_NK, out=seasonal_NK)
        error_NXK.masked_fill_(~there_NK.unsqueeze(1), torch.nan)
        scored_NK = ~error_NXK[:, 0].isnan()
        return error_NXK, torch.where(scored_NK, offset_NK, -1)
