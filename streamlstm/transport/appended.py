"""Files that only grow, each as long as the newest generation says when a killed process goes on."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from streamlstm.errors import DataError, StreamlstmError
from streamlstm.transport.interfaces import Frozen

T = TypeVar("T")


class Disk(Protocol):
    """Of the file system, what an output needs."""

    def extend(self, path: Path, length: int) -> BinaryIO:
        """A file to add to, made where there is none, cut back to its first ``length`` bytes."""
        ...

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """All of ``data``, or an error."""
        ...

    def sync(self, file: BinaryIO) -> None:
        """What was written survives a power cut."""
        ...

    def sync_directory(self, path: Path) -> None:
        """The names in ``path`` survive a power cut."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """``old`` is called ``new`` from now on."""
        ...

    def remove_tree(self, path: Path) -> None:
        """It is gone."""
        ...


class Output(Protocol):
    """
    Something a replay writes to, which can be killed at any instruction and goes on from a generation.

    What :meth:`freeze` gives is put into a generation, and :meth:`sync` called before that becomes durable; so whatever
    a generation speaks of is there, and what lies beyond is cut off.
    """

    def freeze(self) -> Frozen:
        """All that is needed to go on from here."""
        ...

    def sync(self) -> None:
        """What was written is durable. From any thread."""
        ...

    def finish(self) -> None:
        """It is whole and durable, under its name."""
        ...

    def close(self) -> None:
        """Let go of it. Never raises."""
        ...


class AppendedFile:
    """
    A file that grows under its own name, an :class:`Output`. Nothing is held back: each append is a write.

    :param frozen: what :meth:`freeze` gave; the file is cut back to that. ``None`` begins it anew.

    Raises :class:`~streamlstm.errors.StreamlstmError` where it cannot be written, and
    :class:`~streamlstm.errors.DataError` where what it held is gone.
    """

    def __init__(self, path: Path, disk: Disk, frozen: Frozen | None = None, *, name: Path | None = None) -> None:
        self.path = path
        self._disk = disk
        self._name = name or path
        self.length = int(frozen.values) if frozen else 0
        self._named = False
        try:
            there = path.stat().st_size if path.exists() else 0
        except OSError as why:
            raise unwritable(self._name, why) from why
        if there < self.length:
            raise DataError(
                f"{path} has {there} bytes, and {self.length} had been written when the checkpoint was taken; "
                "it was changed or removed, so begin again with another --checkpoint-to"
            )
        self._file = self._try(lambda: disk.extend(path, self.length))
        self._regular = stat.S_ISREG(path.stat().st_mode)
        if frozen is not None and not self._regular:
            self.close()
            raise DataError(f"{path} is no file that could be cut back; a replay that goes on needs one")

    def append(self, data: bytes | memoryview) -> None:
        """Write all of it."""
        if data:
            self._try(lambda: self._disk.write(self._file, data))
            self.length += len(data)

    def freeze(self) -> Frozen:
        """See :class:`Output`."""
        return Frozen(self.length)

    def sync(self) -> None:
        """See :class:`Output`. A pipe or a terminal has nothing that could be lost."""
        if self._regular:
            self._try(lambda: self._disk.sync(self._file))
            if not self._named:
                self._try(lambda: self._disk.sync_directory(self.path.parent))
                self._named = True

    def finish(self) -> None:
        """See :class:`Output`."""
        self.sync()
        self.close()

    def close(self) -> None:
        """See :class:`Output`."""
        self._file.close()

    def _try(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as why:
            raise unwritable(self._name, why) from why


def unwritable(path: Path, why: OSError) -> StreamlstmError:
    """That it cannot be written, in one line."""
    return StreamlstmError(f"cannot write {path}: {why.strerror or why}")
