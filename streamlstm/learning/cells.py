"""
The LSTM cell on the forecast path: rows in fixed tiles, so that no row's bits depend on who sits beside it.

Library matrix products give other bits for one to three rows than for eight, and vectorised functions other bits for
the tail of an array than for its body. Every product and every function here sees the same shape whatever the number
of rows: a tile of :func:`tile_rows` rows, padded with zeros (measured in ``tests/core/learning``).

Axes: N rows, T rows of a tile, B series, F features, H hidden units, K horizons.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.learning.model import COLUMNS, Prepared

# 32 rows × any width is a whole number of the blocks in which vectorised functions work.
_CPU_TILE = 32
_BLOCK_ELEMENTS = 32
# From this many elements on torch splits an operation among threads, and the end of each share has other bits.
_SPLIT_ELEMENTS = 32_768
# A GPU is kept busy by more; its row results do not depend on neighbours inside one shape either.
_GPU_TILE = 1024


def tile_rows(device: torch.device) -> int:
    """Rows that are computed together."""
    return _CPU_TILE if device.type == "cpu" else _GPU_TILE


def _rows_together(hidden: int, gates: int) -> int:
    """How many rows one function takes: all, unless the network is so wide that threads would share them."""
    for rows in (32, 16, 8, 4, 2):
        if rows * gates < _SPLIT_ELEMENTS and rows * hidden % _BLOCK_ELEMENTS == 0:
            return rows
    return 1


class Cell:
    """
    Advances carries by given inputs. Holds buffers only; it has no state that outlives a call.

    zₜ = [xₜ, hₜ₋₁] W + b, (i, f, o) = σ(z), g = tanh(z) = 2σ(2z) − 1, cₜ = f·cₜ₋₁ + i·g, hₜ = o·tanh(cₜ).
    """

    def __init__(self, features: int, hidden: int, device: torch.device) -> None:
        self._hidden = hidden
        self._rows = tile_rows(device)

        def buffer(width: int) -> Tensor:
            return torch.zeros((self._rows, width), device=device)

        self._joined, self._gates = buffer(features + hidden), buffer(-(-4 * hidden // COLUMNS) * COLUMNS)
        self._x, self._h = self._joined.split([features, hidden], 1)
        self._c, self._g = buffer(hidden), buffer(hidden)
        together = _rows_together(hidden, self._gates.shape[1]) if device.type == "cpu" else self._rows
        parts = (self._gates, *self._gates[:, : 4 * hidden].split(hidden, 1), self._c, self._g, self._h)
        self._groups = list(zip(*(part.split(together) for part in parts), strict=True))

    @torch.no_grad()
    def run(
        self, parameters: Prepared, x_NF: Tensor, h_BH: Tensor, c_BH: Tensor, waves: Sequence[int]
    ) -> tuple[Tensor, Tensor, NDArray[np.bool_] | None]:
        """
        The carries after every row, ``h_NH, c_NH``, and which of them had to be zeroed (``None`` = none).

        Rows come wave by wave: wave w holds the w-th row of the first ``waves[w]`` series, so widths never grow. A
        carry that turns out not finite is replaced by zero before the next row of its series.
        """
        zeroed_N = np.zeros(len(x_NF), np.bool_)
        h_NH, c_NH = self._sweep(parameters, x_NF, h_BH, c_BH, waves, None)
        # A sum is not finite if one of its terms is not; and it costs a fraction of looking at each.
        if math.isfinite(float(h_NH.sum() + c_NH.sum())):
            return h_NH, c_NH, None
        h_NH, c_NH = self._sweep(parameters, x_NF, h_BH, c_BH, waves, zeroed_N)
        return h_NH, c_NH, zeroed_N if zeroed_N.any() else None

    def _sweep(
        self,
        parameters: Prepared,
        x_NF: Tensor,
        h_BH: Tensor,
        c_BH: Tensor,
        waves: Sequence[int],
        zeroed_N: NDArray[np.bool_] | None,
    ) -> tuple[Tensor, Tensor]:
        """All rows, tile by tile; given ``zeroed_N``, every carry is looked at and mended on the way."""
        h_NH = torch.empty((len(x_NF), self._hidden), device=x_NF.device)
        c_NH = torch.empty_like(h_NH)
        starts = list(itertools.accumulate(waves, initial=0))
        for first in range(0, waves[0], self._rows):
            self._load(h_BH[first : first + self._rows], c_BH[first : first + self._rows])
            for wave, width in enumerate(waves):
                rows = min(width - first, self._rows)
                if rows <= 0:
                    break
                here = slice(starts[wave] + first, starts[wave] + first + rows)
                self._x[:rows] = x_NF[here]
                self._advance(parameters)
                if zeroed_N is not None:
                    zeroed_N[here] = self._mend()[:rows]
                h_NH[here] = self._h[:rows]
                c_NH[here] = self._c[:rows]
        return h_NH, c_NH

    def _mend(self) -> NDArray[np.bool_]:
        """Zero the tile's carries that are not finite; which they were."""
        bad = ~(self._h.isfinite().all(1) & self._c.isfinite().all(1))
        self._h[bad] = 0
        self._c[bad] = 0
        return bad.cpu().numpy()

    def _load(self, h_BH: Tensor, c_BH: Tensor) -> None:
        self._joined.zero_()
        self._c.zero_()
        self._h[: len(h_BH)] = h_BH
        self._c[: len(c_BH)] = c_BH

    def _advance(self, parameters: Prepared) -> None:
        """One step of the whole tile, in place."""
        torch.addmm(parameters.gate_bias, self._joined, parameters.gates, out=self._gates)
        for gates, i, keep, s, o, c, g, h in self._groups:
            gates.sigmoid_()
            torch.sub(s, 0.5, out=g)
            c.mul_(keep).addcmul_(i, g, value=2)
            torch.tanh(c, out=g)
            torch.mul(o, g, out=h)


@torch.no_grad()
def head(parameters: Prepared, h_NH: Tensor, horizons: int) -> Tensor:
    """Outputs for every horizon ``[N, K]``, in units of the series' scale; zero, the naive one, where not finite."""
    rows = tile_rows(h_NH.device)
    count, hidden = h_NH.shape
    out = torch.empty((-(-count // rows) * rows, len(parameters.head_bias)), device=h_NH.device)
    padded = torch.zeros((rows, hidden), device=h_NH.device)
    for first in range(0, count, rows):
        tile = h_NH[first : first + rows]
        if len(tile) < rows:
            padded[: len(tile)] = tile
            tile = padded
        torch.addmm(parameters.head_bias, tile, parameters.head, out=out[first : first + rows])
    out = out[:count, :horizons]
    return torch.where(out.isfinite(), out, 0)
