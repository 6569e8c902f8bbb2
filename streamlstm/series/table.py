"""
The series table: one row per series, in columns, in chunks.

A chunk holds up to :data:`CHUNK_ROWS` rows of one column; the last one grows by doubling, so that one series with long
horizons does not take the room of a thousand. A snapshot takes references to the chunks and freezes them; whoever
writes to a frozen chunk clones it first, so a snapshot costs nothing and never changes (copy-on-write).

Axes: S slots (rows of the table), N rows of a selection (slots may repeat), R entries of a ring.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.records.batch import SeriesId

CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Column:
    """What one column holds per series. ``host`` columns stay on the CPU whatever the device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0
    host: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a selection that lie in one chunk: where in the selection (``None`` = all), and which rows."""

    chunk: int
    places: dict[str, Tensor | None]
    rows: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Selection:
    """N slots, resolved to chunks once and used for many columns."""

    size: int
    parts: tuple[_Part, ...]


class SeriesTable:
    """
    Named columns over slots. A slot is given to a series when it is first seen and keeps its place for good.

    Values go in and come out as tensors on the column's device. Slots carry no meaning: no result depends on which
    series sits where.
    """

    def __init__(self, columns: Iterable[Column], device: str) -> None:
        self._columns = {column.name: column for column in columns}
        self._device = torch.device(device)
        self._homes = {
            name: torch.device("cpu") if column.host else self._device for name, column in self._columns.items()
        }
        self._kinds = sorted({home.type for home in self._homes.values()})
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in self._columns}
        self._frozen: set[tuple[str, int]] = set()
        self.series: list[SeriesId] = []
        self.slot_of: dict[SeriesId, int] = {}

    def __len__(self) -> int:
        return len(self.series)

    def add(self, series: SeriesId) -> int:
        """A new series' slot; its columns hold their fill values."""
        slot = len(self.series)
        row = slot % CHUNK_ROWS
        if row & (row - 1) == 0:
            self._grow(row)
        self.series.append(series)
        self.slot_of[series] = slot
        return slot

    def _grow(self, rows: int) -> None:
        """Room for twice the ``rows`` of the last chunk, or a new one. What a snapshot holds stays as it is."""
        for name, chunks in self._chunks.items():
            if rows == 0:
                chunks.append(self.blank(name, 1))
            else:
                self._frozen.discard((name, len(chunks) - 1))
                chunks[-1] = torch.cat([chunks[-1], self.blank(name, rows)])

    def blank(self, name: str, size: int) -> Tensor:
        """``size`` rows of a column as a new series has them."""
        column = self._columns[name]
        return torch.full((size, *column.shape), column.fill, dtype=column.dtype, device=self._homes[name])

    def select(self, slots: NDArray[np.int64]) -> Selection:
        """Resolve slots to chunks."""
        if len(slots) == 0:
            return Selection(0, ())
        chunk_of = slots // CHUNK_ROWS
        rows = slots % CHUNK_ROWS
        if chunk_of[0] == chunk_of[-1] and (chunk_of == chunk_of[0]).all():
            return Selection(len(slots), (_Part(int(chunk_of[0]), self._placed(None), self._rows(rows)),))
        parts: list[_Part] = []
        for chunk in np.unique(chunk_of):
            places = np.flatnonzero(chunk_of == chunk)
            parts.append(_Part(int(chunk), self._placed(places), self._rows(rows[places])))
        return Selection(len(slots), tuple(parts))

    def gather(self, name: str, selection: Selection) -> Tensor:
        """Rows of a column: ``[N, …]``, a copy."""
        kind, chunks = self._homes[name].type, self._chunks[name]
        if len(selection.parts) == 1:
            part = selection.parts[0]
            return chunks[part.chunk].index_select(0, part.rows[kind])
        out = self.blank(name, selection.size)
        for part in selection.parts:
            out[part.places[kind]] = chunks[part.chunk].index_select(0, part.rows[kind])
        return out

    def scatter(self, name: str, selection: Selection, values: Tensor) -> None:
        """Write ``values [N, …]`` to the rows of a column; slots must not repeat."""
        kind = self._homes[name].type
        for part in selection.parts:
            places = part.places[kind]
            chunk = self._writable(name, part.chunk)
            chunk.index_copy_(0, part.rows[kind], values if places is None else values[places])

    def fill(self, name: str, selection: Selection, value: float) -> None:
        """Write one value to whole rows of a column."""
        kind = self._homes[name].type
        for part in selection.parts:
            self._writable(name, part.chunk).index_fill_(0, part.rows[kind], value)

    def gather_at(self, name: str, selection: Selection, place: Tensor) -> Tensor:
        """Entries of a ring column ``[S, R, …]`` at ``place [N]`` or ``[N, J]`` of each row: ``[N, (J,) …]``."""
        kind, chunks = self._homes[name].type, self._chunks[name]
        if len(selection.parts) == 1:
            part = selection.parts[0]
            return _entries(chunks[part.chunk], _flat(chunks[part.chunk], part.rows[kind], place))
        column = self._columns[name]
        shape = (*place.shape, *column.shape[1:])
        out = torch.empty(shape, dtype=column.dtype, device=self._homes[name])
        for part in selection.parts:
            here = part.places[kind]
            out[here] = _entries(chunks[part.chunk], _flat(chunks[part.chunk], part.rows[kind], place[here]))
        return out

    def scatter_at(self, name: str, selection: Selection, place: Tensor, values: Tensor) -> None:
        """Write entries of a ring column; no (slot, place) may repeat. Shapes as in :meth:`gather_at`."""
        kind = self._homes[name].type
        for part in selection.parts:
            here = part.places[kind]
            chunk = self._writable(name, part.chunk)
            index = _flat(chunk, part.rows[kind], place if here is None else place[here])
            flat = chunk.view(-1, *chunk.shape[2:])
            source = values if here is None else values[here]
            flat.index_copy_(0, index.reshape(-1), source.reshape(-1, *chunk.shape[2:]))

    def count_above(self, name: str, bound: int) -> int:
        """How many series have more than ``bound`` in a scalar host column."""
        left, total = len(self.series), 0
        for chunk in self._chunks[name]:
            total += int(np.count_nonzero(chunk.numpy()[:left] > bound))
            left -= CHUNK_ROWS
        return total

    def freeze(self) -> dict[str, list[Tensor]]:
        """The chunks as they are now. They will not change: later writes go to clones."""
        self._frozen = {(name, i) for name, chunks in self._chunks.items() for i in range(len(chunks))}
        return {name: list(chunks) for name, chunks in self._chunks.items()}

    def load(self, series: Iterable[SeriesId], columns: dict[str, list[Tensor]]) -> None:
        """
        Fill an empty table from chunks as :meth:`freeze` gave them, of any length; whole again, whatever they were.

        Raises :class:`ValueError` naming the column whose presence, dtype or shape is not this table's.
        """
        assert not self.series, "only an empty table is loaded"
        if columns.keys() != self._columns.keys():
            odd = sorted(columns.keys() ^ self._columns.keys())
            raise ValueError(f"series columns differ: {', '.join(odd)}")
        for one in series:
            self.add(one)
        for name, column in self._columns.items():
            values = torch.cat(columns[name]) if columns[name] else torch.empty((0, *column.shape), dtype=column.dtype)
            if values.dtype != column.dtype or tuple(values.shape[1:]) != column.shape or len(values) < len(self):
                raise ValueError(
                    f"series column {name}: {values.dtype} {tuple(values.shape)} does not fit "
                    f"{column.dtype} {(len(self), *column.shape)}"
                )
            for i, chunk in enumerate(self._chunks[name]):
                rows = values[i * CHUNK_ROWS : min((i + 1) * CHUNK_ROWS, len(self))]
                chunk[: len(rows)] = rows.to(chunk.device)

    def _writable(self, name: str, index: int) -> Tensor:
        chunks = self._chunks[name]
        if self._frozen and (name, index) in self._frozen:
            self._frozen.discard((name, index))
            chunks[index] = chunks[index].clone()
        return chunks[index]

    def _rows(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        on_host = torch.from_numpy(np.ascontiguousarray(rows))
        return {kind: on_host if kind == "cpu" else on_host.to(self._device) for kind in self._kinds}

    def _placed(self, places: NDArray[np.int64] | None) -> dict[str, Tensor | None]:
        if places is None:
            return dict.fromkeys(self._kinds)
        return dict(self._rows(places))


def _flat(chunk: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """Index of (row, place) in the chunk with its first two axes flattened."""
    width = chunk.shape[1]
    return rows * width + place if place.dim() == 1 else (rows * width).unsqueeze(1) + place


def _entries(chunk: Tensor, index: Tensor) -> Tensor:
    if chunk.dim() == 2:
        return torch.take(chunk, index)
    flat = chunk.view(-1, *chunk.shape[2:])
    return flat.index_select(0, index.reshape(-1)).view(*index.shape, *chunk.shape[2:])
