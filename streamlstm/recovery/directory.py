"""
Generations in a local directory: one directory ``<step:020d>`` each, whole or not there at all.

How one is written, and why in this order: a temporary directory; every file written and fsynced; ``MANIFEST.json``
last; fsync the directory, so that the names are in it; rename, so that the name means whole; fsync the parent, so that
the rename stays. Only then is it announced. Without any one of these there are crash states in which a checkpoint is
visible and incomplete, or announced and lost. Nothing is retried: after a failed fsync the kernel may call lost pages
clean, so a failed attempt is thrown away with its files.
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from streamlstm.errors import CheckpointError, Temporary
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.manifest import MANIFEST
from streamlstm.recovery.place import CHECKPOINT_URL, name_of, step_of_bad

_LOCK = "lock"
_GENERATION = re.compile(r"\d{20}")
_REPLACED = re.compile(r"(\d{20})\.replaced")
_BAD = re.compile(r"(\d{20})\.bad-(\d+)")
_TEMPORARY = ".tmp-"


class Directory:
    """A :class:`~streamlstm.recovery.place.Place` on this machine's disk, locked by one process."""

    needs = "a directory this user can write, in one that exists"

    def __init__(self, path: Path, disk: Disk | None = None, setting: str = CHECKPOINT_URL) -> None:
        self.directory, self.setting = path, setting
        self._disk = disk or Disk()
        self._lock: int | None = None
        self._made = False
        self._attempts = 0

    @property
    def name(self) -> str:
        """See :class:`~streamlstm.recovery.place.Place`."""
        return str(self.directory)

    def open(self) -> None:
        """
        Make the directory if it is missing, lock it, sweep it. Nothing when it is open.

        Another process that holds the lock is :class:`~streamlstm.errors.Temporary` (75): it may be the one being
        replaced, on its way out, and no state is touched while it lives.
        """
        if self._lock is not None:
            return
        was_there = False
        try:
            if not self.directory.exists():
                with suppress(FileExistsError):  # another process was quicker
                    self._disk.make_directory(self.directory)
                    self._made = True
            was_there = True
            if not self.directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._must_be_writable()
            self._take_lock(self._open_lock())
            if not self.steps():
                # Whoever made the directory may have been cut off before its name was safe, and then all in it is not.
                self._disk.sync_directory(self.directory.parent)
            self._sweep()
            # A generation may be there whose writer was killed between the rename and this: seen, but not yet safe.
            self._disk.sync_directory(self.directory)
        except OSError as error:
            self.close()
            if was_there and not os.path.lexists(self.directory):
                raise self._is_left() from error
            raise

    def _is_left(self) -> Temporary:
        return Temporary(f"{self.setting}: {self.directory} is being left by another process; start again")

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def leave(self) -> None:
        """Let go of it, and remove it if it was made here and has come to hold nothing."""
        with suppress(OSError):
            if self._lock is not None and self._made and self._names() == [_LOCK]:
                # While it is locked: whoever opened it before finds that it is not the one that is there any more.
                (self.directory / _LOCK).unlink()
                self.directory.rmdir()
        self.close()

    def steps(self) -> list[int]:
        """See :class:`~streamlstm.recovery.place.Place`."""
        return [int(name) for name in self._names() if _GENERATION.fullmatch(name)]

    def bad(self) -> list[str]:
        """See :class:`~streamlstm.recovery.place.Place`."""
        return [name for name in self._names() if _BAD.fullmatch(name)]

    def files(self, step: int) -> "DirectoryFiles":
        """See :class:`~streamlstm.recovery.place.Place`."""
        return DirectoryFiles(self.directory / name_of(step))

    def begin(self, step: int) -> "DirectoryAttempt":
        """See :class:`~streamlstm.recovery.place.Place`."""
        self._attempts += 1
        return DirectoryAttempt(self._disk, self.directory, name_of(step), self._attempts)

    def put_aside(self, step: int) -> str:
        """Rename it."""
        taken = [int(match[2]) for match in map(_BAD.fullmatch, self.bad()) if match and int(match[1]) == step]
        name = f"{name_of(step)}.bad-{max(taken, default=0) + 1}"
        self._disk.rename(self.directory / name_of(step), self.directory / name)
        self._disk.sync_directory(self.directory)
        return name

    def files_of_bad(self, name: str) -> "DirectoryFiles":
        """See :class:`~streamlstm.recovery.place.Place`."""
        return DirectoryFiles(self.directory / name)

    def bring_back(self, name: str) -> None:
        """Rename it."""
        self._disk.rename(self.directory / name, self.directory / name_of(step_of_bad(name)))
        self._disk.sync_directory(self.directory)

    def remove(self, name: str) -> None:
        """See :class:`~streamlstm.recovery.place.Place`."""
        gone = self.directory / f"{_TEMPORARY}old-{name}"
        self._disk.rename(self.directory / name, gone)
        self._disk.remove_tree(gone)

    def _names(self) -> list[str]:
        return _names(self.directory) if self.directory.exists() else []

    def _must_be_writable(self) -> None:
        if not os.access(self.directory, os.W_OK | os.X_OK | os.R_OK):
            read_only = os.statvfs(self.directory).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number))

    def _open_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.directory / _LOCK, flags, 0o600)

    def _take_lock(self, fd: int) -> None:
        self._lock = fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            self.close()
            raise Temporary(
                f"{self.setting}: {self.directory} is in use by another process"
                f"{f' (pid {holder})' if holder.isdigit() else ''}; it holds the lock until it ends"
            ) from error
        there = _stat(self.directory / _LOCK)
        if there is None or not os.path.samestat(there, os.fstat(fd)):
            self.close()
            raise self._is_left()
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def _sweep(self) -> None:
        """Remove unfinished attempts; finish or undo a replacement that was cut in the middle."""
        for name in self._names():
            path = self.directory / name
            if name.startswith(_TEMPORARY):
                self._disk.remove_tree(path)
            elif replaced := _REPLACED.fullmatch(name):
                current = self.directory / replaced[1]
                if current.exists():
                    self._disk.remove_tree(path)
                else:
                    self._disk.rename(path, current)


class DirectoryAttempt:
    """A generation under a temporary name. See :class:`~streamlstm.recovery.place.Attempt`."""

    ident = ""

    def __init__(self, disk: Disk, directory: Path, name: str, number: int) -> None:
        self._disk, self._directory = disk, directory
        self._temporary = directory / f"{_TEMPORARY}{name}-{number}"
        self._final, self._replaced = directory / name, directory / f"{name}.replaced"
        self._begun = False

    @contextmanager
    def create(self, name: str) -> Generator["DiskDraft"]:
        """See :class:`~streamlstm.recovery.place.Attempt`."""
        self._begin()
        with self._disk.create(self._temporary / name) as file:
            yield DiskDraft(self._disk, file)

    def link(self, step: int, attempt: str, name: str) -> None:
        """A second name of the same file: it costs nothing, and stays when the other generation goes."""
        self._begin()
        self._disk.link(self._directory / name_of(step) / attempt / name, self._temporary / name)

    def _begin(self) -> None:
        if not self._begun:
            self._disk.make_directory(self._temporary)
            self._begun = True

    def commit(self, manifest: bytes) -> None:
        """By the order at the top of this module; an older one of the same step is out of the way meanwhile."""
        with self.create(MANIFEST) as draft:
            draft.write(manifest)
            draft.sync()
        self._disk.sync_directory(self._temporary)
        replaces = self._final.exists()
        if replaces:
            self._disk.rename(self._final, self._replaced)
            self._disk.sync_directory(self._directory)
        self._disk.rename(self._temporary, self._final)
        self._disk.sync_directory(self._directory)
        if replaces:
            self._disk.remove_tree(self._replaced)

    def discard(self) -> None:
        """See :class:`~streamlstm.recovery.place.Attempt`."""
        try:
            if self._replaced.exists() and not self._final.exists():
                self._disk.rename(self._replaced, self._final)
            if self._temporary.exists():
                self._disk.remove_tree(self._temporary)
        except OSError:
            return  # the disk fails; the next start sweeps


class DiskDraft:
    """A file on the disk. See :class:`~streamlstm.recovery.place.Draft`."""

    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self._disk, self._file = disk, file

    def write(self, data: bytes | memoryview, /) -> None:
        """See :class:`~streamlstm.recovery.place.Draft`."""
        self._disk.write(self._file, data)
        self._disk.hasten(self._file, self._file.tell() - len(data), len(data))

    def sync(self) -> None:
        """See :class:`~streamlstm.recovery.place.Draft`."""
        self._disk.sync(self._file)
        self._file.close()


class DirectoryFiles:
    """The files of one generation; no link is followed. See :class:`~streamlstm.recovery.generations.Files`."""

    readers = 2

    def __init__(self, path: Path) -> None:
        self._path = path

    def manifest(self) -> BinaryIO:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        return _open(self._at("") / MANIFEST)

    def names(self, attempt: str) -> set[str]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        return set(_names(self._at(attempt))) - {MANIFEST}

    def open(self, attempt: str, name: str) -> BinaryIO:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        return _open(self._at(attempt) / name)

    def _at(self, attempt: str) -> Path:
        path = self._path / attempt
        if any(part.is_symlink() or not part.is_dir() for part in (self._path, path)):
            raise CheckpointError("not a directory")
        return path


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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
