"""Who goes next: the partitions of a source take turns, and none waits while another is emptied."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple


class Turn(NamedTuple):
    """So many messages of the partition with this index."""

    partition: int
    messages: int


def take_turns(
    waiting: Sequence[int], sizes: Sequence[Iterable[int]], first: int, limit: int, limit_bytes: int
) -> tuple[list[Turn], int]:
    """
    Who gives how many messages to the next cut of at most ``limit``, and who starts the one after.

    ``waiting`` counts the messages of each partition, and ``sizes`` are their bytes, oldest first. A cut has at most
    ``limit_bytes``, too, unless its only message is larger than that.

    Partitions are visited once round, beginning with ``first``; those with messages waiting share the cut equally,
    by number and by bytes, though one message is never too large for a share. So a busy one never holds back a quiet
    one. The next round begins with the one this round cut short or did not reach, or else one further, so that being
    first goes round as well.

    >>> take_turns([5, 0, 1, 9], [[1] * 5, [], [1], [1] * 9], first=0, limit=6, limit_bytes=100)
    ([Turn(partition=0, messages=2), Turn(partition=2, messages=1), Turn(partition=3, messages=2)], 1)
    >>> take_turns([7, 7, 7], [[1] * 7] * 3, first=2, limit=2, limit_bytes=100)
    ([Turn(partition=2, messages=1), Turn(partition=0, messages=1)], 1)
    >>> take_turns([7, 7, 7], [[10] * 7, [30] * 7, [90] * 7], first=0, limit=9, limit_bytes=90)
    ([Turn(partition=0, messages=3), Turn(partition=1, messages=1)], 2)
    >>> take_turns([2], [[500, 1]], first=0, limit=9, limit_bytes=90)
    ([Turn(partition=0, messages=1)], 0)
    """
    partitions = len(waiting)
    busy = sum(1 for count in waiting if count)
    quantum, share = (-(-limit // busy), -(-limit_bytes // busy)) if busy else (0, 0)
    turns: list[Turn] = []
    left, left_bytes = limit, limit_bytes
    for index in (*range(first, partitions), *range(first)):
        wanted = min(waiting[index], quantum)
        count = taken_bytes = 0
        short = False
        for size in islice(sizes[index], wanted):
            if count and taken_bytes + size > share:
                break
            short = count == left or (taken_bytes + size > left_bytes and bool(turns or count))
            if short:
                break
            count += 1
            taken_bytes += size
        if count:
            turns.append(Turn(index, count))
            left -= count
            left_bytes -= taken_bytes
        if short:
            return turns, index
    return turns, (first + 1) % partitions if partitions else 0
