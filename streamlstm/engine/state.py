"""
The state of one shard as a value: what a snapshot holds and a checkpoint stores.

It is generic on purpose: recovery stores names, dtypes, shapes and bytes, and knows no column by name.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from streamlstm.records.batch import SeriesId
from streamlstm.series.table import Rows, Slots, Snapshot, take_rows

_DIGESTED_AT_ONCE = 4096


class Stored(Protocol):
    """
    The series that are outside memory, as they were at the snapshot; read piece by piece, and often if need be.

    Each is there once, and none that the watermark has already proved forgotten. ``origin`` is the digest of the
    generation whose files hold those that had left by then, empty for none; ``until`` is up to where the watermark
    proves it (``None``: nobody is forgotten).
    """

    @property
    def origin(self) -> str:
        """See above."""
        ...

    @property
    def until(self) -> int | None:
        """See above."""
        ...

    def places(self) -> Sequence[tuple[str, int]]:
        """The partitions (topic, partition) that some of them may be of, sorted."""
        ...

    def rows(self, topic: str, partition: int) -> Iterator[Rows]:
        """Those of one partition, all with the same columns as the state's."""
        ...

    def close(self) -> None:
        """They will not be read any more."""
        ...


@dataclass(frozen=True, slots=True)
class RelaidStored:
    """Stored series with something done to each piece when it is read."""

    stored: Stored
    relay: Callable[[Rows], Rows]
    origin: str = ""

    @property
    def until(self) -> int | None:
        """See :class:`Stored`."""
        return self.stored.until

    def places(self) -> Sequence[tuple[str, int]]:
        """See :class:`Stored`."""
        return self.stored.places()

    def rows(self, topic: str, partition: int) -> Iterator[Rows]:
        """See :class:`Stored`."""
        return map(self.relay, self.stored.rows(topic, partition))

    def close(self) -> None:
        """See :class:`Stored`."""
        self.stored.close()


@dataclass(frozen=True, slots=True)
class EngineState:
    """
    Everything the next step depends on, besides the configuration. Immutable: nobody writes to its tensors.

    ``series[i]`` is the series whose values are row i of every column; ``columns[name]`` is the column in pieces,
    concatenated along dim 0 (the last one may have unused rows beyond ``len(series)``), and is read as a whole only
    where memory does not matter: :meth:`take` gives some rows. ``weights`` and ``training`` (moments, kept weights,
    queued windows) are named tensors. ``meta`` is JSON: counters, the queue's order, generators. ``stored`` are the
    series that are outside memory, if there are any. The order of series carries no meaning.
    """

    step: int
    series: tuple[SeriesId, ...]
    columns: Mapping[str, Sequence[Tensor]]
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    meta: dict[str, Any]
    stored: Stored | None = None

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

    def take_all(self, names: Iterable[str], rows: Slots) -> dict[str, Tensor]:
        """These rows of several columns, copies on the CPU."""
        if isinstance(self.columns, Snapshot):
            return self.columns.take_all(names, rows)
        return {name: self.take(name, rows) for name in names}

    def release(self, rows: Slots) -> None:
        """Nobody will read these rows of any column again: what was held for them may go."""
        if isinstance(self.columns, Snapshot):
            self.columns.release(rows)

    def column(self, name: str) -> Tensor:
        """One column over all series, of which there is one at least: ``[len(series), …]``, on the CPU."""
        return self.take(name, np.arange(len(self.series)))

    def digests(self) -> dict[str, str]:
        """
        SHA-256 (hex) of the weights, of all that training keeps, and of the series states.

        That of the series is over one digest per series, sorted: it knows no order of series, nor where they are kept.
        """
        digests = [digest for rows in self.rows() for digest in digest_rows(rows)]
        return {
            "weights": _digest(self.weights),
            "training": _digest(self.training),
            "series": hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
        }

    def rows(self) -> Iterator[Rows]:
        """Every series, in memory or stored, piece by piece."""
        for first in range(0, len(self.series), _DIGESTED_AT_ONCE):
            some = np.arange(first, min(first + _DIGESTED_AT_ONCE, len(self.series)))
            yield Rows(self.series[first : first + len(some)], self.take_all(self.columns, some))
        for place in self.stored.places() if self.stored else ():
            assert self.stored is not None
            yield from self.stored.rows(*place)


def digest_rows(rows: Rows) -> list[bytes]:
    """One SHA-256 per series: of who it is, and of its row of every column."""
    names = sorted(rows.columns)
    told = ";".join(f"{name}:{rows.columns[name].dtype}:{tuple(rows.columns[name].shape[1:])}" for name in names)
    digests: list[bytes] = []
    for one, row in zip(rows.series, pack(rows.columns), strict=True):
        sha = hashlib.sha256(f"{told}\n{one.topic}\0{one.partition}\0{one.key}\n".encode(errors="surrogatepass"))
        sha.update(row.tobytes())
        digests.append(sha.digest())
    return digests


Packed = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


def pack(columns: Mapping[str, Tensor]) -> Packed:
    """Rows as bytes ``[N, W]``: every column's part of a row, in the order of names."""
    return np.concatenate([_as_bytes(columns[name]) for name in sorted(columns)], axis=1)


def unpack(packed: Packed, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`pack`, for columns such as those of ``like``."""
    columns: dict[str, Tensor] = {}
    at = 0
    for name in sorted(like):
        shape, dtype = like[name].shape[1:], like[name].dtype
        width = math.prod(shape) * dtype.itemsize
        part = torch.from_numpy(packed[:, at : at + width].copy())
        columns[name] = part.view(-1).view(dtype).view(len(packed), *shape)
        at += width
    return columns


def _as_bytes(values: Tensor) -> Packed:
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
