"""
A generation as files: what is written into each, and how they are read back.

A file's hash is checked before it is parsed. What is parsed must have our shape to the last type, however right its
hash: else it is :class:`~streamlstm.errors.CheckpointError`, and an older generation is used.

Where generations live is another matter: :mod:`streamlstm.recovery.directory`, :mod:`streamlstm.recovery.objects`.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.engine.state import EngineState, RelaidStored, Stored
from streamlstm.errors import CheckpointError
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.leavers import FilesOfLeavers, LeaversPlan, Leaving
from streamlstm.recovery.manifest import (
    LAYOUT,
    MANIFEST,
    MANIFEST_LIMIT,
    Layout,
    Listed,
    Manifest,
    convert,
    digest_manifest,
    parse_manifest,
    well_formed,
)
from streamlstm.recovery.provenance import ColumnMeta, Generation, Meta, Provenance, meta_of
from streamlstm.recovery.snapshot import (
    Column,
    Place,
    Sink,
    canonical_json,
    file_name,
    group_by_place,
    join_series,
    parts_of,
    read_series,
    read_tensors,
    write_series,
    write_tensors,
)
from streamlstm.series.table import Slots
from streamlstm.transport.interfaces import Frozen

_META = "meta.json"
_MODEL = "model.pt"
_OPTIM = "optim.pt"
_BESIDE = "beside.json"
_BESIDE_ARRAYS = "beside.pt"
_BLOCK = 1 << 20


class Loaded(NamedTuple):
    """A generation and the state it holds."""

    generation: Generation
    state: EngineState
    beside: Frozen | None = None


class Readable(Protocol):
    """An open file."""

    def read(self, size: int, /) -> bytes:
        """The next ``size`` bytes, fewer only at the end."""
        ...


class Files(Protocol):
    """The files of one generation, wherever they are; ``readers`` of them may be read at the same time."""

    @property
    def readers(self) -> int:
        """See above."""
        ...

    def manifest(self) -> AbstractContextManager[Readable]:
        """Open the manifest. Raises :class:`~streamlstm.errors.CheckpointError` when it is not there."""
        ...

    def names(self, attempt: str) -> set[str]:
        """All names beside the manifest, or in its subdirectory ``attempt``; without the manifest's."""
        ...

    def open(self, attempt: str, name: str) -> AbstractContextManager[Readable]:
        """Open one. Raises :class:`~streamlstm.errors.CheckpointError` when it is no file or not there."""
        ...


class Header(NamedTuple):
    """A generation's two JSON files; ``sealed`` is the manifest as stored, ``raw`` the other in its own schema."""

    sealed: bytes
    manifest: Manifest
    meta: Meta
    raw: dict[str, Any]

    @property
    def files_left(self) -> tuple[Leaving, ...]:
        """The files of series beyond memory."""
        return self.meta.left.files if self.meta.left else ()

    @property
    def generation(self) -> Generation:
        """As they describe it."""
        meta, manifest = self.meta, self.manifest
        size = len(self.sealed) + sum(entry.bytes for entry in manifest.files.values())
        stored = meta.left.series if meta.left else 0
        made = meta.provenance(manifest.fingerprint)
        return Generation(meta.step, digest_manifest(self.sealed), size, meta.series, stored, made)


def read_header(files: Files, step: int, layout: Layout = LAYOUT) -> Header:
    """
    What a generation says of itself; no more of it is read than its two JSON files.

    Raises :class:`~streamlstm.errors.CheckpointError`, and :class:`NewerSchema` for a layout newer than ours.
    """
    with well_formed():
        with files.manifest() as file:
            sealed = file.read(MANIFEST_LIMIT + 1)
        manifest = parse_manifest(sealed, layout)
        if manifest.step != step:
            raise CheckpointError(f"{MANIFEST} is of step {manifest.step}")
        if not {_META, _MODEL, _OPTIM} <= set(manifest.files):
            raise CheckpointError(f"{MANIFEST} does not list {_META}, {_MODEL} and {_OPTIM}")
        raw: object = json.loads(_checked(files, manifest, _META))
        if not isinstance(raw, dict):
            raise CheckpointError(f"{_META} does not have the shape of a checkpoint")
        as_written = cast("dict[str, Any]", raw)
        current = as_written
        for schema in range(manifest.schema, layout.schema):
            current = layout.migrations[schema].meta(current)
        meta = convert(current, Meta, _META)
        if (meta.step, meta.config.hash) != (manifest.step, manifest.config):
            raise CheckpointError(f"{_META} and {MANIFEST} speak of different states")
        return Header(sealed, manifest, meta, as_written)


def verify_generation(files: Files, step: int, layout: Layout = LAYOUT) -> Generation:
    """Check every byte against the manifest; nothing is parsed but the two JSON files, nothing kept in memory."""
    header = read_header(files, step, layout)
    with well_formed():
        _check_names(files, header.manifest)
        for name, expected in sorted(header.manifest.files.items()):
            with files.open(header.manifest.attempt, name) as file:
                copy_file(name, file, expected)
    return header.generation


def load_generation(files: Files, step: int, layout: Layout = LAYOUT) -> Loaded:
    """Read a generation, each file's hash before it is parsed. Raises :class:`~streamlstm.errors.CheckpointError`."""
    header = read_header(files, step, layout)
    manifest = header.manifest
    with well_formed():
        _check_names(files, manifest)
        told = msgspec.convert(header.raw["columns"], dict[str, ColumnMeta | None])
        columns = {name: Column(column.dtype, column.shape) for name, column in told.items() if column is not None}
        with closing(_checked_ahead(files, manifest, _state_names(manifest))) as checked:
            series, joined = join_series((read_series(data, columns) for data in checked), columns)
        joined |= {name: [] for name, column in told.items() if column is None}
        if len(series) != header.raw["series"]:
            raise CheckpointError(f"{len(series)} series, and {_META} speaks of {header.raw['series']}")
        state = EngineState(
            step=step,
            series=series,
            columns=joined,
            weights=read_tensors(_checked(files, manifest, _MODEL)),
            training=read_tensors(_checked(files, manifest, _OPTIM)),
            meta=header.raw["state"],
        )
        stored: Stored | None = _stored(files, header, columns, series)
        for schema in range(manifest.schema, layout.schema):
            state = layout.migrations[schema].state(state)
            stored = RelaidStored(stored, layout.migrations[schema].rows) if stored is not None else None
        state = replace(state, stored=stored)
        beside = None
        if _BESIDE in manifest.files:
            values = json.loads(_checked(files, manifest, _BESIDE))
            beside = Frozen(values, _as_arrays(read_tensors(_checked(files, manifest, _BESIDE_ARRAYS))))
    return Loaded(header.generation, state, beside)


def _stored(
    files: Files, header: Header, columns: dict[str, Column], here: Sequence[SeriesId]
) -> FilesOfLeavers | None:
    """Who was beyond memory: every file's hash is checked now, and the file read when somebody asks."""
    manifest, left = header.manifest, header.meta.left
    if left is None:
        return None
    for file in left.files:
        with files.open(manifest.attempt, file.name) as opened:
            copy_file(file.name, opened, manifest.files[file.name])
    return FilesOfLeavers(
        left, columns, here, lambda name: files.open(manifest.attempt, name), digest_manifest(header.sealed)
    )


def _as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _as_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def files_of(
    state: EngineState, provenance: Provenance, beside: Frozen | None, leavers: LeaversPlan, *, last: bool
) -> dict[str, Callable[[Sink], object]]:
    """
    Every file but the manifest and those taken over, by name, with what writes it; in this order.

    ``last``: what was written of the state is let go of.
    """

    def write(sink: Sink, place: Place, rows: Slots) -> None:
        write_series(sink, state, place, rows)
        if last:
            state.release(rows)

    files: dict[str, Callable[[Sink], object]] = {}
    for place, all_rows in group_by_place(state.series).items():
        for part, rows in enumerate(parts_of(state, all_rows)):
            name = file_name("state", place, part=part)
            files[name] = lambda sink, place=place, rows=rows: write(sink, place, rows)
    files[_MODEL] = lambda sink: write_tensors(sink, state.weights)
    files[_OPTIM] = lambda sink: write_tensors(sink, state.training)
    files |= leavers.files
    # Once those before it were written: it says how many left.
    files[_META] = lambda sink: sink.write(canonical_json(meta_of(state, provenance, leavers.told())))
    if beside is not None:
        files[_BESIDE] = lambda sink: sink.write(canonical_json(beside.values))
        files[_BESIDE_ARRAYS] = lambda sink: write_tensors(sink, _as_tensors(beside.arrays))
    return files


def _check_names(files: Files, manifest: Manifest) -> None:
    there, listed = files.names(manifest.attempt), set(manifest.files)
    wrong = [f"{name} is missing" for name in sorted(listed - there)]
    wrong += [f"{name} is not listed" for name in sorted(there - listed)]
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _state_names(manifest: Manifest) -> Iterator[str]:
    return (name for name in sorted(manifest.files) if name.startswith("state-") and name.endswith(".parquet"))


def copy_file(name: str, file: Readable, expected: Listed, write: Callable[[bytes], object] | None = None) -> None:
    """Hash a file, and copy it if there is where to, without keeping it."""
    sha, size = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        sha.update(block)
        size += len(block)
        if write is not None:
            write(block)
    _compare(name, size, sha.hexdigest(), expected)


def _checked(files: Files, manifest: Manifest, name: str) -> bytes:
    """A file's bytes, which are those the manifest lists: what is parsed is what was checked."""
    expected = manifest.files[name]
    with files.open(manifest.attempt, name) as file:
        data = file.read(expected.bytes + 1)
    if len(data) > expected.bytes:
        raise CheckpointError(f"{name} is longer than {expected.bytes} bytes")
    _compare(name, len(data), hashlib.sha256(data).hexdigest(), expected)
    return data


def _checked_ahead(files: Files, manifest: Manifest, names: Iterable[str]) -> Generator[bytes]:
    """The bytes of several; the next ones are read and hashed while one is parsed."""
    with ThreadPoolExecutor(files.readers, "checkpoint-read") as readers:
        coming: deque[Future[bytes]] = deque()
        for name in names:
            coming.append(readers.submit(_checked, files, manifest, name))
            if len(coming) > files.readers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _compare(name: str, size: int, sha256: str, expected: Listed) -> None:
    if size != expected.bytes:
        raise CheckpointError(f"{name} has {size} bytes instead of {expected.bytes}")
    if sha256 != expected.sha256:
        raise CheckpointError(f"{name} is damaged: its SHA-256 is not the manifest's")
