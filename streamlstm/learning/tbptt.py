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
    # Gaps longer than the horizons all look alike, so the grid of clocks stays small.
    leap_BT = clock_BT.diff(dim=1).clamp(max=horizons + 1)
    place_BT = torch.cat([torch.zeros_like(clock_BT[:, :1]), leap_BT.cumsum(1)], 1)
    length = int(place_BT[:, -1].max()) + 1 + horizons
    grid = torch.full((len(clock_BT), length), torch.nan, dtype=torch.float64, device=clock_BT.device)
    grid.scatter_(1, place_BT, windows.y_BT)
    ahead_K = torch.arange(1, horizons + 1, device=clock_BT.device)
    index = (place_BT.unsqueeze(2) + ahead_K).flatten(1)
    y_BTK = grid.gather(1, index).view(*clock_BT.shape, horizons)
    scaled_BTK = (y_BTK - windows.base_BT.unsqueeze(2)) / windows.scale_BT.unsqueeze(2)
    return scaled_BTK.clamp(-TARGET_LIMIT, TARGET_LIMIT).float()


class Gradient(NamedTuple):
    """Mean loss per target, and its gradient ``[P]``."""

    loss: Tensor
    flat: Tensor


@torch.no_grad()
def gradient(flat: Tensor, shape: Shape, windows: Windows, loss: Loss) -> Gradient:  # noqa: PLR0915, because forward and backward mirror each other
    """
    The masked loss over the targets that have arrived, and its gradient by BPTT over the whole window.

    ∂cₜ/∂cₜ₋₁ = fₜ is what carries the error back. With no target at all, loss and gradient are zero.
    """
    w = view(flat, shape)
    f, hidden, horizons = shape
    fast = prepare(w)
    x_TBF = windows.x_BTF.transpose(0, 1)
    steps, batch = x_TBF.shape[0], x_TBF.shape[1]

    # Forward. Views are made once for all steps: making one costs as much as a small operation.
    gates = torch.matmul(x_TBF, fast.gates[:f, : 4 * hidden]).add_(fast.gate_bias[: 4 * hidden])
    z_T = gates.unbind(0)
    i_TBH, keep_TBH, candidate_TBH, o_TBH = gates.split(hidden, 2)
    i_T, keep_T, s_T, o_T = i_TBH.unbind(0), keep_TBH.unbind(0), candidate_TBH.unbind(0), o_TBH.unbind(0)
    h_TBH = torch.empty((steps + 1, batch, hidden), device=flat.device)
    c_TBH, tanh_TBH = torch.empty_like(h_TBH), torch.empty_like(h_TBH)
    h_TBH[0], c_TBH[0] = windows.h_BH, windows.c_BH
    h_T, c_T, tanh_T = h_TBH.unbind(0), c_TBH.unbind(0), tanh_TBH.unbind(0)
    recurrent, scratch = fast.gates[f:, : 4 * hidden], torch.empty_like(c_T[0])
    for t in range(steps):
        z_T[t].addmm_(h_T[t], recurrent).sigmoid_()
        # c = f·c + i·g with g = 2s − 1
        torch.sub(s_T[t], 0.5, out=scratch)
        torch.mul(c_T[t], keep_T[t], out=c_T[t + 1]).addcmul_(i_T[t], scratch, value=2)
        torch.tanh(c_T[t + 1], out=tanh_T[t + 1])
        torch.mul(o_T[t], tanh_T[t + 1], out=h_T[t + 1])

    # Head and loss.
    h_rows = h_TBH[1:].reshape(-1, hidden)
    output_TBK = torch.addmm(w.head_bias, h_rows, w.head).view(steps, batch, horizons)
    error_TBK = output_TBK - targets(windows, horizons).transpose(0, 1)
    here_TBK = ~error_TBK.isnan()
    count = here_TBK.sum().clamp(min=1)
    value_TBK, slope_TBK = _loss_and_slope(error_TBK, loss)
    total = torch.where(here_TBK, value_TBK, 0).sum() / count
    d_output = (torch.where(here_TBK, slope_TBK, 0) / count).view(-1, horizons)

    out = torch.zeros_like(flat)
    d = view(out, shape)
    torch.mm(h_rows.t(), d_output, out=d.head)
    torch.sum(d_output, 0, out=d.head_bias)

    # Backward: all factors that do not depend on the error first, in bulk. σ' = σ(1 − σ); g = 2σ(2z) − 1 has 4σ(1 − σ).
    slopes = (1 - gates).mul_(gates).view(steps, batch, 4, hidden)
    slopes[:, :, 0].mul_(2 * candidate_TBH - 1)
    slopes[:, :, 1].mul_(c_TBH[:-1])
    slopes[:, :, 2].mul_(4 * i_TBH)
    slopes[:, :, 3].mul_(tanh_TBH[1:])
    into_c_T = ((1 - tanh_TBH[1:].square()).mul_(o_TBH)).unbind(0)
    d_h_T = torch.mm(d_output, w.head.t()).view(steps, batch, hidden).unbind(0)
    d_z = torch.empty_like(gates)
    d_z_T = d_z.unbind(0)
    by_c, by_h = d_z.view(steps, batch, 4, hidden).split([3, 1], 2)
    by_c_T, by_h_T = by_c.unbind(0), by_h.squeeze(2).unbind(0)
    slopes_c_T, slopes_h_T = slopes[:, :, :3].unbind(0), slopes[:, :, 3].unbind(0)
    back = w.gates[f:].t()
    d_c = torch.zeros_like(c_T[0])
    d_c_B1H = d_c.unsqueeze(1)
    for t in range(steps - 1, -1, -1):
        if t + 1 < steps:
            d_h_T[t].addmm_(d_z_T[t + 1], back)
        d_c.addcmul_(d_h_T[t], into_c_T[t])
        torch.mul(slopes_c_T[t], d_c_B1H, out=by_c_T[t])
        torch.mul(slopes_h_T[t], d_h_T[t], out=by_h_T[t])
        d_c.mul_(keep_T[t])
    rows = d_z.view(-1, 4 * hidden)
    torch.mm(x_TBF.reshape(-1, f).t(), rows, out=d.gates[:f])
    torch.mm(h_TBH[:-1].reshape(-1, hidden).t(), rows, out=d.gates[f:])
    torch.sum(rows, 0, out=d.gate_bias)
    return Gradient(total, out)


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
