"""
The series table: one row per series, in columns, in chunks.

The first chunk grows by doubling up to :data:`FIRST_ROWS` rows, so that one series with long horizons does not take the
room of a thousand; each further one is as long as all before it, and its rows are made ready piece by piece. So nothing
that is large is ever copied to make room, and rows all over the table lie in few chunks.

Axes: S slots (rows of the table), N rows of a selection (slots may repeat), R entries of a ring.
"""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.records.batch import SeriesId

FIRST_ROWS = 1024

Slots = NDArray[np.int64]

# Rows that a snapshot makes room for in one go. On the CPU only what is used of them takes memory.
_ROWS_ASIDE = 4096

_NOT_ASIDE = -1
_RELEASED = -2


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

    slots: Slots
    parts: tuple[_Part, ...]

    @property
    def size(self) -> int:
        """N."""
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class Rows:
    """The states of some series on their way out of a table or back into one: a row of every column each."""

    series: tuple[SeriesId, ...]
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.series)

    def pick(self, chosen: Slots) -> "Rows":
        """Some of them."""
        picked = torch.from_numpy(chosen)
        return Rows(tuple(self.series[i] for i in chosen), {n: values[picked] for n, values in self.columns.items()})


class Snapshot(Mapping[str, Sequence[Tensor]]):
    """
    The columns of a table as they were at one moment, read while the table goes on; taking it copies nothing.

    It shares the table's chunks. Whoever is about to write to rows has their values put aside here first
    (:meth:`keep`), once per row; whoever reads rows copies them from the chunks and *then* replaces those that were put
    aside by what was put aside. No lock is needed, because of the order: a row is put aside before it is written to, so
    a reader who met a row half written finds the whole one put aside. It may be read often, by any one thread beside
    the writing one, and stops costing anything when nobody holds it any more. Rows that were read for the last time are
    given back (:meth:`release`): they are put aside no more, and their room is used again.

    As a mapping it gives whole columns, each in one piece, on the CPU; they are kept.
    """

    def __init__(self, chunks: Mapping[str, Sequence[Tensor]], slots: Slots, size: int) -> None:
        self._chunks = {name: list(parts) for name, parts in chunks.items()}
        self._slots = slots
        self._whole: dict[str, Tensor] = {}
        self._done = False
        # Of each slot: where it was put aside, or one of the two below.
        self._aside_of = np.full(size, _NOT_ASIDE, np.int64)
        self._aside: dict[str, list[Tensor]] = {name: [] for name in self._chunks}
        self._free: deque[Slots] = deque()

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __getitem__(self, name: str) -> Sequence[Tensor]:
        if not self._chunks[name]:
            return []
        if name not in self._whole:
            self._whole[name] = self.take(name, np.arange(len(self._slots)))
            self._done = len(self._whole) == len(self)
        return [self._whole[name]]

    @property
    def put_aside(self) -> int:
        """How many rows there is room for that was needed so far."""
        return sum(len(piece) for piece in next(iter(self._aside.values()), []))

    def like(self, name: str) -> Tensor | None:
        """No rows of a column: dtype and shape. ``None`` while the table has no room for a row."""
        return self._chunks[name][0][:0] if self._chunks[name] else None

    def take(self, name: str, rows: Slots) -> Tensor:
        """These rows of a column, a copy on the CPU."""
        return self.take_all([name], rows)[name]

    def take_all(self, names: Iterable[str], rows: Slots) -> dict[str, Tensor]:
        """These rows of several columns, copies on the CPU."""
        slots = self._slots[rows]
        chosen = _pieces(_lengths(self._chunks), slots)
        whole = torch.from_numpy(rows)
        taken = {
            name: self._whole[name][whole]
            if name in self._whole
            else _copy_rows(self._chunks[name], chosen, len(slots)).cpu()
            for name in names
        }
        aside = self._aside_of[slots]
        assert not (aside == _RELEASED).any(), "rows that were given back are not read again"
        here = np.flatnonzero(aside >= 0)
        if len(here):
            kept = _pieces(_lengths(self._aside), aside[here])
            for name, values in taken.items():
                if name not in self._whole:
                    values.numpy()[here] = _copy_rows(self._aside[name], kept, len(here)).cpu().numpy()
        return taken

    def release(self, rows: Slots) -> None:
        """These rows will not be read again. By the thread that reads."""
        slots = self._slots[rows]
        aside = self._aside_of[slots]
        # A row that is being put aside right now keeps its room to the end: no more than that is lost.
        self._aside_of[slots] = _RELEASED
        self._free.append(aside[aside >= 0])

    def keep(self, slots: Slots) -> None:
        """Put aside what is in these rows, unless it was before: they are about to be written to."""
        if self._done:
            return
        slots = slots[slots < len(self._aside_of)]
        slots = np.unique(slots[self._aside_of[slots] == _NOT_ASIDE])
        if len(slots):
            room = self._room_for(len(slots))
            source, target = _pieces(_lengths(self._chunks), slots), _pieces(_lengths(self._aside), room)
            for name, chunks in self._chunks.items():
                _put_rows(self._aside[name], target, _copy_rows(chunks, source, len(slots)))
            self._aside_of[slots] = room

    def _room_for(self, count: int) -> Slots:
        """As many rows to put something aside in, in ascending order."""
        found: list[Slots] = []
        while (missing := count - sum(map(len, found))) > 0:
            if not self._free:
                self._free.append(self._more_room())
            free = self._free.popleft()
            found.append(free[:missing])
            if missing < len(free):
                self._free.appendleft(free[missing:])
        return np.sort(np.concatenate(found))

    def _more_room(self) -> Slots:
        first = self.put_aside
        for name, pieces in self._aside.items():
            like = self._chunks[name][0]
            pieces.append(_room_like(like, _ROWS_ASIDE))
        return np.arange(first, first + _ROWS_ASIDE)


class SeriesTable:
    """
    Named columns over slots. A slot is given to a series when it is first seen, and to another once it was removed.

    Values go in and come out as tensors on the column's device. Slots carry no meaning: no result depends on which
    series sits where. A slot that is free holds the fill values.
    """

    def __init__(self, columns: Iterable[Column], device: str) -> None:
        self._columns = {column.name: column for column in columns}
        self._device = torch.device(device)
        self._homes = {
            name: torch.device("cpu") if column.host else self._device for name, column in self._columns.items()
        }
        self._kinds = sorted({home.type for home in self._homes.values()})
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in self._columns}
        self._ready = 0
        self._free: list[int] = []
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self.series: list[SeriesId | None] = []
        self.slot_of: dict[SeriesId, int] = {}

    def __len__(self) -> int:
        return len(self.slot_of)

    def add(self, series: SeriesId) -> int:
        """A new series' slot; its columns hold their fill values."""
        if self._free:
            slot = self._free.pop()
            self.series[slot] = series
        else:
            slot = len(self.series)
            if slot == self._ready:
                self._grow()
            self.series.append(series)
        self.slot_of[series] = slot
        return slot

    def put(self, rows: Rows) -> None:
        """Series that are not here, with the states they had."""
        selection = self.select(np.array([self.add(one) for one in rows.series], np.int64))
        for name, values in rows.columns.items():
            self.scatter(name, selection, values.to(self._homes[name]))

    def take(self, slots: Slots) -> Rows:
        """These series leave with their states, on the CPU."""
        selection = self.select(slots)
        series = tuple(one for slot in slots.tolist() if (one := self.series[slot]) is not None)
        rows = Rows(series, {name: self.gather(name, selection).cpu() for name in sorted(self._columns)})
        self.remove(slots)
        return rows

    def remove(self, slots: Slots) -> None:
        """These series leave; their slots are free, and blank."""
        selection = self.select(slots)
        for name, column in self._columns.items():
            self.fill(name, selection, column.fill)
        for slot in slots.tolist():
            series = self.series[slot]
            assert series is not None, "a free slot cannot be freed"
            del self.slot_of[series]
            self.series[slot] = None
        self._free += slots.tolist()

    def _grow(self) -> None:
        """More rows ready. What a snapshot holds stays as it is."""
        ready = self._ready
        more = max(1, min(ready, FIRST_ROWS))
        chunk, row = chunk_and_row(ready)
        for name, chunks in self._chunks.items():
            if ready < FIRST_ROWS:
                chunks[:] = [torch.cat([*chunks, self.blank(name, more)])]
            else:
                if row == 0:
                    chunks.append(self._room(name, ready))
                chunks[chunk][row : row + more] = self._columns[name].fill
        self._ready += more

    def _room(self, name: str, size: int) -> Tensor:
        """``size`` rows that hold anything: of a large piece only what is used takes memory."""
        column, home = self._columns[name], self._homes[name]
        return _room(size, column.shape, column.dtype) if home.type == "cpu" else self.blank(name, size)

    def blank(self, name: str, size: int) -> Tensor:
        """``size`` rows of a column as a new series has them."""
        column = self._columns[name]
        return torch.full((size, *column.shape), column.fill, dtype=column.dtype, device=self._homes[name])

    def select(self, slots: Slots) -> Selection:
        """Resolve slots to chunks."""
        if len(slots) == 0:
            return Selection(slots, ())
        chunk_of, rows = _chunks_and_rows(slots)
        if (chunk_of == chunk_of[0]).all():
            return Selection(slots, (_Part(int(chunk_of[0]), self._placed(None), self._rows(rows)),))
        parts: list[_Part] = []
        for chunk in np.unique(chunk_of):
            places = np.flatnonzero(chunk_of == chunk)
            parts.append(_Part(int(chunk), self._placed(places), self._rows(rows[places])))
        return Selection(slots, tuple(parts))

    def gather(self, name: str, selection: Selection) -> Tensor:
        """Rows of a column: ``[N, …]``, a copy."""
        kind, chunks = self._homes[name].type, self._chunks[name]
        if len(selection.parts) == 1:
            part = selection.parts[0]
            return chunks[part.chunk].index_select(0, part.rows[kind])
        out = self._room(name, selection.size)
        for part in selection.parts:
            out[part.places[kind]] = chunks[part.chunk].index_select(0, part.rows[kind])
        return out

    def scatter(self, name: str, selection: Selection, values: Tensor) -> None:
        """Write ``values [N, …]`` to the rows of a column; slots must not repeat."""
        self._before_writing(selection)
        kind, chunks = self._homes[name].type, self._chunks[name]
        for part in selection.parts:
            places = part.places[kind]
            chunks[part.chunk].index_copy_(0, part.rows[kind], values if places is None else values[places])

    def fill(self, name: str, selection: Selection, value: float) -> None:
        """Write one value to whole rows of a column."""
        self._before_writing(selection)
        kind, chunks = self._homes[name].type, self._chunks[name]
        for part in selection.parts:
            chunks[part.chunk].index_fill_(0, part.rows[kind], value)

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
        self._before_writing(selection)
        kind, chunks = self._homes[name].type, self._chunks[name]
        for part in selection.parts:
            here, chunk = part.places[kind], chunks[part.chunk]
            index = _flat(chunk, part.rows[kind], place if here is None else place[here])
            flat = chunk.view(-1, *chunk.shape[2:])
            source = values if here is None else values[here]
            flat.index_copy_(0, index.reshape(-1), source.reshape(-1, *chunk.shape[2:]))

    def count_above(self, name: str, bound: int) -> int:
        """How many rows have more than ``bound`` in a scalar host column, free ones with their fill value included."""
        return sum(int(np.count_nonzero(values > bound)) for _, values in self._scalars(name))

    def at_most(self, name: str, bound: int) -> Slots:
        """The slots of series that have ``bound`` or less in a scalar host column."""
        found = [start + np.flatnonzero(values <= bound) for start, values in self._scalars(name)]
        slots = np.concatenate(found) if found else np.empty(0, np.int64)
        if self._free:
            slots = slots[~np.isin(slots, self._free)]
        return slots

    def _scalars(self, name: str) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """A scalar host column, chunk by chunk, with the slot each begins at."""
        at, end = 0, len(self.series)
        for chunk in self._chunks[name]:
            values = chunk.numpy()[: end - at]
            yield at, values
            at += len(values)

    def snapshot(self) -> tuple[tuple[SeriesId, ...], Snapshot]:
        """The series, and their columns as they are now. Nothing is copied but names."""
        if self._free:
            series, slots = tuple(self.slot_of), np.fromiter(self.slot_of.values(), np.int64, len(self.slot_of))
        else:
            series, slots = tuple(one for one in self.series if one is not None), np.arange(len(self.series))
        taken = Snapshot(self._chunks, slots, len(self.series))
        self._snapshots.append(weakref.ref(taken))
        return series, taken

    def load(self, series: Iterable[SeriesId], columns: Mapping[str, Sequence[Tensor]]) -> None:
        """
        Fill an empty table from columns in pieces of any length; whole again, whatever they were.

        Raises :class:`ValueError` naming the column whose presence, dtype or shape is not this table's.
        """
        assert not self.series, "only an empty table is loaded"
        if columns.keys() != self._columns.keys():
            odd = sorted(columns.keys() ^ self._columns.keys())
            raise ValueError(f"series columns differ: {', '.join(odd)}")
        for one in series:
            self.add(one)
        for name, column in self._columns.items():
            pieces = columns[name]
            for piece in pieces:
                if piece.dtype != column.dtype or tuple(piece.shape[1:]) != column.shape:
                    raise ValueError(
                        f"series column {name}: {piece.dtype} of {tuple(piece.shape[1:])} does not fit "
                        f"{column.dtype} of {column.shape}"
                    )
            if sum(map(len, pieces)) < len(self):
                raise ValueError(f"series column {name}: {sum(map(len, pieces))} rows for {len(self)} series")
            at = 0
            for piece in pieces:
                rows = piece[: len(self) - at]
                while len(rows):
                    chunk, row = chunk_and_row(at)
                    room = self._chunks[name][chunk][row : row + len(rows)]
                    room.copy_(rows[: len(room)])
                    rows = rows[len(room) :]
                    at += len(room)

    def _before_writing(self, selection: Selection) -> None:
        """Let every snapshot that somebody still holds put aside what is about to change."""
        if self._snapshots:
            held = [(ref, snapshot) for ref in self._snapshots if (snapshot := ref()) is not None]
            for _, snapshot in held:
                snapshot.keep(selection.slots)
            self._snapshots = [ref for ref, _ in held]

    def _rows(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        on_host = torch.from_numpy(np.ascontiguousarray(rows))
        return {kind: on_host if kind == "cpu" else on_host.to(self._device) for kind in self._kinds}

    def _placed(self, places: NDArray[np.int64] | None) -> dict[str, Tensor | None]:
        if places is None:
            return dict.fromkeys(self._kinds)
        return dict(self._rows(places))


def chunk_and_row(slot: int) -> tuple[int, int]:
    """
    Where a slot lies.

    >>> [chunk_and_row(slot) for slot in (0, 1023, 1024, 2047, 2048, 4095, 4096)]
    [(0, 0), (0, 1023), (1, 0), (1, 1023), (2, 0), (2, 2047), (3, 0)]
    """
    chunk = (slot // FIRST_ROWS).bit_length()
    return chunk, slot - (FIRST_ROWS << chunk - 1 if chunk else 0)


def _chunks_and_rows(slots: Slots) -> tuple[Slots, Slots]:
    chunk_of = np.frexp((slots // FIRST_ROWS).astype(np.float64))[1].astype(np.int64)
    return chunk_of, slots - np.where(chunk_of > 0, FIRST_ROWS << np.maximum(chunk_of - 1, 0), 0)


def take_rows(pieces: Sequence[Tensor], rows: Slots) -> Tensor:
    """These rows of a column that lies in pieces of any length: a copy, where the column is."""
    return _take_rows(pieces, _pieces([len(piece) for piece in pieces], rows), len(rows))


class _Piece(NamedTuple):
    """The rows of some that lie in one piece: which of those, and which rows of it."""

    number: int
    where: Slots | slice
    rows: Slots


def _lengths(columns: Mapping[str, Sequence[Tensor]]) -> list[int]:
    """The lengths of the pieces, which are the same for all columns."""
    return [len(piece) for piece in next(iter(columns.values()))]


def _pieces(lengths: Sequence[int], rows: Slots) -> list[_Piece]:
    ends = np.cumsum(lengths)
    piece_of = np.searchsorted(ends, rows, side="right")
    found: list[_Piece] = []
    for number in np.unique(piece_of):
        where = np.flatnonzero(piece_of == number)
        first, last = int(where[0]), int(where[-1])
        # In one go where they lie together: rows in the order of slots always do.
        together = last - first == len(where) - 1
        start = int(ends[number]) - lengths[number]
        found.append(_Piece(int(number), slice(first, last + 1) if together else where, rows[where] - start))
    return found


def _take_rows(pieces: Sequence[Tensor], chosen: Sequence[_Piece], count: int) -> Tensor:
    like = pieces[0]
    taken = like.new_empty((count, *like.shape[1:]))
    for piece in chosen:
        rows = torch.from_numpy(piece.rows).to(like.device)
        taken[_on(like, piece.where)] = pieces[piece.number].index_select(0, rows)
    return taken


def _copy_rows(pieces: Sequence[Tensor], chosen: Sequence[_Piece], count: int) -> Tensor:
    """
    As :func:`_take_rows`. On the CPU by numpy: torch lets go of the interpreter in every small operation, and whoever
    runs beside the loop waits to have it back, and then the loop does.
    """
    if pieces[0].device.type != "cpu":
        return _take_rows(pieces, chosen, count)
    like = pieces[0].numpy()
    taken = np.empty((count, *like.shape[1:]), like.dtype)
    for number, where, rows in chosen:
        source = pieces[number].numpy()
        if isinstance(where, slice):
            source.take(rows, axis=0, out=taken[where], mode="clip")
        else:
            taken[where] = source.take(rows, axis=0)
    return torch.from_numpy(taken)


def _put_rows(pieces: Sequence[Tensor], chosen: Sequence[_Piece], values: Tensor) -> None:
    """The inverse of :func:`_copy_rows`; no row may repeat."""
    for number, where, rows in chosen:
        piece = pieces[number]
        if piece.device.type == "cpu":
            piece.numpy()[rows] = values.numpy()[where]
        else:
            piece.index_copy_(0, torch.from_numpy(rows).to(piece.device), values[_on(piece, where)])


def _on(like: Tensor, rows: Slots | slice) -> Tensor | slice:
    return rows if isinstance(rows, slice) else torch.from_numpy(rows).to(like.device)


def _room_like(like: Tensor, count: int) -> Tensor:
    """Rows of a column that hold anything."""
    shape = tuple(like.shape[1:])
    return _room(count, shape, like.dtype) if like.device.type == "cpu" else like.new_empty((count, *shape))


def _room(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU, holding anything; untouched, unlike torch's, which deterministic algorithms fill."""
    count = size * math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty((size, *shape), dtype=dtype)
    return torch.from_numpy(np.empty(count, np.uint8)).view(dtype).view(size, *shape)


def _flat(chunk: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """Index of (row, place) in the chunk with its first two axes flattened."""
    width = chunk.shape[1]
    return rows * width + place if place.dim() == 1 else (rows * width).unsqueeze(1) + place


def _entries(chunk: Tensor, index: Tensor) -> Tensor:
    if chunk.dim() == 2:
        return torch.take(chunk, index)
    flat = chunk.view(-1, *chunk.shape[2:])
    return flat.index_select(0, index.reshape(-1)).view(*index.shape, *chunk.shape[2:])
