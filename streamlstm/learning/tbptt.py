"""
One update: truncated BPTT over the queued windows, clipping, a finite check, Adam.

The backward pass is written out (Hochreiter & Schmidhuber, 1997; truncation after Williams & Peng, 1990): the tests
hold it against autograd in float64. Nothing here writes a carry: the training pass starts from the carries saved by
the forecast path and its own are thrown away.

Axes: T steps of a window (k2), B windows, F features, H hidden units, K horizons, P parameters.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from streamlstm.learning.model import Prepared, Shape, initial, prepare, view

Loss = Literal["huber", "mse", "mae"]

# A jump of this many scales teaches direction enough; without a bound one series' outlier could overflow float32.
TARGET_LIMIT = 20.0

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

# Weights are kept for the guard every so many update numbers.
KEEP_EVERY = 64


class Windows(NamedTuple):
    """
    B frozen windows of T records, with what the forecast path knew at each of them.

    ``x_BTF`` inputs; ``y_BT`` values, NaN = missing; ``base_BT`` and ``scale_BT`` what outputs are measured from and in
    (float64); ``clock_BT`` the series' clock; ``h_BH, c_BH`` the carry before the first record.
    """

    x_BTF: Tensor
    y_BT: Tensor
    base_BT: Tensor
    scale_BT: Tensor
    clock_BT: Tensor
    h_BH: Tensor
    c_BH: Tensor


def targets(windows: Windows, horizons: int) -> Tensor:
    """
    What each position should have said, ``[B, T, K]`` float32 in units of its scale; NaN where the record it speaks
    about is not in the window or has no value.

    Matched by the clock, not by counting messages: position i and horizon j train on the record at clock n_i + j.
    """
    clock_BT = windows.clock_BT
    place_BT = torch.zeros_like(clock_BT)
    # Gaps longer than the horizons all look alike, so the grid of clocks stays small.
    torch.cumsum(clock_BT.diff(dim=1).clamp_(max=horizons + 1), 1, out=place_BT[:, 1:])
    length = int(place_BT[:, -1].max()) + 1 + horizons
    grid = torch.full((len(clock_BT), length), torch.nan, dtype=torch.float64, device=clock_BT.device)
    grid.scatter_(1, place_BT, windows.y_BT)
    # Row r is what stands at the grid's places r … r + K - 1, the windows' grids one behind the other.
    ahead_RK = grid.flatten().unfold(0, horizons, 1)
    first_B1 = length * torch.arange(len(clock_BT), device=clock_BT.device).unsqueeze(1)
    y_BTK = ahead_RK[(place_BT + 1 + first_B1).flatten()].view(*clock_BT.shape, horizons)
    scaled_BTK = y_BTK.sub_(windows.base_BT.unsqueeze(2)).div_(windows.scale_BT.unsqueeze(2))
    return scaled_BTK.clamp_(-TARGET_LIMIT, TARGET_LIMIT).float()


class Gradient(NamedTuple):
    """Mean loss per target, and its gradient ``[P]``."""

    loss: Tensor
    flat: Tensor


@torch.no_grad()
def gradient(flat: Tensor, shape: Shape, windows: Windows, loss: Loss) -> Gradient:
    """
    The masked loss over the targets that have arrived, and its gradient by BPTT over the whole window.

    ∂cₜ/∂cₜ₋₁ = fₜ is what carries the error back. With no target at all, loss and gradient are zero.
    """
    w = view(flat, shape)
    _, hidden, horizons = shape
    batch, steps = windows.clock_BT.shape
    unroll = _Unrolled(flat, shape, windows)
    unroll.forward()

    h_rows = unroll.h_TBH.reshape(-1, hidden)
    error_TBK = torch.addmm(w.head_bias, h_rows, w.head).view(steps, batch, horizons)
    error_TBK.sub_(targets(windows, horizons).transpose(0, 1))
    missing_TBK = error_TBK.isnan()
    # Every loss and its slope are zero there.
    error_TBK.masked_fill_(missing_TBK, 0)
    count = (missing_TBK.numel() - missing_TBK.sum()).clamp(min=1)
    value_TBK, slope_TBK = _loss_and_slope(error_TBK, loss)
    d_output = slope_TBK.div_(count).view(-1, horizons)

    out = torch.zeros_like(flat)
    d = view(out, shape)
    torch.mm(h_rows.t(), d_output, out=d.head)
    torch.sum(d_output, 0, out=d.head_bias)
    unroll.backward(torch.mm(d_output, w.head.t()).view(steps, batch, hidden), _with_bias(out, shape))
    return Gradient(value_TBK.sum() / count, out)


def _with_bias(flat: Tensor, shape: Shape) -> Tensor:
    """The gates' weights and, as the last row, their bias ``[F + H + 1, 4, H]``: they stand one behind the other."""
    f, hidden, _ = shape
    return flat[: (f + hidden + 1) * 4 * hidden].view(f + hidden + 1, 4, hidden)


class _Unrolled:
    """
    The network over T steps of B windows, with what its backward pass needs.

    One row a step: [s − ½, cₜ₋₁, i, f, s, o], where s = σ(2z) and the candidate is g = 2s − 1. The first three are what
    the cell's gradient is multiplied by for i, f and s, up to the constants in ``_CELL``; the last four are what the
    product with [xₜ, hₜ₋₁, 1] fills. All work of a step is done on its row while that is in the cache. Views are made
    once for all steps: making one costs as much as a small operation.
    """

    _PREACTIVATION = (1.0, 1.0, 2.0, 1.0)  # of 2z for the candidate
    _CELL = (2.0, 1.0, 4.0, 1.0)  # ∂c/∂i = 2(s − ½); ∂c/∂z = i·2·2σ′(2z)

    def __init__(self, flat: Tensor, shape: Shape, windows: Windows) -> None:
        f, hidden, _ = shape
        batch, steps = windows.clock_BT.shape
        self._weights = _with_bias(flat, shape)
        self._recurrent = slice(f, f + hidden)
        joined = torch.empty((steps + 1, batch, f + hidden + 1), device=flat.device)
        rows = torch.empty((steps + 1, batch, 6, hidden), device=flat.device)
        tanh_TBH = torch.empty((steps, batch, hidden), device=flat.device)
        h = joined[:, :, self._recurrent]
        joined[:steps, :, :f] = windows.x_BTF.transpose(0, 1)
        joined[:, :, -1] = 1
        h[0] = windows.h_BH
        rows[0, :, 1] = windows.c_BH
        self.h_TBH = h[1:]
        self._joined_T, self._h_T, self._tanh_T = joined.unbind(0), h.unbind(0), tanh_TBH.unbind(0)
        self._z_T, self._by_c_T = rows[:, :, 2:].flatten(2).unbind(0), rows[:, :, :3].unbind(0)
        self._g_T, self._c_T, self._i_T, self._f_T, self._s_T, self._o_T = (part.unbind(0) for part in rows.unbind(2))

    def forward(self) -> None:
        """Fill the rows, and ``h_TBH``."""
        weights = _times(self._weights, self._PREACTIVATION).flatten(1)
        g_T, c_T, i_T, f_T, s_T, o_T = self._g_T, self._c_T, self._i_T, self._f_T, self._s_T, self._o_T
        for t, tanh in enumerate(self._tanh_T):
            torch.mm(self._joined_T[t], weights, out=self._z_T[t]).sigmoid_()
            # c = f·c + i·g with g = 2(s − ½)
            torch.sub(s_T[t], 0.5, out=g_T[t])
            torch.mul(c_T[t], f_T[t], out=c_T[t + 1]).addcmul_(i_T[t], g_T[t], value=2)
            torch.tanh(c_T[t + 1], out=tanh)
            torch.mul(o_T[t], tanh, out=self._h_T[t + 1])

    def backward(self, d_h_TBH: Tensor, d_weights: Tensor) -> None:
        """
        From the gradient of the hidden states by the head, which is used up, that of weights and bias.
        ``d_weights`` comes in as zeros.

        With σ′ = σ − σ²; tanh′ = 1 − tanh², of which o·tanh² = h·tanh.
        """
        back = _times(self._weights[self._recurrent], self._CELL).flatten(1).t()
        flat_d_weights = d_weights.flatten(1)
        d_z = torch.empty_like(self._z_T[0])
        slope = torch.empty_like(d_z)
        d_c = torch.zeros_like(self._tanh_T[0])
        by_c, by_h = d_z.unflatten(1, (4, -1)).split([3, 1], 1)
        by_h, d_c_B1H = by_h.squeeze(1), d_c.unsqueeze(1)
        d_h_T = d_h_TBH.unbind(0)
        last = len(d_h_T) - 1
        for t in range(last, -1, -1):
            d_h, z = d_h_T[t], self._z_T[t]
            if t < last:
                d_h.addmm_(d_z, back)
            torch.mul(d_h, self._tanh_T[t], out=by_h)
            d_c.addcmul_(d_h, self._o_T[t]).addcmul_(by_h, self._h_T[t + 1], value=-1)
            torch.mul(self._by_c_T[t], d_c_B1H, out=by_c)
            torch.addcmul(z, z, z, value=-1, out=slope)
            d_z.mul_(slope)
            flat_d_weights.addmm_(self._joined_T[t].t(), d_z)
            d_c.mul_(self._f_T[t])
        d_weights.copy_(_times(d_weights, self._CELL))


def _times(gates: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Each gate's columns of ``[N, 4, H]`` by its factor."""
    return gates * torch.tensor(factors, device=gates.device).unsqueeze(1)


def _loss_and_slope(error: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Loss per element and its derivative. Huber's bend is at one unit of scale (Huber, 1964)."""
    if loss == "mse":
        return error * error, 2 * error
    if loss == "mae":
        return error.abs(), error.sign()
    clipped = error.clamp(-1, 1)
    return clipped * (error - clipped / 2), clipped


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one update did; ``loss`` and ``norm`` may be NaN or infinite when it was skipped."""

    loss: float
    norm: float
    clipped: bool
    skipped: bool
    rolled_back: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """The learning part of a configuration."""

    loss: Loss
    learning_rate: float
    clip_norm: float
    patience: int


class Learner:
    """
    Weights, Adam's moments, and the weights kept for the guard.

    The finite check stands before the optimizer step: an update whose loss or gradient is not finite changes nothing,
    and after ``patience`` of them in a row weights and moments go back to the last good ones kept inside the state. A
    skipped update keeps its number.
    """

    def __init__(self, shape: Shape, settings: Settings, seed: int, device: str) -> None:
        self.shape = shape
        self._settings = settings
        self._flat = initial(shape, seed).to(device)
        self._first, self._second = torch.zeros_like(self._flat), torch.zeros_like(self._flat)
        self.number = 0
        self._taken = 0
        self._skipped_in_row = 0
        self._kept = (self._flat.clone(), self._first.clone(), self._second.clone(), 0)

    def parameters(self) -> Prepared:
        """The current weights, as the forecast path takes them."""
        return prepare(view(self._flat, self.shape))

    def update(self, windows: Windows | None) -> Outcome:
        """
        One update of the next number. ``None`` (no usable window) counts and changes nothing.

        1. Gradient. 2. Finite check. 3. Clip to ``clip_norm``. 4. Adam (Kingma & Ba, 2015). 5. Keep, if it is time.
        """
        self.number += 1
        if windows is None:
            return Outcome(math.nan, 0.0, clipped=False, skipped=False, rolled_back=False)
        loss_T, grad = gradient(self._flat, self.shape, windows, self._settings.loss)
        loss, norm = torch.stack([loss_T, torch.linalg.vector_norm(grad)]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skipped_in_row += 1
            rolled_back = self._skipped_in_row >= self._settings.patience
            if rolled_back:
                self._roll_back()
            return Outcome(loss, norm, clipped=False, skipped=True, rolled_back=rolled_back)
        self._skipped_in_row = 0
        clipped = norm > self._settings.clip_norm
        if clipped:
            grad.mul_(self._settings.clip_norm / norm)
        self._adam(grad)
        state = (self._flat, self._first, self._second)
        if self.number % KEEP_EVERY == 0 and all(bool(tensor.isfinite().all()) for tensor in state):
            self._kept = (self._flat.clone(), self._first.clone(), self._second.clone(), self._taken)
        return Outcome(loss, norm, clipped=clipped, skipped=False, rolled_back=False)

    def _adam(self, grad: Tensor) -> None:
        self._taken += 1
        self._first.mul_(BETA1).add_(grad, alpha=1 - BETA1)
        self._second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        step = self._settings.learning_rate / (1 - BETA1**self._taken)
        root = self._second.sqrt().div_(math.sqrt(1 - BETA2**self._taken)).add_(EPSILON)
        # A new buffer, so that a snapshot may hold the old one.
        self._flat = self._flat.addcdiv(self._first, root, value=-step)

    def _roll_back(self) -> None:
        self._skipped_in_row = 0
        flat, first, second, self._taken = self._kept
        self._flat, self._first, self._second = flat.clone(), first.clone(), second.clone()

    def weights(self) -> dict[str, Tensor]:
        """Named copies of the parameters."""
        parameters = view(self._flat.clone(), self.shape)
        return {f"lstm.{name}": tensor for name, tensor in parameters._asdict().items()}

    def training(self) -> dict[str, Tensor]:
        """Named copies of the moments and of what the guard keeps."""
        kept_flat, kept_first, kept_second, _ = self._kept
        return {
            "lstm.first_moment": self._first.clone(),
            "lstm.second_moment": self._second.clone(),
            "lstm.kept.weights": kept_flat,
            "lstm.kept.first_moment": kept_first,
            "lstm.kept.second_moment": kept_second,
        }

    def counters(self) -> dict[str, int]:
        """What is left of the state: plain numbers."""
        return {
            "number": self.number,
            "taken": self._taken,
            "skipped_in_row": self._skipped_in_row,
            "kept_taken": self._kept[3],
        }

    def load(self, weights: dict[str, Tensor], training: dict[str, Tensor], counters: dict[str, int]) -> None:
        """
        Take over a saved state.

        Raises :class:`ValueError` naming the tensor that is missing or does not fit.
        """
        flat = torch.empty_like(self._flat)
        for name, place in view(flat, self.shape)._asdict().items():
            place.copy_(_fitting(weights, f"lstm.{name}", place))
        self._flat = flat
        loaded = {
            name: _fitting(training, f"lstm.{name}", self._first).to(flat.device, copy=True)
            for name in (
                "first_moment",
                "second_moment",
                "kept.weights",
                "kept.first_moment",
                "kept.second_moment",
            )
        }
        self._first, self._second = loaded["first_moment"], loaded["second_moment"]
        self._kept = (
            loaded["kept.weights"],
            loaded["kept.first_moment"],
            loaded["kept.second_moment"],
            counters["kept_taken"],
        )
        self.number, self._taken = counters["number"], counters["taken"]
        self._skipped_in_row = counters["skipped_in_row"]


def _fitting(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        what = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise ValueError(f"{name}: {what}, expected {like.dtype} {tuple(like.shape)}")
    return found
