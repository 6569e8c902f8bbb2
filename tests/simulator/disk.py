"""
A disk that keeps its word to the letter and no further.

What a process sees is a real directory. Beside it stands a model of what would be there after a power cut: any subset
of what was not synced, in any order, writes torn. An fsync of a file keeps its bytes and not its name; one of a
directory keeps its names. A failed fsync loses the pages for good, and the next one reports a success that never
happened.
"""

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from simulator.weather import Weather
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.stored import SCRATCH

_SECTOR_BYTES = 512
_NO_STATE = {"lock", SCRATCH}
"""What nobody expects to be there after the power came back."""


@dataclass(eq=False)
class Inode:
    """
    A file or a directory: what the process sees, what is safe, and what may or may not have reached the disk.

    ``names`` is ``None`` for a file. ``lost`` are the bytes that were unsynced when an fsync failed: they are
    nowhere but in the page cache, until somebody writes them once more.
    """

    names: dict[str, "Inode"] | None = None
    safe: dict[str, "Inode"] = field(default_factory=dict)
    bytes: bytearray = field(default_factory=bytearray)
    pending: list[tuple] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)


class Kernel:
    """The file system below ``root``, which outlives processes. ``broken`` lists what nobody may do to a disk."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.tree = Inode(names={})
        self.broken: list[str] = []

    def at(self, path: Path) -> Inode:
        found = self.tree
        for name in path.relative_to(self.root).parts:
            assert found.names is not None
            found = found.names[name]
        return found

    def add(self, path: Path, inode: Inode) -> None:
        parent = self.at(path.parent)
        assert parent.names is not None
        parent.names[path.name] = inode
        parent.pending.append(("add", path.name, inode))

    def move(self, old: Path, new: Path) -> None:
        parent = self.at(old.parent)
        assert parent.names is not None
        inode = parent.names.pop(old.name)
        if not new.name.startswith(".tmp-") and any(child.lost for child in (inode.names or {}).values()):
            self.broken.append(f"{new.name} was announced with a file whose fsync had failed")
        parent.names[new.name] = inode
        parent.pending.append(("move", old.name, new.name, inode))

    def remove(self, path: Path) -> None:
        parent = self.at(path.parent)
        assert parent.names is not None
        parent.names.pop(path.name)
        parent.pending.append(("remove", path.name))

    def sync(self, inode: Inode, what: str) -> None:
        if inode.lost:
            self.broken.append(f"fsync of {what} was tried again after it had failed, and believed")
            return
        if inode.names is None:
            for operation in inode.pending:
                _put(inode.bytes, operation)
        else:
            for operation in inode.pending:
                _apply(inode.safe, operation)
        inode.pending.clear()

    def lose(self, inode: Inode) -> None:
        """An fsync failed: the pages are called clean and are gone; a directory's journal is what it was."""
        if inode.names is None:
            for at, what in inode.pending:
                if at == "cut":
                    inode.lost = {byte for byte in inode.lost if byte < what}
                else:
                    inode.lost.update(range(at, at + len(what)))
            inode.pending.clear()

    def power_cut(self, rng: random.Random) -> None:
        """Everything that was not safe comes or goes as it likes, and what is there then is all there is."""
        shutil.rmtree(self.root)
        self.tree = _leave(self.tree, self.root, rng, {})

    def adopt(self) -> None:
        """What was put there by other hands is safe."""
        self.tree = _model(self.root, {})


def _put(held: bytearray, operation: tuple) -> None:
    """A write at an offset, over what is there and with zeros before it, or a cut."""
    at, what = operation
    if at == "cut":
        del held[what:]
        return
    held.extend(bytes(max(0, at - len(held))))
    held[at : at + len(what)] = what


def _sectors(at: int, what: bytes) -> Iterator[tuple[int, bytes]]:
    """A write as the disk does it: each sector comes whole or not at all."""
    end = at + len(what)
    borders = [at, *range(at - at % _SECTOR_BYTES + _SECTOR_BYTES, end, _SECTOR_BYTES), end]
    for a, b in pairwise(borders):
        yield a, what[a - at : b - at]


def _apply(names: dict[str, Inode], operation: tuple) -> None:
    if operation[0] == "add":
        names[operation[1]] = operation[2]
    elif operation[0] == "remove":
        names.pop(operation[1], None)
    else:
        names.pop(operation[1], None)
        names[operation[2]] = operation[3]


def _leave(inode: Inode, path: Path, rng: random.Random, left: dict[Inode, tuple[Path, Inode]]) -> Inode:
    """
    Put on the real disk one of the things that may be there after the power came back.

    A file with two names is one file: ``left`` are those that were put there under another.
    """
    if inode in left:
        other, same = left[inode]
        os.link(other, path)
        return same
    if inode.names is None:
        held = bytearray(inode.bytes)
        for at, what in inode.pending:
            if rng.random() < 0.5:
                torn = at != "cut" and rng.random() < 0.5
                for piece in _sectors(at, what) if torn else ():
                    if rng.random() < 0.5:
                        _put(held, piece)
                if not torn:
                    _put(held, (at, what))
        path.write_bytes(held)
        path.chmod(0o600)
        left[inode] = path, Inode(bytes=held)
        return left[inode][1]
    path.mkdir(mode=0o700)
    names = dict(inode.safe)
    for operation in inode.pending:
        if rng.random() < 0.5:
            _apply(names, operation)
    there = {name: _leave(child, path / name, rng, left) for name, child in names.items()}
    return Inode(names=there, safe=dict(there))


def _model(path: Path, known: dict[int, Inode]) -> Inode:
    if path.is_dir():
        names = {child.name: _model(child, known) for child in sorted(path.iterdir()) if child.name not in _NO_STATE}
        return Inode(names=names, safe=dict(names))
    return known.setdefault(path.stat().st_ino, Inode(bytes=bytearray(path.read_bytes())))


class SimulatedDisk(Disk):
    """One process's hands on the disk: before each operation it may die, or the operation may fail."""

    def __init__(self, kernel: Kernel, weather: Weather) -> None:
        self.kernel, self.weather = kernel, weather
        self.open: dict[int, tuple[Inode, str]] = {}
        self.files: list[BinaryIO] = []
        self.linked = 0

    def end(self) -> None:
        """What the operating system does when a process ends."""
        for file in self.files:
            file.close()

    def _before(self, operation: str, path: Path | str) -> None:
        name = f"{operation} {path.relative_to(self.kernel.root) if isinstance(path, Path) else path}"
        self.weather.point(name)
        if number := self.weather.disk(operation, name):
            raise OSError(number, os.strerror(number))

    def make_directory(self, path: Path) -> None:
        self._before("mkdir", path)
        super().make_directory(path)
        self.kernel.add(path, Inode(names={}))

    def create(self, path: Path) -> BinaryIO:
        self._before("create", path)
        file = super().create(path)
        self.files.append(file)
        inode = Inode()
        self.open[file.fileno()] = (inode, str(path.relative_to(self.kernel.root)))
        self.kernel.add(path, inode)
        return file

    def reopen(self, path: Path) -> BinaryIO:
        self._before("open", path)
        file = super().reopen(path)
        self.files.append(file)
        self.open[file.fileno()] = (self.kernel.at(path), str(path.relative_to(self.kernel.root)))
        return file

    def truncate(self, file: BinaryIO, size: int) -> None:
        inode, name = self.open[file.fileno()]
        self._before("truncate", name)
        super().truncate(file, size)
        inode.pending.append(("cut", size))
        inode.lost = {at for at in inode.lost if at < size}

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        inode, name = self.open[file.fileno()]
        half, begun = len(data) // 2, len(inode.pending)
        self._put(file, inode, data[:half])  # a write that fails or is cut has done some of its work
        self._before("write", name)
        self._put(file, inode, data[half:])
        if len(inode.pending) == begun + 2:  # one that has not is one
            (at, first), (_, second) = inode.pending[begun:]
            inode.pending[begun:] = [(at, first + second)]

    def _put(self, file: BinaryIO, inode: Inode, data: bytes | memoryview) -> None:
        if len(data) and not self.weather.dead:
            at = file.tell()
            inode.pending.append((at, bytes(data)))
            inode.lost.difference_update(range(at, at + len(data)))
            super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._sync(*self.open[file.fileno()])

    def sync_data(self, file: BinaryIO) -> None:
        self._sync(*self.open[file.fileno()])

    def sync_directory(self, path: Path) -> None:
        name = str(path.relative_to(self.kernel.root))
        self._sync(self.kernel.at(path), name)

    def _sync(self, inode: Inode, name: str) -> None:
        try:
            self._before("fsync", name)
        except OSError:
            self.kernel.lose(inode)
            raise
        self.kernel.sync(inode, name)

    def rename(self, old: Path, new: Path) -> None:
        self._before("rename", new)
        super().rename(old, new)
        self.kernel.move(old, new)

    def link(self, old: Path, new: Path) -> None:
        self._before("link", new)
        super().link(old, new)
        self.kernel.add(new, self.kernel.at(old))
        self.linked += 1

    def remove_tree(self, path: Path) -> None:
        """Name by name, as the real one does: it may be cut in the middle."""
        if path.is_dir() and not path.is_symlink():
            for child in sorted(path.iterdir()):
                self.remove_tree(child)
        self._before("unlink", path)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        self.kernel.remove(path)
