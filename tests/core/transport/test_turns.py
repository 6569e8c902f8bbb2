"""Partitions take turns, whatever waits in them."""

from collections.abc import Iterable
from itertools import repeat

from hypothesis import given
from hypothesis import strategies as st

from streamlstm.transport.kafka.turns import take_turns

NO_LIMIT = 1 << 40

waiting = st.lists(st.integers(0, 50), min_size=1, max_size=12)

sized = st.lists(st.lists(st.integers(0, 60), max_size=12), min_size=1, max_size=8)


def ones(counts: list[int]) -> list[Iterable[int]]:
    """Every message has one byte."""
    return [repeat(1, count) for count in counts]


@given(waiting, st.integers(0, 11), st.integers(1, 40))
def test_a_cut_holds_as_much_as_its_limit_allows_and_no_partition_more_than_its_share(
    counts: list[int], first: int, limit: int
) -> None:
    turns, following = take_turns(counts, ones(counts), first % len(counts), limit, NO_LIMIT)
    busy = sum(1 for count in counts if count)
    share = -(-limit // max(1, busy))
    assert sum(turn.messages for turn in turns) <= limit
    assert all(1 <= turn.messages <= min(share, counts[turn.partition]) for turn in turns)
    assert len({turn.partition for turn in turns}) == len(turns)
    assert 0 <= following < len(counts)
    assert bool(turns) == bool(busy)


@given(waiting, st.integers(1, 40))
def test_every_message_gets_its_turn_within_a_bounded_number_of_cuts(counts: list[int], limit: int) -> None:
    left, first = list(counts), 0
    for _ in range(sum(counts) + len(counts)):
        turns, first = take_turns(left, ones(left), first, limit, NO_LIMIT)
        for turn in turns:
            left[turn.partition] -= turn.messages
    assert not any(left)


@given(st.integers(2, 8), st.integers(1, 20))
def test_no_partition_waits_longer_than_once_round(partitions: int, limit: int) -> None:
    """All are busy without end: between two turns of one, each other has at most one more than once round takes."""
    first = 0
    since = [0] * partitions
    for _ in range(4 * partitions):
        turns, first = take_turns([1000] * partitions, ones([1000] * partitions), first, limit, NO_LIMIT)
        for p in range(partitions):
            since[p] += 1
        for turn in turns:
            since[turn.partition] = 0
        assert max(since) <= partitions


def test_a_quiet_partition_is_not_held_back_by_a_busy_one() -> None:
    turns, _ = take_turns([100_000, 1], ones([100_000, 1]), first=0, limit=10, limit_bytes=NO_LIMIT)
    assert {turn.partition: turn.messages for turn in turns} == {0: 5, 1: 1}


@given(sized, st.integers(1, 40), st.integers(1, 100))
def test_no_cut_is_larger_than_its_bytes_and_every_message_gets_its_turn(
    sizes: list[list[int]], limit: int, limit_bytes: int
) -> None:
    left, first = [list(queue) for queue in sizes], 0
    while any(left):
        turns, first = take_turns([len(queue) for queue in left], left, first, limit, limit_bytes)
        taken = [size for turn in turns for size in left[turn.partition][: turn.messages]]
        assert taken
        assert len(taken) <= limit
        assert len(taken) == 1 or sum(taken) <= limit_bytes
        for turn in turns:
            del left[turn.partition][: turn.messages]


@given(st.lists(st.integers(1, 200), min_size=2, max_size=6), st.integers(1, 20), st.integers(1, 100))
def test_no_partition_waits_longer_than_once_round_for_one_with_large_messages(
    sizes: list[int], limit: int, limit_bytes: int
) -> None:
    """All are busy without end, each with messages of one size."""
    first, since = 0, [0] * len(sizes)
    for _ in range(4 * len(sizes)):
        queues = [repeat(size) for size in sizes]
        turns, first = take_turns([1000] * len(sizes), queues, first, limit, limit_bytes)
        since = [count + 1 for count in since]
        for turn in turns:
            since[turn.partition] = 0
        assert max(since) <= len(sizes)
