"""
Durable generations: one directory ``<step:020d>`` each, whole or not there at all.

How one is written, and why in this order: a temporary directory; every file written and fsynced; ``MANIFEST.json``
last, with length and SHA-256 of each; fsync the directory, so that the names are in it; rename, so that the name means
whole; fsync the parent, so that the rename stays. Only then is it announced. Without any one of these there are crash
states in which a checkpoint is visible and incomplete, or announced and lost. Nothing is retried: after a failed fsync
the kernel may call lost pages clean, so a failed attempt is thrown away with its files.

There is no pointer file: the newest generation that is whole wins. A bad one is renamed ``<step>.bad-<n>`` once an
older one was found good; when none is, nothing is touched and the start is refused.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, cast
from urllib.parse import quote

from torch import Tensor

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError, CheckpointNotWritten, ConfigError, Temporary
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.progress import Link, Value
from streamlstm.recovery.snapshot import (
    Column,
    Place,
    Sink,
    canonical_json,
    describe_columns,
    group_by_place,
    join_series,
    read_series,
    read_tensors,
    write_series,
    write_tensors,
)
from streamlstm.transport.interfaces import Position

SCHEMA = 1
"""Of the directory's layout. A newer one is refused, never guessed at."""

_MANIFEST = "MANIFEST.json"
_META = "meta.json"
_MODEL = "model.pt"
_OPTIM = "optim.pt"
_BESIDE = "beside.json"
_BESIDE_TENSORS = "beside.pt"
_LOCK = "lock"
_GENERATION = re.compile(r"^\d{20}$")
_REPLACED = re.compile(r"^(\d{20})\.replaced$")
_BAD = re.compile(r"^(\d{20})\.bad-(\d+)$")
_TEMPORARY = ".tmp-"
_LONGEST_TOPIC = 180  # of a file name's 255 bytes
_MANIFEST_LIMIT = 64 << 20
_BLOCK = 1 << 20

# What an operator has to mend before a start, as against a disk that is full or broken.
_SETUP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST}


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration as far as state hangs on it: its hash, and the keys whose change matters, by dotted name."""

    name: str
    hash: str
    identity: Mapping[str, Value]
    learning: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Provenance:
    """
    Where a state stands: in the input (``positions``), in the progress chain, and under which configuration.

    ``progress`` is the record that ends with the state's step, ``None`` for a generation 0 that precedes the chain.
    ``incarnation`` is the process that computed it, empty for generation 0.
    """

    lineage: str
    incarnation: str
    positions: tuple[Position, ...]
    topic_ids: Mapping[str, str]
    progress: Link | None
    settings: Settings
    fingerprint: Mapping[str, str]
    created_ms: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One checkpoint that is whole. ``digest`` is that of its manifest, and so of every byte in it."""

    step: int
    digest: str
    bytes: int
    series: int
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Written:
    """A generation made durable, and how long that took."""

    generation: Generation
    write_s: float
    fsync_s: float


@dataclass(frozen=True, slots=True)
class Beside:
    """What a generation carries beside the engine's state, for the shell that made it: JSON, and named tensors."""

    values: Any
    tensors: dict[str, Tensor]


class Loaded(NamedTuple):
    """A generation and the state it holds."""

    generation: Generation
    state: EngineState
    beside: Beside | None = None


class Refused(NamedTuple):
    """A generation that cannot be used, and why."""

    step: int
    reason: str


class CheckpointStore:
    """
    The generations in one directory, owned by one process.

    :meth:`open` takes the lock and must come first; only :meth:`steps` and :meth:`verify` do without it.
    """

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self.directory = directory
        self._disk = disk or Disk()
        self._lock: int | None = None
        self._attempts = 0

    def open(self) -> Self:
        """
        Make the directory if it is missing, lock it, and sweep up what a killed process left. Nothing when it is open.

        Another process that holds the lock is :class:`~streamlstm.errors.Temporary` (75): it may be the one being
        replaced, on its way out, and no state is touched while it lives. A directory that cannot be used is
        :class:`~streamlstm.errors.ConfigError` (78), a disk that is full or fails
        :class:`~streamlstm.errors.CheckpointNotWritten` (74).
        """
        if self._lock is not None:
            return self
        try:
            if not self.directory.exists():
                self._disk.make_directory(self.directory)
                self._disk.sync_directory(self.directory.parent)
            if not self.directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(self.directory, os.W_OK | os.X_OK | os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._take_lock()
            self._sweep()
        except OSError as error:
            self.close()
            what = f"checkpoint.url: {self.directory}: {error.strerror or error}"
            if error.errno in _SETUP:
                raise ConfigError(f"{what}; it must be a directory this user can write, in one that exists") from error
            raise CheckpointNotWritten(what) from error
        return self

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def steps(self) -> list[int]:
        """The generations that are there, whole or not, oldest first."""
        names = _names(self.directory) if self.directory.exists() else []
        return sorted(int(name) for name in names if _GENERATION.match(name))

    def bad(self) -> list[str]:
        """The names of bad generations that were put aside, by this process or an earlier one; oldest first."""
        return sorted(name for name in _names(self.directory) if _BAD.match(name))

    def verify(self, step: int) -> Generation:
        """
        Check every byte of a generation against its manifest. Parses nothing but the two JSON files.

        Raises :class:`~streamlstm.errors.CheckpointError` with the file at fault.
        """
        with _well_formed():
            return self._verify(step)[0]

    def load(self, step: int) -> Loaded:
        """Check a generation, then read it. Raises :class:`~streamlstm.errors.CheckpointError`."""
        with _well_formed():
            return self._load(step)

    def _load(self, step: int) -> Loaded:
        generation, listed, meta = self._verify(step)
        path = self._path(step)
        columns = _columns_of(meta)
        parts = (
            read_series(_checked(path / name, listed[name]), columns) for name in sorted(listed) if _is_state(name)
        )
        series, joined = join_series(parts, columns)
        joined |= {name: [] for name, told in meta["columns"].items() if told is None}
        if len(series) != generation.series:
            raise CheckpointError(f"{len(series)} series, and {_META} speaks of {generation.series}")
        state = EngineState(
            step=step,
            series=series,
            columns=joined,
            weights=read_tensors(_checked(path / _MODEL, listed[_MODEL])),
            training=read_tensors(_checked(path / _OPTIM, listed[_OPTIM])),
            meta=cast("dict[str, Any]", meta["state"]),
        )
        return Loaded(generation, state, _load_beside(path, listed))

    def newest(self, beyond: Mapping[int, str] | None = None) -> tuple[Loaded | None, list[Refused]]:
        """
        The newest generation that is whole, and the newer ones that are not, which are to be put aside.

        ``beyond`` holds generations that the progress chain does not know, with the reason. ``None`` is returned when
        there is none at all. Raises :class:`~streamlstm.errors.CheckpointError`, naming each reason, when there are
        some and none is good.
        """
        refused: list[Refused] = []
        for step in reversed(self.steps()):
            if beyond and step in beyond:
                refused.append(Refused(step, beyond[step]))
                continue
            try:
                return self.load(step), refused
            except _NewerSchema:
                raise
            except (CheckpointError, OSError) as error:
                refused.append(Refused(step, str(error)))
        if refused:
            reasons = "; ".join(f"{r.step}: {r.reason}" for r in refused)
            raise CheckpointError(f"no checkpoint in {self.directory} can be used: {reasons}")
        return None, []

    def put_aside(self, step: int) -> str:
        """
        Rename a bad generation, so that it is neither used nor counted again; its new name.

        Only once an older one was found good: a start that is refused touches nothing.
        """
        taken = {int(m[2]) for m in map(_BAD.match, self.bad()) if m and int(m[1]) == step}
        name = f"{step:020d}.bad-{max(taken, default=0) + 1}"
        try:
            self._disk.rename(self._path(step), self.directory / name)
            self._disk.sync_directory(self.directory)
        except OSError as error:
            raise CheckpointNotWritten(f"{self._path(step)} is bad and cannot be put aside: {error}") from error
        return name

    def write(self, state: EngineState, provenance: Provenance, beside: Beside | None = None) -> Written:
        """
        Make a state durable, and what goes beside it, by the order at the top of this module.

        Raises :class:`~streamlstm.errors.CheckpointNotWritten`, whose cause is the ``OSError``; older generations are
        then as they were, and the attempt's files are gone if the disk lets them be removed.
        """
        self._attempts += 1
        temporary = self.directory / f"{_TEMPORARY}{state.step:020d}-{self._attempts}"
        try:
            return self._write(state, provenance, beside, temporary)
        except OSError as error:
            self._discard(temporary, state.step)
            raise CheckpointNotWritten(
                f"the checkpoint of step {state.step} could not be written to {self.directory}: "
                f"{error.strerror or error}"
            ) from error

    def prune(self, keep: int) -> str:
        """
        Remove all but the newest ``keep`` generations, oldest first, and as many of those put aside.

        Never the newest. Returns why something could not be removed, or nothing: a checkpoint is no less durable
        because an older one is still there.
        """
        try:
            for name in [f"{step:020d}" for step in self.steps()[:-keep]] + self.bad()[:-keep]:
                gone = self.directory / f"{_TEMPORARY}old-{name}"
                self._disk.rename(self.directory / name, gone)
                self._disk.remove_tree(gone)
        except OSError as error:
            return f"an old checkpoint could not be removed: {error}"
        return ""

    def oldest_link(self) -> Link | None:
        """
        The progress record that the oldest generation stands on: the chain is needed from there.

        ``None`` when it precedes the chain, or cannot be read: then all of the chain is to be kept.
        """
        steps = self.steps()
        if not steps:
            return None
        try:
            with _well_formed():
                path = self._path(steps[0])
                entry = _read_manifest(path)["files"][_META]
                meta = json.loads(_checked(path / _META, _Listed(entry["bytes"], entry["sha256"])))
                return _provenance_of(meta, {}).progress
        except (CheckpointError, OSError):
            return None

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:020d}"

    def _take_lock(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.directory / _LOCK, flags, 0o600)
        self._lock = fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            self.close()
            raise Temporary(
                f"checkpoint.url: {self.directory} is in use by another process"
                f"{f' (pid {holder})' if holder.isdigit() else ''}; it holds the lock until it ends"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def _sweep(self) -> None:
        """Remove unfinished attempts; finish or undo a replacement that was cut in the middle."""
        changed = False
        for name in _names(self.directory):
            path = self.directory / name
            if name.startswith(_TEMPORARY):
                self._disk.remove_tree(path)
            elif replaced := _REPLACED.match(name):
                current = self.directory / replaced[1]
                if current.exists():
                    self._disk.remove_tree(path)
                else:
                    self._disk.rename(path, current)
                changed = True
        if changed:
            self._disk.sync_directory(self.directory)

    def _discard(self, temporary: Path, step: int) -> None:
        final, replaced = self._path(step), self._replaced(step)
        try:
            if replaced.exists() and not final.exists():
                self._disk.rename(replaced, final)
            if temporary.exists():
                self._disk.remove_tree(temporary)
        except OSError:
            return  # the disk fails; the next start sweeps

    def _replaced(self, step: int) -> Path:
        return self.directory / f"{step:020d}.replaced"

    def _write(self, state: EngineState, provenance: Provenance, beside: Beside | None, temporary: Path) -> Written:
        final, replaced = self._path(state.step), self._replaced(state.step)
        began = time.perf_counter()
        fsync_s = 0.0
        self._disk.make_directory(temporary)
        listed: dict[str, dict[str, Value]] = {}
        for name, put in _files_of(state, provenance, beside).items():
            spent, size, digest = self._write_file(temporary / name, put)
            listed[name] = {"bytes": size, "sha256": digest}
            fsync_s += spent
        manifest = _seal(state.step, provenance, listed)
        spent, size, digest = self._write_file(temporary / _MANIFEST, lambda sink: sink.write(manifest))
        fsync_s += spent
        syncing = time.perf_counter()
        self._disk.sync_directory(temporary)
        replaces = final.exists()
        if replaces:
            self._disk.rename(final, replaced)
            self._disk.sync_directory(self.directory)
        self._disk.rename(temporary, final)
        self._disk.sync_directory(self.directory)
        if replaces:
            self._disk.remove_tree(replaced)
        done = time.perf_counter()
        fsync_s += done - syncing
        total = size + sum(cast("int", entry["bytes"]) for entry in listed.values())
        generation = Generation(state.step, digest, total, len(state.series), provenance)
        return Written(generation, write_s=done - began - fsync_s, fsync_s=fsync_s)

    def _write_file(self, path: Path, put: Callable[[Sink], object]) -> tuple[float, int, str]:
        """Seconds spent in fsync, length and SHA-256."""
        with self._disk.create(path) as file:
            sink = _Hashed(self._disk, file)
            try:
                put(sink)
                sink.flush()
            except BaseException:
                # torch and pyarrow try to finish their files, and then tell of that instead of the disk.
                if sink.error is not None:
                    raise sink.error from None
                raise
            began = time.perf_counter()
            self._disk.sync(file)
            return time.perf_counter() - began, sink.bytes, sink.sha.hexdigest()

    def _verify(self, step: int) -> tuple[Generation, dict[str, "_Listed"], dict[str, Any]]:
        path = self._path(step)
        if path.is_symlink() or not path.is_dir():
            raise CheckpointError("not a directory")
        sealed = _read_manifest(path)
        if sealed["step"] != step:
            raise CheckpointError(f"{_MANIFEST} is of step {sealed['step']}")
        listed = {name: _Listed(int(e["bytes"]), str(e["sha256"])) for name, e in sealed["files"].items()}
        there = set(_names(path)) - {_MANIFEST}
        if there != set(listed):
            missing, extra = sorted(set(listed) - there), sorted(there - set(listed))
            raise CheckpointError(
                "; ".join(
                    f"{name} is {what}"
                    for names, what in ((missing, "missing"), (extra, "not listed"))
                    for name in names
                )
            )
        if not {_META, _MODEL, _OPTIM} <= set(listed):
            raise CheckpointError(f"{_MANIFEST} does not list {_META}, {_MODEL} and {_OPTIM}")
        for name, expected in sorted(listed.items()):
            if name != _META:
                _check(path / name, expected)
        meta = cast("dict[str, Any]", json.loads(_checked(path / _META, listed[_META])))
        size = sum(entry.bytes for entry in listed.values()) + (path / _MANIFEST).stat().st_size
        digest = hashlib.sha256(canonical_json(sealed)).hexdigest()
        provenance = _provenance_of(meta, cast("dict[str, str]", sealed["fingerprint"]))
        return Generation(step, digest, size, int(meta["series"]), provenance), listed, meta


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class _Listed(NamedTuple):
    bytes: int
    sha256: str


@contextmanager
def _well_formed() -> Generator[None]:
    """What a generation says must have our shape even where its hashes are right: else it is bad, and no defect."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"it does not have the shape of a checkpoint: {error!r}") from error


class _NewerSchema(CheckpointError):
    """Written by a newer version: to be refused, not to be called bad."""


class _Hashed:
    """A file that knows the length and SHA-256 of what went into it. After an error it takes no more."""

    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self._disk, self._file = disk, file
        self._held = bytearray()
        self.sha = hashlib.sha256()
        self.bytes = 0
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview, /) -> int:
        if self.error is not None:
            raise self.error
        view = memoryview(data).cast("B")
        self.sha.update(view)
        self.bytes += view.nbytes
        if view.nbytes < _BLOCK:
            self._held += view
        else:
            self.flush()
            self._put(view)
        if len(self._held) >= _BLOCK:
            self.flush()
        return view.nbytes

    def flush(self) -> None:
        """Hand over what was held back to make one write of many small ones."""
        if self._held:
            held, self._held = self._held, bytearray()
            self._put(memoryview(held))

    def _put(self, data: memoryview) -> None:
        try:
            self._disk.write(self._file, data)
        except BaseException as error:
            self.error = error
            raise


def _files_of(state: EngineState, provenance: Provenance, beside: Beside | None) -> dict[str, Callable[[Sink], object]]:
    """Every file but the manifest, by name, with what writes it."""
    files: dict[str, Callable[[Sink], object]] = {}
    for place, rows in group_by_place(state.series).items():
        files[_state_name(place)] = lambda sink, place=place, rows=rows: write_series(sink, state, place, rows)
    files[_MODEL] = lambda sink: write_tensors(sink, state.weights)
    files[_OPTIM] = lambda sink: write_tensors(sink, state.training)
    meta = canonical_json(_meta_of(state, provenance))
    files[_META] = lambda sink: sink.write(meta)
    if beside is not None:
        files[_BESIDE] = lambda sink: sink.write(canonical_json(beside.values))
        files[_BESIDE_TENSORS] = lambda sink: write_tensors(sink, beside.tensors)
    return files


def _load_beside(path: Path, listed: dict[str, "_Listed"]) -> Beside | None:
    if _BESIDE not in listed:
        return None
    values = json.loads(_checked(path / _BESIDE, listed[_BESIDE]))
    return Beside(values, read_tensors(_checked(path / _BESIDE_TENSORS, listed[_BESIDE_TENSORS])))


def _state_name(place: Place) -> str:
    """A name safe for any topic; the file itself says which one it is."""
    topic = quote(place.topic, safe="")
    if len(topic) > _LONGEST_TOPIC:
        topic = f"{topic[:_LONGEST_TOPIC]}~{hashlib.sha256(place.topic.encode()).hexdigest()[:16]}"
    return f"state-{topic}-{place.partition}.parquet"


def _is_state(name: str) -> bool:
    return name.startswith("state-") and name.endswith(".parquet")


def _meta_of(state: EngineState, provenance: Provenance) -> dict[str, Any]:
    settings, progress, columns = provenance.settings, provenance.progress, describe_columns(state)
    return {
        "step": state.step,
        "series": len(state.series),
        "created_ms": provenance.created_ms,
        "lineage": provenance.lineage,
        "incarnation": provenance.incarnation,
        # The client does not tell the leader epoch of what was read; the place is kept for one that does.
        "positions": [
            {"topic": p.topic, "partition": p.partition, "next_offset": p.next_offset, "leader_epoch": None}
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
    }


def _provenance_of(meta: dict[str, Any], fingerprint: dict[str, str]) -> Provenance:
    config, progress = meta["config"], meta["progress"]
    return Provenance(
        lineage=meta["lineage"],
        incarnation=meta["incarnation"],
        positions=tuple(Position(p["topic"], p["partition"], p["next_offset"]) for p in meta["positions"]),
        topic_ids=meta["topic_ids"],
        progress=Link(progress["offset"], progress["digest"]) if progress else None,
        settings=Settings(config["name"], config["hash"], config["identity"], config["learning"]),
        fingerprint=fingerprint,
        created_ms=meta["created_ms"],
    )


def _columns_of(meta: dict[str, Any]) -> dict[str, Column]:
    return {name: Column(c["dtype"], tuple(c["shape"])) for name, c in meta["columns"].items() if c is not None}


def _seal(step: int, provenance: Provenance, listed: dict[str, dict[str, Value]]) -> bytes:
    """The manifest. It holds its own SHA-256 too, so that no byte of a generation goes unchecked."""
    content: dict[str, Value] = {
        "schema": SCHEMA,
        "step": step,
        "config": provenance.settings.hash,
        "fingerprint": dict(provenance.fingerprint),
        "files": dict(listed),
    }
    return canonical_json({**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    data = _read(path / _MANIFEST, _MANIFEST_LIMIT)
    try:
        decoded: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{_MANIFEST} is damaged: {error}") from error
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{_MANIFEST} is damaged")
    sealed = cast("dict[str, Any]", decoded)
    content = {name: value for name, value in sealed.items() if name != "sha256"}
    seal = hashlib.sha256(canonical_json(content)).hexdigest()
    # The same value spelled otherwise is damage too.
    if sealed.get("sha256") != seal or canonical_json(sealed) != data:
        raise CheckpointError(f"{_MANIFEST} is damaged: its SHA-256 is not what it says")
    if sealed["schema"] != SCHEMA:
        raise _NewerSchema(
            f"{path} has layout {sealed['schema']}, and this version reads {SCHEMA}: run the version that wrote it"
        )
    return sealed


def _open(path: Path) -> BinaryIO:
    """A regular file, and no link. A missing one is :class:`~streamlstm.errors.CheckpointError`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = {errno.ENOENT: "is missing", errno.ELOOP: "is a link"}.get(error.errno or 0, f"cannot be read: {error}")
        raise CheckpointError(f"{path.name} {what}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path.name} is not a regular file")
    return os.fdopen(fd, "rb")


def _read(path: Path, limit: int) -> bytes:
    with _open(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path.name} is longer than {limit} bytes")
    return data


def _check(path: Path, expected: _Listed) -> None:
    """Hash a file without keeping it."""
    sha, size = hashlib.sha256(), 0
    with _open(path) as file:
        while block := file.read(_BLOCK):
            sha.update(block)
            size += len(block)
    _compare(path.name, size, sha.hexdigest(), expected)


def _checked(path: Path, expected: _Listed) -> bytes:
    """A file's bytes, which are those the manifest lists: what is parsed is what was checked."""
    data = _read(path, expected.bytes)
    _compare(path.name, len(data), hashlib.sha256(data).hexdigest(), expected)
    return data


def _compare(name: str, size: int, sha256: str, expected: _Listed) -> None:
    if size != expected.bytes:
        raise CheckpointError(f"{name} has {size} bytes instead of {expected.bytes}")
    if sha256 != expected.sha256:
        raise CheckpointError(f"{name} is damaged: its SHA-256 is not the manifest's")
