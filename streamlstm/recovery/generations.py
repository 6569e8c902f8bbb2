"""
What a generation is: files, a manifest over them, and what they say of where the state stands.

``MANIFEST.json`` holds length and SHA-256 of every other file and of itself, and is written last: a generation without
one does not exist, and no byte of one that is read goes unchecked. A file's hash is checked before it is parsed. What
is parsed must have our shape to the last type, however right its hash: else it is
:class:`~streamlstm.errors.CheckpointError`, and an older generation is used.

Where generations live is another matter: :mod:`streamlstm.recovery.directory`, :mod:`streamlstm.recovery.objects`.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Protocol, Self, TypeVar, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.config.keys import config_hash, identity_values, learning_values
from streamlstm.config.model import Config
from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError
from streamlstm.records.batch import Range, SeriesId
from streamlstm.recovery.leavers import FilesOfLeavers, LeaversPlan, Leaving, Left
from streamlstm.recovery.progress import Link, Value
from streamlstm.recovery.snapshot import (
    Column,
    Place,
    Sink,
    canonical_json,
    describe_columns,
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
from streamlstm.transport.interfaces import Frozen, LeaderEpochs, Position

MANIFEST = "MANIFEST.json"

_META = "meta.json"
_MODEL = "model.pt"
_OPTIM = "optim.pt"
_BESIDE = "beside.json"
_BESIDE_ARRAYS = "beside.pt"
MANIFEST_LIMIT = 64 << 20
_BLOCK = 1 << 20

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_FileName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._~%-]*\Z", max_length=255)]


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration as far as state hangs on it: its hash, and the keys whose change matters, by dotted name."""

    name: str
    hash: str
    identity: Mapping[str, Value]
    learning: Mapping[str, Value]

    @classmethod
    def of(cls, config: Config) -> Self:
        """Of a configuration."""
        return cls(config.name, config_hash(config), identity_values(config), learning_values(config))


@dataclass(frozen=True, slots=True)
class Provenance:
    """
    Where a state stands: in the input (``positions``), in the progress chain, and under which configuration.

    ``progress`` is the record that ends with the state's step, ``None`` for a generation 0 that precedes the chain.
    ``incarnation`` is the process that computed it, empty for generation 0. ``revision`` counts the branches of the
    chain up to here, and ``excluded`` are the ranges that they pass over: both survive the chain's trimming.
    ``leader_epochs`` are those of the last messages before the positions, where they are known.
    """

    lineage: str
    incarnation: str
    positions: tuple[Position, ...]
    topic_ids: Mapping[str, str]
    progress: Link | None
    settings: Settings
    fingerprint: Mapping[str, str]
    created_ms: int
    revision: int = 0
    excluded: tuple[Range, ...] = ()
    leader_epochs: LeaderEpochs = field(default_factory=dict[tuple[str, int], int])


@dataclass(frozen=True, slots=True)
class Generation:
    """
    One checkpoint that is whole. ``digest`` is that of its manifest, and so of every byte in it.

    ``series`` are in memory, ``stored`` beyond it.
    """

    step: int
    digest: str
    bytes: int
    series: int
    stored: int
    provenance: Provenance


class Loaded(NamedTuple):
    """A generation and the state it holds."""

    generation: Generation
    state: EngineState
    beside: Frozen | None = None


@dataclass(frozen=True, slots=True)
class Migration:
    """From one schema to the next: what becomes of ``meta.json``, and of the state once it was read by the old one."""

    meta: Callable[[dict[str, Any]], dict[str, Any]]
    state: Callable[[EngineState], EngineState]


class Layout(NamedTuple):
    """
    The schema that is written, and how each older one is brought up to it: ``migrations[n]`` leads from n to n + 1.

    For ever, so that any version can say what it found: the manifest's own shape, and in ``meta.json`` the ``columns``
    and the number of ``series``, by which the state files are read.
    """

    schema: int
    migrations: Mapping[int, Migration]


LAYOUT = Layout(1, {})


class NewerSchema(CheckpointError):
    """Written by a newer version: to be refused, not to be called bad."""


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the manifest says of a file."""

    bytes: _Count
    sha256: _Sha256


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``MANIFEST.json``. ``attempt`` is the subdirectory that the files stand in, empty where they stand beside it."""

    schema: int
    step: _Count
    attempt: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{16})?\Z")] = ""
    config: str
    fingerprint: dict[str, str]
    files: dict[_FileName, Listed]
    sha256: _Sha256


class _Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topic: str
    partition: _Count
    next_offset: _Count
    leader_epoch: int | None


class _Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    offset: _Count
    digest: str


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    hash: str
    identity: dict[str, Any]
    learning: dict[str, Any]


class _Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[_Count, ...]


class _Meta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``meta.json``."""

    step: _Count
    series: _Count
    created_ms: _Count
    lineage: str
    incarnation: str
    revision: _Count
    excluded: tuple[tuple[str, _Count, _Count, _Count], ...]
    positions: tuple[_Position, ...]
    topic_ids: dict[str, str]
    progress: _Link | None
    config: _Config
    columns: dict[str, _Column | None]
    state: dict[str, Any]
    left: Left | None = None


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
    meta: _Meta
    raw: dict[str, Any]

    @property
    def files_left(self) -> tuple[Leaving, ...]:
        """The files of series beyond memory."""
        return self.meta.left.files if self.meta.left else ()

    @property
    def generation(self) -> Generation:
        """As they describe it."""
        meta, manifest = self.meta, self.manifest
        made = Provenance(
            lineage=meta.lineage,
            incarnation=meta.incarnation,
            positions=tuple(Position(p.topic, p.partition, p.next_offset) for p in meta.positions),
            topic_ids=meta.topic_ids,
            progress=Link(meta.progress.offset, meta.progress.digest) if meta.progress else None,
            settings=Settings(meta.config.name, meta.config.hash, meta.config.identity, meta.config.learning),
            fingerprint=manifest.fingerprint,
            created_ms=meta.created_ms,
            revision=meta.revision,
            excluded=tuple(Range(*r) for r in meta.excluded),
            leader_epochs={(p.topic, p.partition): e for p in meta.positions if (e := p.leader_epoch) is not None},
        )
        size = len(self.sealed) + sum(entry.bytes for entry in manifest.files.values())
        stored = meta.left.series if meta.left else 0
        return Generation(meta.step, digest_manifest(self.sealed), size, meta.series, stored, made)


def read_header(files: Files, step: int, layout: Layout = LAYOUT) -> Header:
    """
    What a generation says of itself; no more of it is read than its two JSON files.

    Raises :class:`~streamlstm.errors.CheckpointError`, and :class:`NewerSchema` for a layout newer than ours.
    """
    with _well_formed():
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
        meta = _convert(current, _Meta, _META)
        if (meta.step, meta.config.hash) != (manifest.step, manifest.config):
            raise CheckpointError(f"{_META} and {MANIFEST} speak of different states")
        return Header(sealed, manifest, meta, as_written)


def verify_generation(files: Files, step: int, layout: Layout = LAYOUT) -> Generation:
    """Check every byte against the manifest; nothing is parsed but the two JSON files, nothing kept in memory."""
    header = read_header(files, step, layout)
    with _well_formed():
        _check_names(files, header.manifest)
        for name, expected in sorted(header.manifest.files.items()):
            with files.open(header.manifest.attempt, name) as file:
                copy_file(name, file, expected)
    return header.generation


def load_generation(files: Files, step: int, layout: Layout = LAYOUT) -> Loaded:
    """Read a generation, each file's hash before it is parsed. Raises :class:`~streamlstm.errors.CheckpointError`."""
    header = read_header(files, step, layout)
    manifest = header.manifest
    with _well_formed():
        _check_names(files, manifest)
        told = msgspec.convert(header.raw["columns"], dict[str, _Column | None])
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
            stored=_stored(files, header, columns, series),
        )
        for schema in range(manifest.schema, layout.schema):
            state = layout.migrations[schema].state(state)
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
    files[_META] = lambda sink: sink.write(canonical_json(_meta_of(state, provenance, leavers.told())))
    if beside is not None:
        files[_BESIDE] = lambda sink: sink.write(canonical_json(beside.values))
        files[_BESIDE_ARRAYS] = lambda sink: write_tensors(sink, _as_tensors(beside.arrays))
    return files


def seal(
    step: int, provenance: Provenance, listed: Mapping[str, Listed], attempt: str = "", layout: Layout = LAYOUT
) -> bytes:
    """The manifest. It holds its own SHA-256 too, so that no byte of a generation goes unchecked."""
    content: dict[str, Value] = {
        "schema": layout.schema,
        "step": step,
        "config": provenance.settings.hash,
        "fingerprint": dict(provenance.fingerprint),
        "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in listed.items()},
    }
    if attempt:
        content["attempt"] = attempt
    return canonical_json({**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def parse_manifest(data: bytes, layout: Layout = LAYOUT) -> Manifest:
    """Check and decode a manifest. Raises :class:`~streamlstm.errors.CheckpointError`."""
    if len(data) > MANIFEST_LIMIT:
        raise CheckpointError(f"{MANIFEST} is longer than {MANIFEST_LIMIT} bytes")
    try:
        decoded: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {error}") from error
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{MANIFEST} is damaged")
    sealed = cast("dict[str, Any]", decoded)
    content = {name: value for name, value in sealed.items() if name != "sha256"}
    with _well_formed():
        right = hashlib.sha256(canonical_json(content)).hexdigest()
        # The same value spelled otherwise is damage too.
        if sealed.get("sha256") != right or canonical_json(sealed) != data:
            raise CheckpointError(f"{MANIFEST} is damaged: its SHA-256 is not what it says")
    schema = sealed.get("schema")
    if type(schema) is int and schema > layout.schema:
        raise NewerSchema(
            f"the checkpoint has layout {schema}, and this version reads up to {layout.schema}: run the version that "
            "wrote it, or a newer one"
        )
    if type(schema) is not int or not (schema == layout.schema or schema in layout.migrations):
        raise CheckpointError(f"{MANIFEST} speaks of layout {schema!r}, which there never was")
    return _convert(sealed, Manifest, MANIFEST)


def reseal(sealed: bytes, attempt: str) -> bytes:
    """
    A manifest for the same files in another place.

    >>> made = seal(0, Provenance("L", "", (), {}, None, Settings("n", "h", {}, {}), {}, 0), {}, "0123456789abcdef")
    >>> digest_manifest(reseal(made, "")) == digest_manifest(made)
    True
    """
    content = {name: value for name, value in json.loads(sealed).items() if name not in ("sha256", "attempt")}
    if attempt:
        content["attempt"] = attempt
    return canonical_json({**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def digest_manifest(sealed: bytes) -> str:
    """What a generation is known by, wherever it lies: the SHA-256 (hex) of its manifest without ``attempt``."""
    return hashlib.sha256(reseal(sealed, "")).hexdigest()


def _check_names(files: Files, manifest: Manifest) -> None:
    there, listed = files.names(manifest.attempt), set(manifest.files)
    wrong = [f"{name} is missing" for name in sorted(listed - there)]
    wrong += [f"{name} is not listed" for name in sorted(there - listed)]
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _state_names(manifest: Manifest) -> Iterator[str]:
    return (name for name in sorted(manifest.files) if name.startswith("state-") and name.endswith(".parquet"))


def _meta_of(state: EngineState, provenance: Provenance, left: Left | None) -> dict[str, Any]:
    settings, progress, columns = provenance.settings, provenance.progress, describe_columns(state)
    return {
        "step": state.step,
        "series": len(state.series),
        "created_ms": provenance.created_ms,
        "lineage": provenance.lineage,
        "incarnation": provenance.incarnation,
        "revision": provenance.revision,
        "excluded": [list(r) for r in provenance.excluded],
        "positions": [
            {**p._asdict(), "leader_epoch": provenance.leader_epochs.get((p.topic, p.partition))}
            for p in provenance.positions
        ],
        "topic_ids": dict(provenance.topic_ids),
        "progress": {"offset": progress.offset, "digest": progress.digest} if progress else None,
        "config": {
            "name": settings.name,
            "hash": settings.hash,
            "identity": dict(settings.identity),
            "learning": dict(settings.learning),
        },
        "columns": {
            name: {"dtype": columns[name].dtype, "shape": list(columns[name].shape)} if name in columns else None
            for name in state.columns
        },
        "state": state.meta,
        **({} if left is None else {"left": msgspec.to_builtins(left)}),
    }


def _convert(value: dict[str, Any], kind: type[_Struct], name: str) -> _Struct:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{name} does not have the shape of a checkpoint: {error}") from error


@contextmanager
def _well_formed() -> Generator[None]:
    """Whatever else is odd about bytes whose hashes are right makes a bad generation, and is no defect of ours."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"it does not have the shape of a checkpoint: {error!r}") from error


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
