"""
One generation as one file: an uncompressed tar of its files under ``<step:020d>/``, the manifest last.

It appears whole or not at all, and only after what is on the disk was read back and checked. The same generation gives
the same bytes.
"""

import errno
import os
import tarfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from streamlstm.errors import CheckpointError, CheckpointNotWritten
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.directory import DirectoryFiles
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.generations import Files, Loaded, load_generation, read_header, verify_generation
from streamlstm.recovery.inspection import blaming
from streamlstm.recovery.manifest import MANIFEST, MANIFEST_LIMIT, parse_manifest
from streamlstm.recovery.place import name_of
from streamlstm.recovery.provenance import Generation

_MODE = 0o600


class Outside(NamedTuple):
    """A generation that is in no store. Nothing of it was checked but its manifest."""

    step: int
    files: Files


class ArchiveFiles:
    """The files of one generation in a tar. See :class:`~streamlstm.recovery.generations.Files`."""

    readers = 1  # they share the tar's position

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members: Mapping[PurePosixPath, tarfile.TarInfo] = _members(path, tar)

    def manifest(self) -> IO[bytes]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        return self.open("", MANIFEST)

    def names(self, attempt: str) -> set[str]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        return {at.name for at in self._members if at.parent == PurePosixPath(attempt)} - {MANIFEST}

    def open(self, attempt: str, name: str) -> IO[bytes]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        member = self._members.get(PurePosixPath(attempt, name))
        file = self._tar.extractfile(member) if member else None
        if file is None:
            raise CheckpointError(f"{name} is missing")
        return file


def export(store: CheckpointStore, step: int, out: Path, disk: Disk | None = None) -> Generation:
    """
    Write a generation to ``out``, which must not exist, and check what was written.

    Raises :class:`~streamlstm.errors.CheckpointError` when the generation is bad, or was pruned meanwhile by a running
    service; :class:`~streamlstm.errors.CheckpointNotWritten` when the file cannot be written, and ``FileExistsError``.
    """
    disk = disk or Disk()
    if out.exists() or out.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        with disk.create(temporary) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add_all(tar, store.files(step), step)
            disk.sync(file)
        with open_outside(temporary) as written:
            generation = verify_generation(written.files, written.step)
        disk.rename(temporary, out)
        disk.sync_directory(out.parent)
    except OSError as error:
        raise CheckpointNotWritten(
            f"cannot write {out}: {error.strerror or error}; look at the disk, or name a file elsewhere"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return generation


@contextmanager
def open_outside(path: Path) -> Generator[Outside, None, None]:
    """
    The generation at ``path``: an archive, or a directory that was copied from elsewhere.

    Raises :class:`~streamlstm.errors.CheckpointError` when it is neither.
    """
    if path.is_dir():
        yield _opened(path, DirectoryFiles(path))
        return
    try:
        with tarfile.open(path, mode="r:") as tar:
            yield _opened(path, ArchiveFiles(path, tar))
    except tarfile.TarError as error:
        raise CheckpointError(f"{path} is no archive of a checkpoint: {error}") from error


def load_outside(outside: Outside, what: str) -> Loaded:
    """The state in one that is called ``what``; series beyond memory are read while it is open."""
    with blaming(what):
        return load_generation(outside.files, outside.step)


def _opened(path: Path, files: Files) -> Outside:
    with blaming(str(path)), files.manifest() as file:
        return Outside(parse_manifest(file.read(MANIFEST_LIMIT + 1)).step, files)


def _add_all(tar: tarfile.TarFile, files: Files, step: int) -> None:
    """Sizes and times are what the generation says, so that its own bytes decide those of the archive."""
    header = read_header(files, step)
    manifest, mtime = header.manifest, header.meta.created_ms // 1000
    for name, listed in sorted(manifest.files.items()):
        with files.open(manifest.attempt, name) as file:
            path = PurePosixPath(name_of(step), manifest.attempt, name)
            tar.addfile(_entry(path, listed.bytes, mtime), cast("IO[bytes]", file))
    with files.manifest() as file:
        path = PurePosixPath(name_of(step), MANIFEST)
        tar.addfile(_entry(path, len(header.sealed), mtime), cast("IO[bytes]", file))


def _entry(path: PurePosixPath, size: int, mtime: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(str(path))
    entry.size, entry.mode, entry.mtime = size, _MODE, mtime
    return entry


def _members(path: Path, tar: tarfile.TarFile) -> Mapping[PurePosixPath, tarfile.TarInfo]:
    """Its files below the one directory in it. It may come from anywhere: nothing is unpacked by its names."""
    members: dict[PurePosixPath, tarfile.TarInfo] = {}
    for member in tar.getmembers():
        if member.isdir():
            continue
        at = PurePosixPath(*PurePosixPath(member.name).parts[1:])
        if not member.isreg() or at in members:
            raise CheckpointError(f"{path} is no archive of a checkpoint: it holds {member.name!r}")
        members[at] = member
    return members
