"""
An engine state as files, and back: series as Parquet, by partition; named tensors as `.pt`; the rest as JSON.

Knows no column by name. Whoever reads has checked the bytes first (:mod:`streamlstm.recovery.checkpoint`).

What is done here in Python for each series is done for a few at a time, with a rest in between (:func:`_gently`): it
runs beside the loop, which otherwise waits for the interpreter at each of its many small operations.
"""

import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, BinaryIO, NamedTuple, Protocol, cast
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError
from streamlstm.records.batch import SeriesId
from streamlstm.series.table import Rows, Slots

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("streamlstm stores tensors as little-endian rows, and this machine is big-endian")

# What a file holds at most: bounds what a checkpoint takes beside the snapshot itself, some six times as much where
# the disk is slow, and lets a reader check one file while it parses another. The memory for a larger one would come
# anew from the kernel each time; smaller ones ask for the interpreter more often.
_FILE_BYTES = 30 << 20
_FILE_ROWS = 8192

# Short enough to be copied twice and summed within a processor's own cache: saves a fifth of the time.
_PAGE_BYTES = 128 << 10
_BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20

# Series whose names are handled in one go, about 1 ms, and how long others may have the interpreter then.
_AT_ONCE = 4096
_REST_S = 0.003

_METADATA = b"streamlstm"

# One number per series has a type of its own, so that other tools can read it; a tensor per series is a row of bytes.
_NATIVE: dict[torch.dtype, pa.DataType] = {
    torch.bool: pa.bool_(),
    torch.uint8: pa.uint8(),
    torch.int8: pa.int8(),
    torch.int16: pa.int16(),
    torch.int32: pa.int32(),
    torch.int64: pa.int64(),
    torch.float32: pa.float32(),
    torch.float64: pa.float64(),
}


_LONGEST_TOPIC = 180  # of a file name's 255 bytes


class Sink(Protocol):
    """Where bytes go, in order."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take all of ``data``, which does not change any more."""
        ...


class Place(NamedTuple):
    """One partition."""

    topic: str
    partition: int


class Column(NamedTuple):
    """What one series has of a column: dtype and shape of its row."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch calls it."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"a column of type {self.dtype!r} is not known here")
        return found

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def arrow(self) -> pa.DataType:
        """As Parquet holds it."""
        native = _NATIVE.get(self.torch_dtype) if not self.shape else None
        return native or pa.binary(self.width)


def file_name(kind: str, place: Place, step: int | None = None, part: int = 0) -> str:
    """A name safe for any topic; the file itself says which one it is. Parts after the first have a number."""
    topic = quote(place.topic, safe="")
    if len(topic) > _LONGEST_TOPIC:
        topic = f"{topic[:_LONGEST_TOPIC]}~{hashlib.sha256(place.topic.encode()).hexdigest()[:16]}"
    return f"{kind}-{topic}-{place.partition}{'' if step is None else f'-{step}'}{f'.{part}' if part else ''}.parquet"


def describe_columns(state: EngineState) -> dict[str, Column]:
    """Every column's row, by name, but those that have no piece yet; needed again where there is no series yet."""
    return {
        name: Column(str(like.dtype).removeprefix("torch."), tuple(like.shape[1:]))
        for name in sorted(state.columns)
        if (like := state.like(name)) is not None
    }


def group_by_place(series: Sequence[SeriesId]) -> dict[Place, Slots]:
    """Row numbers of the series of each partition, sorted by key; partitions sorted too."""
    groups: dict[tuple[str, int], list[int]] = {}
    for first in _gently(len(series)):
        for i, (topic, partition, _) in enumerate(series[first : first + _AT_ONCE], first):
            groups.setdefault((topic, partition), []).append(i)
    return {Place(*place): _by_key(series, groups[place]) for place in sorted(groups)}


def _by_key(series: Sequence[SeriesId], rows: Sequence[int]) -> Slots:
    pieces = [_keys(series[i] for i in rows[first : first + _AT_ONCE]) for first in _gently(len(rows))]
    order = pc.call_function("sort_indices", [pa.chunked_array(pieces, pa.string())])
    return np.asarray(rows, np.int64)[order.to_numpy()]


def parts_of(state: EngineState, rows: Slots) -> list[Slots]:
    """The rows of a partition in as many parts as there are to be files."""
    width = sum(column.width for column in describe_columns(state).values())
    size = max(1, min(_FILE_ROWS, _FILE_BYTES // max(1, width)))
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def write_series(sink: Sink, state: EngineState, place: Place, rows: Slots) -> None:
    """One Parquet file: a row per series of ``place``, in the order of ``rows``; page checksums on."""
    sink.write(_encode_series(state, place, rows))


def _encode_series(state: EngineState, place: Place, rows: Slots) -> memoryview:
    """Nothing but the file itself is held while it waits to be written."""
    columns = describe_columns(state)
    values = state.take_all([name for name, column in columns.items() if column.width], rows)
    series = tuple(
        chain.from_iterable([state.series[i] for i in rows[first : first + _AT_ONCE]] for first in _gently(len(rows)))
    )
    table = _to_table(place, columns, Rows(series, values))
    # In memory first, and room for all of it at once: so pyarrow asks for the interpreter once and not for every page.
    room = np.empty(_most_bytes(table), np.uint8)
    made = pa.FixedSizeBufferWriter(pa.py_buffer(room))
    _write_parquet(made, table.schema, [table])
    return room.data[: made.tell()]


def _gently(count: int) -> Iterator[int]:
    """The beginnings of pieces of so many names, with a rest between two."""
    for first in range(0, count, _AT_ONCE):
        if first:
            time.sleep(_REST_S)
        yield first


def _keys(series: Iterable[SeriesId]) -> pa.Array:
    return pa.array([one.key for one in series], pa.string())


def write_rows(sink: Sink, place: Place, columns: dict[str, Column], pieces: Iterable[Rows]) -> int:
    """One Parquet file of series of ``place``, a row group for each piece; page checksums on. How many there were."""
    tables = (_to_table(place, columns, rows) for rows in pieces)
    with pa.BufferedOutputStream(pa.PythonFile(_Stream(sink), mode="w"), _BUFFER_BYTES) as target:
        return _write_parquet(target, _schema(place, columns), tables)


def _to_table(place: Place, columns: dict[str, Column], rows: Rows) -> pa.Table:
    arrays: list[pa.Array] = [_keys(rows.series)]
    arrays += [_to_arrow(rows.columns[name], column) for name, column in columns.items() if column.width]
    return pa.Table.from_arrays(arrays, schema=_schema(place, columns))


def _write_parquet(target: pa.NativeFile, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    written = 0
    with pq.ParquetWriter(
        target,
        schema,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        write_batch_size=_BATCH_ROWS,
        data_page_size=_PAGE_BYTES,
    ) as writer:
        for table in tables:
            if len(table):
                writer.write_table(table, row_group_size=len(table))
            written += len(table)
    return written


def _most_bytes(table: pa.Table) -> int:
    """
    What a file of it takes at most.

    Beside the values: four bytes to make a small number a large one; the schema in three spellings; and for each column
    its description, and the headers of pages, of which all but the last hold as much as a page should.
    """
    values = table.nbytes + 4 * table.num_rows * table.num_columns
    return values + values // 1024 + 4 * table.schema.serialize().size + 4096 * (table.num_columns + 1)


def read_rows(file: BinaryIO, columns: dict[str, Column]) -> Iterator[Rows]:
    """
    A file of :func:`write_rows`, a piece at a time.

    Raises :class:`~streamlstm.errors.CheckpointError` when it is not what ``columns`` promise.
    """
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        place = _place_of(parquet.schema_arrow)
        _check_schema(parquet.schema_arrow, place, columns)
        for group in range(parquet.num_row_groups):
            keys, values = _values_of(parquet.read_row_group(group, use_threads=False), columns)
            yield Rows(tuple(SeriesId(*place, key) for key in keys), values)
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(f"not a state file: {error}") from error


def read_series(data: bytes, columns: dict[str, Column]) -> tuple[Place, list[str], dict[str, Tensor]]:
    """
    Place, keys and columns of one file.

    Raises :class:`~streamlstm.errors.CheckpointError` when it is not what ``columns`` promise.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(f"not a state file: {error}") from error
    place = _place_of(table.schema)
    _check_schema(table.schema, place, columns)
    return place, *_values_of(table, columns)


def _place_of(schema: pa.Schema) -> Place:
    try:
        told = json.loads((schema.metadata or {})[_METADATA])
        return Place(str(told["topic"]), int(told["partition"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"not a state file: {error}") from error


def _check_schema(schema: pa.Schema, place: Place, columns: dict[str, Column]) -> None:
    if not schema.equals(_schema(place, columns)):
        raise CheckpointError("the columns of a state file are not those meta.json lists")


def _values_of(table: pa.Table, columns: dict[str, Column]) -> tuple[list[str], dict[str, Tensor]]:
    keys = cast("list[str]", table.column("key").to_pylist())
    return keys, {
        name: _from_arrow(table.column(name), column) if column.width else _empty(len(keys), column)
        for name, column in columns.items()
    }


def join_series(
    parts: Iterable[tuple[Place, list[str], dict[str, Tensor]]], columns: dict[str, Column]
) -> tuple[tuple[SeriesId, ...], dict[str, list[Tensor]]]:
    """The series of all partitions, and their columns in as many chunks; one empty chunk where there are none."""
    series: list[SeriesId] = []
    joined: dict[str, list[Tensor]] = {name: [] for name in columns}
    for place, keys, values in parts:
        series.extend(map(SeriesId, repeat(place.topic), repeat(place.partition), keys))
        for name in columns:
            joined[name].append(values[name])
    for name, column in columns.items():
        if not joined[name]:
            joined[name].append(_empty(0, column))
    return tuple(series), joined


def write_tensors(sink: Sink, tensors: dict[str, Tensor]) -> None:
    """Named tensors as torch writes them; on the CPU, and each with no more storage than its own."""
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # In memory first: a process that ends while torch waits for whoever writes would not end well.
    made = io.BytesIO()
    torch.save(own, made)
    sink.write(made.getvalue())


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Named tensors. Never runs code from the file, never falls back to a reader that would."""
    try:
        loaded: object = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"not a tensor file: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError("a tensor file does not hold named tensors")
    named = cast("dict[object, object]", loaded)
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named.items()):
        raise CheckpointError("a tensor file does not hold named tensors")
    return cast("dict[str, Tensor]", named)


def canonical_json(value: Any) -> bytes:  # noqa: ANN401, because it is any JSON
    """JSON with one spelling: keys sorted, no spaces. Raises ``ValueError`` for NaN, which JSON does not have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class _Stream:
    """What pyarrow and torch ask of a file they only write to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._at = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        kept = data if isinstance(data, bytes) else bytes(data)
        self._sink.write(kept)
        self._at += len(kept)
        return len(kept)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _schema(place: Place, columns: dict[str, Column]) -> pa.Schema:
    """A column whose rows have no bytes is not stored."""
    columns = {name: column for name, column in columns.items() if column.width}
    if "key" in columns:
        raise CheckpointError("a column may not be called key")
    told = {
        "topic": place.topic,
        "partition": place.partition,
        "columns": {name: {"dtype": c.dtype, "shape": list(c.shape)} for name, c in columns.items()},
    }
    fields = [pa.field("key", pa.string(), nullable=False)]
    fields += [pa.field(name, column.arrow(), nullable=False) for name, column in columns.items()]
    return pa.schema(fields, metadata={_METADATA: canonical_json(told)})


def _to_arrow(rows: Tensor, column: Column) -> pa.Array:
    if not column.shape and column.torch_dtype in _NATIVE:
        return pa.array(rows.numpy(), column.arrow(), from_pandas=False)
    raw = rows.contiguous().view(torch.uint8).numpy()
    return pa.FixedSizeBinaryArray.from_buffers(column.arrow(), len(rows), [None, pa.py_buffer(raw)])


def _from_arrow(values: pa.ChunkedArray, column: Column) -> Tensor:
    if not column.shape and column.torch_dtype in _NATIVE:
        return torch.from_numpy(np.array(values.to_numpy()))
    rows = np.empty((len(values), column.width), np.uint8)
    for at, chunk in _with_offsets(values.chunks):
        raw = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * column.width, chunk.offset * column.width)
        rows[at : at + len(chunk)] = raw.reshape(len(chunk), column.width)
    return torch.from_numpy(rows).reshape(-1).view(column.torch_dtype).reshape(len(values), *column.shape)


def _with_offsets(chunks: Sequence[pa.Array]) -> Iterator[tuple[int, pa.Array]]:
    at = 0
    for chunk in chunks:
        yield at, chunk
        at += len(chunk)


def _empty(rows: int, column: Column) -> Tensor:
    return torch.empty((rows, *column.shape), dtype=column.torch_dtype)
