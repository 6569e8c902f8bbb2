"""
Columns, not objects: what crosses the borders between transport, decoding and the engine.

Axes: N records of a batch, M messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

Reason = Literal["decode", "schema", "mapping", "non_finite", "late", "future", "oversize", "codec"]
REASONS: tuple[Reason, ...] = (
    "decode",
    "schema",
    "mapping",
    "non_finite",
    "late",
    "future",
    "oversize",
    "codec",
)


class SeriesId(NamedTuple):
    """What names a series. The same key on another partition is another series."""

    topic: str
    partition: int
    key: str


class Range(NamedTuple):
    """Offsets ``start`` … ``end - 1`` of one partition; some of them may hold no record."""

    topic: str
    partition: int
    start: int
    end: int


Cut = tuple[Range, ...]
"""Offset ranges in the order they were consumed."""

Headers = list[tuple[str, bytes]]


class Unread(NamedTuple):
    """
    A batch of records that could not be unpacked: its offsets ``first`` … ``last``, how many ``records`` they hold,
    and ``why``.
    """

    first: int
    last: int
    records: int
    why: str


@dataclass(frozen=True, slots=True)
class Messages:
    """
    The M messages of one cut, as they were read: ranges in listed order, offsets ascending in a range.

    ``broker_ns`` is the broker's timestamp in ns since the epoch, -1 where there is none.
    ``headers`` is ``None`` when no message has any. ``unread`` says which messages stand for a whole batch that could
    not be unpacked: they have neither key nor value, and the batch's last offset.
    """

    cut: Cut
    range_index: I32
    offset: I64
    broker_ns: I64
    key: list[bytes | None]
    value: list[bytes | None]
    headers: list[Headers] | None = None
    unread: Mapping[int, Unread] = field(default_factory=dict[int, Unread])

    def __len__(self) -> int:
        return len(self.value)


class Rejected(NamedTuple):
    """
    One record that will not be forecast, and why. A value, not an exception.

    A message that cannot be decoded at all is one rejected record, row 0. ``path`` is the field at
    fault (``$.value``) or empty; ``message`` never holds payload. ``records`` is more than 1 for a batch that could
    not be unpacked, and then ``offset`` is its last.
    """

    topic: str
    partition: int
    offset: int
    row: int
    reason: Reason
    path: str
    message: str
    records: int = 1


def _none() -> I32:
    return np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """
    The N decoded records of one cut, in the cut's order; several of one message are its rows.

    ``series`` lists each distinct series once, in order of first appearance, and ``code`` says which one a
    record belongs to. ``target`` is NaN where the value is missing, and finite (also as a float32) otherwise.
    ``steps`` is how many steps the cut counts as: more than one where recorded cuts were joined.

    Tombstones are no records. ``skipped`` counts those that were passed over, whatever their meaning. Where they mean
    a reset, the series ``reset_code[i]`` starts anew before record ``reset_at[i]`` (ascending) or whatever
    comes after the batch; it may have no record here.
    """

    cut: Cut
    series: tuple[SeriesId, ...]
    code: I32
    range_index: I32
    offset: I64
    row: I32
    time_ns: I64
    broker_ns: I64
    target: F64
    rejected: tuple[Rejected, ...] = ()
    skipped: int = 0
    reset_at: I32 = field(default_factory=_none)
    reset_code: I32 = field(default_factory=_none)
    steps: int = 1

    def __len__(self) -> int:
        return len(self.code)

    @property
    def consumed(self) -> int:
        """All that the cut held: each of them ends as one outcome."""
        return len(self) + sum(r.records for r in self.rejected) + self.skipped
