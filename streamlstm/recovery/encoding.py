"""
The files of a generation, made in one thread, and hashed and written in another: neither processor nor disk waits.

Who writes stays in its own thread and does every file operation there, one after the other; what is made runs at most
four blocks ahead of it, each of which may hold on to the file it is part of.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Self

from streamlstm.recovery.manifest import Listed
from streamlstm.recovery.snapshot import Sink

_BLOCK = 8 << 20
_BLOCKS_AHEAD = 4


class _Abandoned(Exception):
    """Nobody wants the rest."""


class Encoder:
    """
    Makes files, each given by what writes it, ahead of who wants their bytes.

    To be used by ``with``, in the thread that writes; nothing is made after that.
    """

    def __init__(self, files: Iterable[Callable[[Sink], object]]) -> None:
        self._files = files
        self._made: queue.Queue[memoryview | BaseException | None] = queue.Queue(_BLOCKS_AHEAD)
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
        sha, size = hashlib.sha256(), 0
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            sha.update(made)
            size += made.nbytes
            write(made)
        return Listed(size, sha.hexdigest())

    def _make(self) -> None:
        try:
            for put in self._files:
                sink = _Blocks(self._hand_over)
                put(sink)
                sink.flush()
                self._hand_over(None)
        except BaseException as error:  # noqa: BLE001, because who writes must hear of it, whatever it is
            if not self._abandoned:
                self._made.put(error)

    def _hand_over(self, made: memoryview | None) -> None:
        if self._abandoned:
            raise _Abandoned
        self._made.put(made)


class _Blocks:
    """A :class:`~streamlstm.recovery.snapshot.Sink` that makes blocks."""

    def __init__(self, hand_over: Callable[[memoryview], None]) -> None:
        self._hand_over = hand_over
        self._held = bytearray()

    def write(self, data: bytes | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        if view.nbytes < _BLOCK:
            self._held += view
            if len(self._held) >= _BLOCK:
                self.flush()
        else:
            self.flush()
            for first in range(0, len(view), _BLOCK):
                self._hand_over(view[first : first + _BLOCK])
        return view.nbytes

    def flush(self) -> None:
        """There is no more, or what there is makes a block."""
        if self._held:
            held, self._held = self._held, bytearray()
            self._hand_over(memoryview(held))
