"""
The state of one shard as a value: what a snapshot holds and a checkpoint stores.

It is generic on purpose: recovery stores names, dtypes, shapes and bytes, and knows no column by name.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from streamlstm.records.batch import SeriesId
from streamlstm.series.table import Slots, Snapshot, take_rows

_DIGESTED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class EngineState:
    """
    Everything the next step depends on, besides the configuration. Immutable: nobody writes to its tensors.

    ``series[i]`` is the series whose values are row i of every column; ``columns[name]`` is the column in pieces,
    concatenated along dim 0 (the last one may have unused rows beyond ``len(series)``), and is read as a whole only
    where memory does not matter: :meth:`take` gives some rows. ``weights`` and ``training`` (moments, kept weights,
    queued windows) are named tensors. ``meta`` is JSON: counters, the queue's order, generators. The order of series
    carries no meaning.
    """

    step: int
    series: tuple[SeriesId, ...]
    columns: Mapping[str, Sequence[Tensor]]
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    meta: dict[str, Any]

    def like(self, name: str) -> Tensor | None:
        """No rows of a column: dtype and shape. ``None`` while it has no piece at all."""
        if isinstance(self.columns, Snapshot):
            return self.columns.like(name)
        return self.columns[name][0][:0] if self.columns[name] else None

    def take(self, name: str, rows: Slots) -> Tensor:
        """These rows of a column, a copy on the CPU."""
        if isinstance(self.columns, Snapshot):
            return self.columns.take(name, rows)
        return take_rows(self.columns[name], rows).cpu()

    def column(self, name: str) -> Tensor:
        """One column over all series, of which there is one at least: ``[len(series), …]``, on the CPU."""
        return self.take(name, np.arange(len(self.series)))

    def digests(self) -> dict[str, str]:
        """
        SHA-256 (hex) of the weights, of all that training keeps, and of the series states.

        That of the series is over one digest per series, sorted: it knows no order of series, nor where they are kept.
        """
        rows: list[bytes] = []
        for first in range(0, len(self.series), _DIGESTED_AT_ONCE):
            some = np.arange(first, min(first + _DIGESTED_AT_ONCE, len(self.series)))
            rows += digest_rows(self.series[first : first + len(some)], {n: self.take(n, some) for n in self.columns})
        return {
            "weights": _digest(self.weights),
            "training": _digest(self.training),
            "series": hashlib.sha256(b"".join(sorted(rows))).hexdigest(),
        }


def digest_rows(series: Sequence[SeriesId], columns: Mapping[str, Tensor]) -> list[bytes]:
    """One SHA-256 per series: of who it is, and of its row of every column."""
    names = sorted(columns)
    told = ";".join(f"{name}:{columns[name].dtype}:{tuple(columns[name].shape[1:])}" for name in names).encode()
    packed = pack({name: columns[name] for name in names})
    digests: list[bytes] = []
    for one, row in zip(series, packed, strict=True):
        sha = hashlib.sha256(told + b"\n" + "\0".join(map(str, one)).encode(errors="surrogatepass") + b"\n")
        sha.update(row.tobytes())
        digests.append(sha.digest())
    return digests


def pack(columns: Mapping[str, Tensor]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Rows as bytes ``[N, W]``: every column's part of a row, in the order of names."""
    return np.concatenate([_as_bytes(columns[name]) for name in sorted(columns)], axis=1)


def _as_bytes(values: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """``[N, …]`` as ``[N, bytes of a row]``."""
    flat = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(len(values), math.prod(values.shape[1:]) * values.dtype.itemsize)


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
