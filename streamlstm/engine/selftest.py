"""
What this machine computes, told in one digest; and whether it keeps the promise that a row's bits are its own.

A fingerprint names versions and instruction sets, and a golden step shows what they come to: two machines that differ
in name only agree on it, and one whose library was swapped under the same version does not. That rows of a tile do not
depend on each other was measured where this was written (see :mod:`streamlstm.learning.cells`); elsewhere it is looked
at, in the shapes that the deployment uses.

Axes: N rows, F features, H hidden units, K horizons.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.learning.cells import Cell, head, tile_rows
from streamlstm.learning.model import Prepared, Shape, initial, prepare, view
from streamlstm.records.batch import Range, RecordBatch, SeriesId

_SERIES = 3
_RECORDS = 66
_STEP_NS = 10_000_000_000

Forward = Callable[[Prepared, Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From parameters, inputs and carries of N rows to what the network makes of each."""


def golden_step(device: str) -> str:
    """SHA-256 (hex) of what a small engine gives and becomes over a fixed stream with a few updates."""
    engine = Engine.create(_golden_config(), device)
    reports = [engine.step(_golden_batch(first, first + _RECORDS // 2)) for first in (0, _RECORDS // 2)]
    assert reports[-1].updates, "it would not show how the machine learns"
    sha = hashlib.sha256()
    for report in reports:
        sha.update(report.digest())
    for name, digest in sorted(engine.state().digests().items()):
        sha.update(f"{name}:{digest};".encode())
    return sha.hexdigest()


def dependent_rows(shape: Shape, device: str, forward: Forward | None = None) -> list[str]:
    """
    What of the network gives a row other bits at another place of a tile or beside other rows; nothing, where all is
    well. Computed in the deployment's shape, with as many threads as it has.
    """
    forward = forward or _forward(shape, device)
    rows = 2 * tile_rows(torch.device(device)) + 3
    generator = torch.Generator().manual_seed(17)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    flat = initial(shape, 17)
    view(flat, shape).head.uniform_(-1, 1, generator=generator)
    parameters = prepare(view(flat.to(device), shape))
    x_NF, h_NH, c_NH = numbers(rows, shape.features), numbers(rows, shape.hidden).tanh(), numbers(rows, shape.hidden)
    expected = forward(parameters, x_NF, h_NH, c_NH)
    found: set[str] = set()
    every = torch.arange(rows, device=device)
    for chosen in (every.flip(0), every.roll(5), every[1::2], every[:1], every[7:14]):
        given = forward(parameters, x_NF[chosen], h_NH[chosen], c_NH[chosen])
        found |= {name for name, values in given.items() if not torch.equal(values, expected[name][chosen])}
    # The same row among others that are as far from it as numbers go.
    beside = x_NF * 1e6
    beside[3] = x_NF[3]
    given = forward(parameters, beside, h_NH, c_NH)
    found |= {name for name, values in given.items() if not torch.equal(values[3], expected[name][3])}
    return sorted(found)


def _forward(shape: Shape, device: str) -> Forward:
    cell = Cell(shape.features, shape.hidden, torch.device(device))

    def forward(parameters: Prepared, x_NF: Tensor, h_NH: Tensor, c_NH: Tensor) -> dict[str, Tensor]:
        h, c, _ = cell.run(parameters, x_NF, h_NH, c_NH, [len(x_NF)])
        return {"hidden state": h, "cell state": c, "head": head(parameters, h, shape.horizons)}

    return forward


def _golden_config() -> Config:
    return Config.model_validate(
        {
            "source": {"type": "files"},
            "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
            "model": {"hidden_size": 24, "horizons": 3, "season": 4},
            "training": {"k1": 4, "k2": 8, "batch_series": 3, "max_wait": 40},
        }
    )


def _golden_batch(start: int, end: int) -> RecordBatch:
    """Numbers that no library takes part in: integers, divided by powers of two."""
    at = np.arange(start, end)
    count = end - start
    return RecordBatch(
        cut=(Range("golden", 0, start, end),),
        series=tuple(SeriesId("golden", 0, str(i)) for i in range(_SERIES)),
        code=(at % _SERIES).astype(np.int32),
        range_index=np.zeros(count, np.int32),
        offset=at.astype(np.int64),
        row=np.zeros(count, np.int32),
        time_ns=(at // _SERIES * _STEP_NS).astype(np.int64),
        broker_ns=np.full(count, -1, np.int64),
        target=((at * 7919 + at * at * 31) % 997 / 64).astype(np.float64),
    )
