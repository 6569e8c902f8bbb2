"""
The LSTM cell on the forecast path: rows in fixed tiles, so that no row's bits depend on who sits beside it.

Library matrix products give other bits for one to three rows than for eight, and vectorised functions other bits for
the tail of an array than for its body. Every product and every function here sees the same shape whatever the number
of rows: a tile of :func:`tile_rows` rows, padded with zeros (measured in ``tests/core/learning``).

Axes: N rows, T rows of a tile, B series, F features, H hidden units, K horizons.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.learning.model import Parameters

# 32 rows × any width is a whole number of vector registers, and below the size at which torch splits work by threads.
_CPU_TILE = 32
# A GPU is kept busy by more; its row results do not depend on neighbours inside one shape either.
_GPU_TILE = 1024


def tile_rows(device: torch.device) -> int:
    """Rows that are computed together."""
    return _CPU_TILE if device.type == "cpu" else _GPU_TILE


class Cell:
    """
    Advances carries by given inputs. Holds buffers only; it has no state that outlives a call.

    zₜ = [xₜ, hₜ₋₁] W + b, (i, f, o) = σ(z), g = tanh(z), cₜ = f·cₜ₋₁ + i·g, hₜ = o·tanh(cₜ). Both tanh are computed as
    2σ(2·)−1, which is several times faster and as exact as the rest in float32.
    """

    def __init__(self, features: int, hidden: int, device: torch.device) -> None:
        self._features, self._hidden = features, hidden
        self._rows = tile_rows(device)

        def buffer(width: int) -> Tensor:
            return torch.zeros((self._rows, width), device=device)

        self._joined, self._gates = buffer(features + hidden), buffer(4 * hidden)
        self._c, self._g, self._tanh = buffer(hidden), buffer(hidden), buffer(hidden)

    @torch.no_grad()
    def run(
        self, parameters: Parameters, x_NF: Tensor, h_BH: Tensor, c_BH: Tensor, waves: Sequence[int]
    ) -> tuple[Tensor, Tensor, NDArray[np.bool_] | None]:
        """
        The carries after every row, ``h_NH, c_NH``, and which of them had to be zeroed (``None`` = none).

        Rows come wave by wave: wave w holds the w-th row of the first ``waves[w]`` series, so widths never grow. A
        carry that turns out not finite is replaced by zero before the next row of its series.
        """
        zeroed_N = np.zeros(len(x_NF), np.bool_)
        h_NH, c_NH = self._sweep(parameters, x_NF, h_BH, c_BH, waves, None)
        if bool(h_NH.isfinite().all()) and bool(c_NH.isfinite().all()):
            return h_NH, c_NH, None
        h_NH, c_NH = self._sweep(parameters, x_NF, h_BH, c_BH, waves, zeroed_N)
        return h_NH, c_NH, zeroed_N

    def _sweep(
        self,
        parameters: Parameters,
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
                self._joined[:rows, : self._features] = x_NF[here]
                self._advance(parameters)
                if zeroed_N is not None:
                    zeroed_N[here] = self._mend()[:rows]
                h_NH[here] = self._joined[:rows, self._features :]
                c_NH[here] = self._c[:rows]
        return h_NH, c_NH

    def _mend(self) -> NDArray[np.bool_]:
        """Zero the tile's carries that are not finite; which they were."""
        h = self._joined[:, self._features :]
        bad = ~(h.isfinite().all(1) & self._c.isfinite().all(1))
        h[bad] = 0
        self._c[bad] = 0
        return bad.cpu().numpy()

    def _load(self, h_BH: Tensor, c_BH: Tensor) -> None:
        self._joined.zero_()
        self._c.zero_()
        self._joined[: len(h_BH), self._features :] = h_BH
        self._c[: len(c_BH)] = c_BH

    def _advance(self, parameters: Parameters) -> None:
        """One step of the whole tile, in place."""
        hidden, z, c, g, tanh_c = self._hidden, self._gates, self._c, self._g, self._tanh
        torch.addmm(parameters.gate_bias, self._joined, parameters.gates, out=z)
        z[:, 3 * hidden :].mul_(2)
        z.sigmoid_()
        torch.mul(z[:, 3 * hidden :], 2, out=g).sub_(1).mul_(z[:, :hidden])
        c.mul_(z[:, hidden : 2 * hidden]).add_(g)
        torch.mul(c, 2, out=tanh_c).sigmoid_().mul_(2).sub_(1)
        torch.mul(tanh_c, z[:, 2 * hidden : 3 * hidden], out=self._joined[:, self._features :])


@torch.no_grad()
def head(parameters: Parameters, h_NH: Tensor) -> Tensor:
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
    out = out[:count]
    return torch.where(out.isfinite(), out, 0)
