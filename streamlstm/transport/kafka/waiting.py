"""
What was read of a partition and waits to be cut: records as columns, handed on in the pieces in which they came.

Axes: N records of a piece.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from streamlstm.records.batch import I64, Headers, Unread

_RECORD_BYTES = 100
_HEADER_BYTES = 100
"""What an object costs beside the bytes in it, roughly."""


@dataclass(slots=True)
class Records:
    """
    N records of one partition as they follow each other, of batches that one leader wrote.

    ``broker_ns`` is -1 where the broker's timestamp is no time of this world, and ``payload`` the bytes of key and
    value. ``headers`` is ``None`` when no record has any. With ``unread`` they are one, which stands for a whole batch
    at its last offset.
    """

    offset: I64
    broker_ns: I64
    key: list[bytes | None]
    value: list[bytes | None]
    headers: list[Headers] | None
    payload: list[int]
    leader_epoch: int
    unread: Unread | None = None

    def __len__(self) -> int:
        return len(self.value)

    def part(self, start: int, stop: int) -> "Records":
        """Those from ``start`` to before ``stop``."""
        if start == 0 and stop >= len(self):
            return self
        some = slice(start, stop)
        headers = None if self.headers is None else self.headers[some]
        return Records(
            self.offset[some], self.broker_ns[some], self.key[some], self.value[some], headers, self.payload[some],
            self.leader_epoch, self.unread,
        )  # fmt: skip

    def size(self) -> int:
        """Bytes in memory, roughly."""
        size = sum(self.payload) + _RECORD_BYTES * len(self)
        for headers in self.headers or ():
            for name, value in headers:
                size += len(name) + len(value) + _HEADER_BYTES
        return size


class Waiting:
    """
    Records in the order they came. Its length is their number; ``size`` is what they hold in memory.

    >>> def records(*offsets):
    ...     at = np.array(offsets)
    ...     return Records(at, at, [None] * len(at), [b"v"] * len(at), None, [1] * len(at), 0)
    >>> import numpy as np
    >>> waiting = Waiting()
    >>> waiting.add(records(3, 4, 7))
    >>> waiting.add(records(8))
    >>> len(waiting), waiting.before(8), list(waiting.payloads())
    (4, 3, [1, 1, 1, 1])
    >>> [taken.offset.tolist() for taken in waiting.take(2)], [taken.offset.tolist() for taken in waiting.take(2)]
    ([[3, 4]], [[7], [8]])
    >>> len(waiting), waiting.size
    (0, 0)
    """

    def __init__(self) -> None:
        self._pieces = deque[Records]()
        self._sizes = deque[int]()
        self._at = 0
        """How many records of the first piece were taken; it is held, and counted in ``size``, until all are."""
        self._count = 0
        self.size = 0

    def __len__(self) -> int:
        return self._count

    def add(self, records: Records) -> None:
        """Put them behind the others."""
        self._pieces.append(records)
        self._sizes.append(size := records.size())
        self._count += len(records)
        self.size += size

    def clear(self) -> None:
        """Forget them all."""
        self._pieces.clear()
        self._sizes.clear()
        self._at = self._count = self.size = 0

    def take(self, count: int) -> list[Records]:
        """The oldest ``count`` records, of which there must be so many."""
        taken: list[Records] = []
        self._count -= count
        while count:
            piece = self._pieces[0]
            some = piece.part(self._at, self._at + count)
            taken.append(some)
            count -= len(some)
            self._at += len(some)
            if self._at == len(piece):
                self._pieces.popleft()
                self.size -= self._sizes.popleft()
                self._at = 0
        return taken

    def payloads(self) -> Iterator[int]:
        """Bytes of key and value of each, oldest first."""
        return islice(chain.from_iterable(piece.payload for piece in self._pieces), self._at, None)

    def before(self, offset: int) -> int:
        """How many have a smaller offset."""
        if not self._pieces:
            return 0
        taken = int((self._pieces[0].offset[: self._at] < offset).sum())
        return sum(int((piece.offset < offset).sum()) for piece in self._pieces) - taken
