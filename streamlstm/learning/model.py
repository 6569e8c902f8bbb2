"""
The network: one LSTM layer and a direct head for every horizon, all parameters in one flat buffer.

One buffer makes the clip one norm, Adam one expression, a snapshot one clone. The LSTM has a single bias:
``nn.LSTM`` has two, which under Adam doubles the effective step of the bias and counts it twice in the norm.

Axes: F features, H hidden units, K horizons.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """The network's axes."""

    features: int
    hidden: int
    horizons: int

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        f, h, k = self
        return (f + h + 1) * 4 * h + (h + 1) * k


class Parameters(NamedTuple):
    """
    Views into one flat buffer.

    ``gates [F + H, 4H]`` maps input and hidden state to the pre-activations of the input and forget gates,
    the candidate and the output gate, in this order; ``gate_bias [4H]``; ``head [H, K]`` and ``head_bias [K]``.
    """

    gates: Tensor
    gate_bias: Tensor
    head: Tensor
    head_bias: Tensor


def view(flat: Tensor, shape: Shape) -> Parameters:
    """The parameters inside a flat buffer ``[P]``: no copy."""
    f, h, k = shape
    gates, gate_bias, head, head_bias = flat.split([(f + h) * 4 * h, 4 * h, h * k, k])
    return Parameters(gates.view(f + h, 4 * h), gate_bias, head.view(h, k), head_bias)


def initial(shape: Shape, seed: int) -> Tensor:
    """
    Fresh weights ``[P]`` float32 on the CPU, from a generator of their own.

    Uniform within ±1/√H, the forget gate's bias at 1 so that memory is kept at first (Jozefowicz et al., 2015), the
    head at zero: the network starts as the naive forecast.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(shape.hidden)
    flat = torch.empty(shape.parameters).uniform_(-bound, bound, generator=generator)
    parameters = view(flat, shape)
    parameters.gate_bias.zero_()
    parameters.gate_bias[shape.hidden : 2 * shape.hidden] = 1
    parameters.head.zero_()
    parameters.head_bias.zero_()
    return flat


class Prepared(NamedTuple):
    """
    Parameters as the forward pass takes them: a copy, made once per update.

    The candidate's pre-activation is doubled, because tanh(z) = 2σ(2z) − 1 lets one sigmoid do for all four gates.
    Columns are padded with zeros to a multiple of 16: for 5, 6, 7, 9, 10 or 11 columns the library gives a row of a
    product other bits at another place of the tile, for multiples of 16 it does not.
    """

    gates: Tensor
    gate_bias: Tensor
    head: Tensor
    head_bias: Tensor


COLUMNS = 16


def prepare(parameters: Parameters) -> Prepared:
    """From the weights as they are learnt."""
    hidden = len(parameters.head)
    gates, gate_bias = _padded(parameters.gates), _padded(parameters.gate_bias)
    gates[:, 2 * hidden : 3 * hidden].mul_(2)
    gate_bias[2 * hidden : 3 * hidden].mul_(2)
    return Prepared(gates, gate_bias, _padded(parameters.head), _padded(parameters.head_bias))


def _padded(tensor: Tensor) -> Tensor:
    """A copy, its last axis lengthened by zeros to a multiple of 16."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % COLUMNS)).clone()
