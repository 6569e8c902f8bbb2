"""
Ranges that are passed over: messages an operator had the chain go back for, to learn on without them.

They are dropped before decoding, live and in replay alike. The cut covers them, so that nothing is skipped unseen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from streamlstm.records.batch import Messages, Range


def drop_excluded(messages: Messages, excluded: Sequence[Range]) -> tuple[Messages, int]:
    """The messages outside the excluded ranges, their cut unchanged, and how many records were inside."""
    keep = np.ones(len(messages), np.bool_)
    for i, r in enumerate(messages.cut):
        for x in excluded:
            if (x.topic, x.partition) == (r.topic, r.partition) and x.start < r.end and r.start < x.end:
                inside = (messages.range_index == i) & (messages.offset >= x.start) & (messages.offset < x.end)
                keep &= ~inside
    if keep.all():
        return messages, 0
    kept = np.flatnonzero(keep)
    new = {m: i for i, m in enumerate(kept.tolist())}
    batches = sum(unread.records - 1 for m, unread in messages.unread.items() if m not in new)
    rest = replace(
        messages,
        range_index=messages.range_index[kept],
        offset=messages.offset[kept],
        broker_ns=messages.broker_ns[kept],
        key=[messages.key[i] for i in kept],
        value=[messages.value[i] for i in kept],
        headers=None if messages.headers is None else [messages.headers[i] for i in kept],
        unread={new[m]: unread for m, unread in messages.unread.items() if m in new},
    )
    return rest, len(messages) - len(kept) + batches


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
