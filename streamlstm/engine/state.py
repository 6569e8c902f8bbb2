"""
The state of one shard as a value: what a snapshot holds and a checkpoint stores.

It is generic on purpose: recovery stores names, dtypes, shapes and bytes, and knows no column by name.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from streamlstm.records.batch import SeriesId


@dataclass(frozen=True, slots=True)
class EngineState:
    """
    Everything the next step depends on, besides the configuration. Immutable: nobody writes to its tensors.

    ``series[i]`` is the series whose values are row i of every column; ``columns[name]`` is the column as a list
    of chunks, concatenated along dim 0 (the last one may have unused rows beyond ``len(series)``). ``weights`` and
    ``training`` (moments, kept weights, queued windows) are named tensors. ``meta`` is JSON: counters, the queue's
    order, generators. The order of series carries no meaning.
    """

    step: int
    series: tuple[SeriesId, ...]
    columns: dict[str, list[Tensor]]
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    meta: dict[str, Any]

    def column(self, name: str) -> Tensor:
        """One column over all series, of which there is one at least: ``[len(series), …]``, on the CPU."""
        return torch.cat([chunk.cpu() for chunk in self.columns[name]])[: len(self.series)]

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of the weights, of all that training keeps, and of the series states sorted by series."""
        order = sorted(range(len(self.series)), key=lambda i: self.series[i])
        states = hashlib.sha256()
        for i in order:
            states.update("\0".join(map(str, self.series[i])).encode() + b"\n")
        picked = torch.tensor(order, dtype=torch.int64)
        for name in sorted(self.columns) if order else ():
            _feed(states, name, self.column(name)[picked])
        return {
            "weights": _digest(self.weights),
            "training": _digest(self.training),
            "series": states.hexdigest(),
        }


class _Sha(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        _feed(sha, name, tensors[name])
    return sha.hexdigest()


def _feed(sha: _Sha, name: str, tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous()
    sha.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
    sha.update(data.numpy().tobytes())
