"""
Ranges that are passed over: messages an operator had the chain go back for, to learn on without them.

They are dropped before decoding, live and in replay alike. The cut covers them, so that nothing is skipped unseen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from streamlstm.records.batch import Messages, Range, Unread


def drop_excluded(messages: Messages, excluded: Sequence[Range]) -> tuple[Messages, int]:
    """
    The messages outside the excluded ranges, their cut unchanged, and how many records were inside.

    A batch that could not be unpacked is dropped when all of it is inside, else it becomes what lies outside: from the
    first to the last such offset, of as many records as there can be.
    """
    keep = np.ones(len(messages), np.bool_)
    for i, r in enumerate(messages.cut):
        for x in excluded:
            if (x.topic, x.partition) == (r.topic, r.partition) and x.start < r.end and r.start < x.end:
                inside = (messages.range_index == i) & (messages.offset >= x.start) & (messages.offset < x.end)
                keep &= ~inside
    left = {m: _outside(batch, _on(messages, m, excluded)) for m, batch in messages.unread.items()}
    for m, batch in left.items():
        keep[m] = batch is not None
    clipped = {m: batch for m, batch in left.items() if batch is not None}
    if keep.all() and clipped == messages.unread:
        return messages, 0
    kept = np.flatnonzero(keep)
    new = {m: i for i, m in enumerate(kept.tolist())}
    offset = messages.offset.copy()
    for m, batch in clipped.items():
        offset[m] = batch.last
    rest = replace(
        messages,
        range_index=messages.range_index[kept],
        offset=offset[kept],
        broker_ns=messages.broker_ns[kept],
        key=[messages.key[i] for i in kept],
        value=[messages.value[i] for i in kept],
        headers=None if messages.headers is None else [messages.headers[i] for i in kept],
        unread={new[m]: batch for m, batch in clipped.items()},
    )
    return rest, _records(messages) - _records(rest)


def _on(messages: Messages, m: int, ranges: Sequence[Range]) -> list[Range]:
    """Those of the ranges that are of a message's partition."""
    topic, partition, _, _ = messages.cut[int(messages.range_index[m])]
    return [x for x in ranges if (x.topic, x.partition) == (topic, partition)]


def _outside(batch: Unread, excluded: Iterable[Range]) -> Unread | None:
    """What is left of a batch."""
    first, last, offsets = batch.first, batch.last, batch.last - batch.first + 1
    ranges = merge_ranges(excluded)
    for x in ranges:
        offsets -= max(0, min(x.end, batch.last + 1) - max(x.start, batch.first))
        if x.start <= first:
            first = max(first, x.end)
    for x in reversed(ranges):
        if x.end > last:
            last = min(last, x.start - 1)
    return batch._replace(first=first, last=last, records=min(batch.records, offsets)) if offsets else None


def _records(messages: Messages) -> int:
    return len(messages) + sum(batch.records - 1 for batch in messages.unread.values())


def outside_ranges(ranges: Iterable[Range], others: Iterable[Range]) -> tuple[Range, ...]:
    """
    The offsets of ``ranges`` that are not in ``others``, as few ranges, sorted.

    >>> outside_ranges([Range("t", 0, 2, 9)], [Range("t", 0, 3, 5), Range("t", 1, 0, 9)])
    (Range(topic='t', partition=0, start=2, end=3), Range(topic='t', partition=0, start=5, end=9))
    """
    left = merge_ranges(ranges)
    for x in others:
        cut: list[Range] = []
        for r in left:
            if (x.topic, x.partition) != (r.topic, r.partition):
                cut.append(r)
                continue
            pieces = (r._replace(end=min(r.end, x.start)), r._replace(start=max(r.start, x.end)))
            cut += [piece for piece in pieces if piece.start < piece.end]
        left = tuple(cut)
    return left


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """
    The same offsets as few ranges, sorted.

    >>> merge_ranges([Range("t", 0, 5, 9), Range("t", 1, 0, 2), Range("t", 0, 2, 5)])
    (Range(topic='t', partition=0, start=2, end=9), Range(topic='t', partition=1, start=0, end=2))
    """
    merged: list[Range] = []
    for r in sorted(ranges):
        last = merged[-1] if merged else None
        if last is not None and (last.topic, last.partition) == (r.topic, r.partition) and r.start <= last.end:
            merged[-1] = last._replace(end=max(last.end, r.end))
        else:
            merged.append(r)
    return tuple(merged)
