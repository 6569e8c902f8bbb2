"""Who goes next: the partitions of a source take turns, and none waits while another is emptied."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """So many messages of the partition with this index."""

    partition: int
    messages: int


def take_turns(waiting: Sequence[int], first: int, limit: int) -> tuple[list[Turn], int]:
    """
    Who gives how many messages to the next cut of at most ``limit``, and who starts the one after.

    Partitions are visited once round, beginning with ``first``; those with messages waiting share the cut equally,
    so a busy one never holds back a quiet one. The next round begins with the one this round cut short or did not
    reach, or else one further, so that being first goes round as well.

    >>> take_turns([5, 0, 1, 9], first=0, limit=6)
    ([Turn(partition=0, messages=2), Turn(partition=2, messages=1), Turn(partition=3, messages=2)], 1)
    >>> take_turns([7, 7, 7], first=2, limit=2)
    ([Turn(partition=2, messages=1), Turn(partition=0, messages=1)], 1)
    """
    partitions = len(waiting)
    busy = sum(1 for count in waiting if count)
    quantum = -(-limit // busy) if busy else 0
    turns: list[Turn] = []
    left = limit
    for index in (*range(first, partitions), *range(first)):
        wanted = min(waiting[index], quantum)
        count = min(wanted, left)
        if count:
            turns.append(Turn(index, count))
            left -= count
        if count < wanted:
            return turns, index
    return turns, (first + 1) % partitions if partitions else 0
