"""
An adversarial file system: after a power cut any subset of what was not synced may have reached the disk, in any order,
and a write may be torn. An fsync of a file keeps its bytes, not its name; one of a directory keeps its names.
"""

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from streamlstm.recovery.disk import Disk

SECTOR = 512


class PowerCut(BaseException):
    pass


@dataclass
class Inode:
    """What would survive, and what might: bytes of a file, or names in a directory."""

    names: dict[str, "Inode"] | None = None
    kept: bytearray = field(default_factory=bytearray)
    pending: list[tuple] = field(default_factory=list)


class Adversary(Disk):
    """
    Passes everything on to a real directory, and keeps a model of what a power cut may leave.

    ``forget`` names an operation that is a lie: it syncs nothing. ``fail_sync`` is the so-many-th sync of a file, which
    fails once; its pages are called clean then, as Linux does, and no later sync writes them.
    """

    def __init__(
        self, root: Path, root_inode: Inode, cut_after: int | None = None, forget: str = "", fail_sync: int = 0
    ) -> None:
        self.root, self.inode = root, root_inode
        self.inodes: dict[Path, Inode] = {}
        self._know(root, root_inode)
        self.files: dict[int, Inode] = {}
        self.done = self.syncs = 0
        self.cut_after, self.forget, self.fail_sync = cut_after, forget, fail_sync

    def _know(self, path: Path, inode: Inode) -> None:
        self.inodes[path] = inode
        for name, child in (inode.names or {}).items():
            self._know(path / name, child)

    def _did(self) -> None:
        self.done += 1
        if self.done == self.cut_after:
            raise PowerCut

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._named(path, Inode(names={}))
        self._did()

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self.files[file.fileno()] = self._named(path, Inode())
        try:
            self._did()
        except PowerCut:
            file.close()
            raise
        return file

    def _named(self, path: Path, inode: Inode) -> Inode:
        self.inodes[path] = inode
        self.inodes[path.parent].pending.append(("add", path.name, inode))
        return inode

    def reopen(self, path: Path) -> BinaryIO:
        file = super().reopen(path)
        self.files[file.fileno()] = self.inodes[path]
        return file

    def truncate(self, file: BinaryIO, size: int) -> None:
        super().truncate(file, size)
        self.files[file.fileno()].pending.append(("cut", size))
        self._did()

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        at = file.tell()
        super().write(file, data)
        self.files[file.fileno()].pending.append(("write", at, bytes(data)))
        self._did()

    def sync(self, file: BinaryIO) -> None:
        self._sync(file, "sync")

    def sync_data(self, file: BinaryIO) -> None:
        self._sync(file, "sync_data")

    def _sync(self, file: BinaryIO, which: str) -> None:
        inode = self.files[file.fileno()]
        self.syncs += 1
        if self.syncs == self.fail_sync:
            inode.pending.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.forget != which:
            for operation in inode.pending:
                change(inode.kept, operation)
            inode.pending.clear()
        self._did()

    def sync_directory(self, path: Path) -> None:
        inode = self.inodes[path]
        assert inode.names is not None
        which = "sync_parent" if path == self.root else "sync_directory"
        if self.forget != which:
            for operation in inode.pending:
                apply(inode.names, operation)
            inode.pending.clear()
        self._did()

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        inode = self.inodes.pop(old)
        self.inodes[new] = inode
        self.inodes[old.parent].pending.append(("move", old.name, new.name, inode))
        self._did()

    def link(self, old: Path, new: Path) -> None:
        super().link(old, new)
        self._named(new, self.inodes[old])
        self._did()

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        self.inodes[path.parent].pending.append(("remove", path.name))
        self._did()


def apply(names: dict[str, Inode], operation: tuple) -> None:
    if operation[0] == "add":
        names[operation[1]] = operation[2]
    else:
        names.pop(operation[1], None)
        if operation[0] == "move":
            names[operation[2]] = operation[3]


def change(content: bytearray, operation: tuple) -> None:
    if operation[0] == "cut":
        del content[operation[1] :]
    else:
        _, at, data = operation
        content += bytes(max(0, at + len(data) - len(content)))
        content[at : at + len(data)] = data


def change_in_part(content: bytearray, operation: tuple, rng: random.Random) -> None:
    """One of the things that may have come of an operation that was not synced."""
    how = rng.random()
    if operation[0] == "cut" or how < 0.4:
        if rng.random() < 0.5:
            change(content, operation)
        return
    _, at, data = operation
    if how < 0.7:
        change(content, ("write", at, data[: rng.randrange(len(data) + 1)]))
        return
    # The file has its new length, and some of its sectors have not come.
    content += bytes(max(0, at + len(data) - len(content)))
    for begin in range(at - at % SECTOR, at + len(data), SECTOR):
        if rng.random() < 0.5:
            first, last = max(begin, at), min(begin + SECTOR, at + len(data))
            content[first:last] = data[first - at : last - at]


def leave(inode: Inode, path: Path, rng: random.Random, left: dict[int, Path] | None = None) -> None:
    """
    Put on a real disk one of the things that may be there after the power came back.

    A file with two names is one file: ``left`` are those that were put there under another.
    """
    left = {} if left is None else left
    if id(inode) in left:
        os.link(left[id(inode)], path)
        return
    if inode.names is None:
        left[id(inode)] = path
        content = bytearray(inode.kept)
        for operation in inode.pending:
            change_in_part(content, operation, rng)
        path.write_bytes(content)
        return
    path.mkdir(mode=0o700, exist_ok=True)
    names = dict(inode.names)
    for operation in inode.pending:
        if rng.random() < 0.5:
            apply(names, operation)
    for name, child in names.items():
        leave(child, path / name, rng, left)


def model(path: Path, known: dict[int, Inode] | None = None) -> Inode:
    """A directory that is safely on the disk."""
    known = {} if known is None else known
    if path.is_dir():
        return Inode(names={child.name: model(child, known) for child in path.iterdir()})
    return known.setdefault(path.stat().st_ino, Inode(kept=bytearray(path.read_bytes())))
