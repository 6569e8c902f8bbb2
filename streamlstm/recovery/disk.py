"""The few file operations that durability hangs on, in one place so that a test can fail, lose or stop any of them."""

import os
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600

# What the kernel is given at once. It looks for pages that lie together as far as that reaches, and long stretches are
# those that nobody uses: a virtual machine waits for its host to give them back, eight times as long with 8 MiB.
_WRITE_BYTES = 512 << 10


class Disk:
    """
    The real file system.

    No operation is ever retried: after a failed fsync the kernel may have dropped the pages and marked them clean, and
    a second fsync would report a success that never happened.
    """

    def make_directory(self, path: Path) -> None:
        """A new directory only we can enter; its parent must exist, and it must not."""
        path.mkdir(mode=_DIRECTORY_MODE)

    def create(self, path: Path) -> BinaryIO:
        """A new file only we can read, open for writing. It must not exist, not even as a link."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(path, flags, _FILE_MODE), "wb", buffering=0)

    def reopen(self, path: Path) -> BinaryIO:
        """A file that is there, and no link, open for writing at its beginning."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(path, flags), "wb", buffering=0)

    def truncate(self, file: BinaryIO, size: int) -> None:
        """Cut ``file`` off; it is written from there on."""
        file.truncate(size)
        file.seek(size)

    def extend(self, path: Path, length: int) -> BinaryIO:
        """
        A user's file to add to, made where there is none, cut back to its first ``length`` bytes.

        It may be a link, and it may be a pipe or a device, of which nothing can be cut.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, length)
            return os.fdopen(fd, "ab", buffering=0)
        except BaseException:
            os.close(fd)
            raise

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """All of ``data``, or an error."""
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[file.write(rest[:_WRITE_BYTES]) :]

    def hasten(self, file: BinaryIO, first: int, length: int) -> None:
        """Have the disk begin with this part of what was written to ``file``: a hint, which promises nothing."""
        if sys.platform == "linux":
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_DONTNEED)

    def sync(self, file: BinaryIO) -> None:
        """What was written to ``file`` survives a power cut."""
        os.fsync(file.fileno())

    def sync_data(self, file: BinaryIO) -> None:
        """As :meth:`sync`, without what only says when the file was changed."""
        os.fdatasync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """The names in ``path`` survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """``old`` is called ``new`` from now on, at one instant."""
        old.rename(new)

    def link(self, old: Path, new: Path) -> None:
        """The file is called ``new`` too from now on; neither name is the first."""
        os.link(old, new, follow_symlinks=False)

    def remove_tree(self, path: Path) -> None:
        """A directory and all in it, or whatever else is called so. Links are removed, never followed."""
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
