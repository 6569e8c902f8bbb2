"""
The files of a generation, made in one thread and written in another: neither processor nor disk waits.

Who writes stays in its own thread and does every file operation there, one after the other; what is made runs at most
eight blocks ahead of it, each of which may hold on to the file it is part of. A file is hashed by who has less to do:
who makes it where it is well ahead, else who writes it. A third thread would take that time from the steps.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, Self

from streamlstm.recovery.manifest import Listed
from streamlstm.recovery.snapshot import Sink

_BLOCK = 8 << 20
_BLOCKS_AHEAD = 8
_WELL_AHEAD = 4


class _Sha(Protocol):
    """Of hashlib's objects, what is used here."""

    def update(self, data: memoryview, /) -> None:
        """Take in bytes."""
        ...

    def hexdigest(self) -> str:
        """Of all of them."""
        ...


class _Abandoned(Exception):
    """Nobody wants the rest."""


class _Block(NamedTuple):
    """A part of a file, with what hashes it, if that is to be done by who writes it."""

    data: memoryview
    sha: _Sha | None


class Encoder:
    """
    Makes files, each given by what writes it, ahead of who wants their bytes.

    To be used by ``with``, in the thread that writes; nothing is made after that.
    """

    def __init__(self, files: Iterable[Callable[[Sink], object]]) -> None:
        self._files = files
        self._made: queue.Queue[_Block | _Sha | BaseException] = queue.Queue(_BLOCKS_AHEAD)
        self._abandoned = False
        self._thread = threading.Thread(target=self._make, name="checkpoint-encode", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._abandoned = True
        while self._thread.is_alive():
            # It may wait for room to put something.
            while not self._made.empty():
                self._made.get()
            self._thread.join(0.01)

    def copy_next(self, write: Callable[[memoryview], object]) -> Listed:
        """Give the bytes of the next file to ``write``; what they were. What making it raised is raised here."""
        size = 0
        while isinstance(made := self._made.get(), _Block):
            if made.sha is not None:
                made.sha.update(made.data)
            size += made.data.nbytes
            write(made.data)
        if isinstance(made, BaseException):
            raise made
        return Listed(size, made.hexdigest())

    def _make(self) -> None:
        try:
            for put in self._files:
                sink = _Blocks(self._hand_over, lambda: self._made.qsize() >= _WELL_AHEAD)
                put(sink)
                self._hand_over(sink.end())
        except BaseException as error:  # noqa: BLE001, because who writes must hear of it, whatever it is
            if not self._abandoned:
                self._made.put(error)

    def _hand_over(self, made: _Block | _Sha) -> None:
        if self._abandoned:
            raise _Abandoned
        self._made.put(made)


class _Blocks:
    """
    A :class:`~streamlstm.recovery.snapshot.Sink` that makes blocks of one file, and hashes them if it is ``ahead`` when
    the first is ready.
    """

    def __init__(self, hand_over: Callable[[_Block], None], ahead: Callable[[], bool]) -> None:
        self._hand_over, self._ahead = hand_over, ahead
        self._held = bytearray()
        self._sha = hashlib.sha256()
        self._hashes: bool | None = None

    def write(self, data: bytes | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        if view.nbytes < _BLOCK:
            self._held += view
            if len(self._held) >= _BLOCK:
                self._flush()
        else:
            self._flush()
            for first in range(0, len(view), _BLOCK):
                self._put(view[first : first + _BLOCK])
        return view.nbytes

    def end(self) -> _Sha:
        """There is no more: the hash, whole once all blocks have been through."""
        self._flush()
        return self._sha

    def _flush(self) -> None:
        """What there is makes a block."""
        if self._held:
            held, self._held = self._held, bytearray()
            self._put(memoryview(held))

    def _put(self, data: memoryview) -> None:
        if self._hashes is None:
            self._hashes = self._ahead()
        if self._hashes:
            self._sha.update(data)
        self._hand_over(_Block(data, None if self._hashes else self._sha))
