"""Partitions take turns, whatever waits in them."""

from hypothesis import given
from hypothesis import strategies as st

from streamlstm.transport.kafka.turns import take_turns

waiting = st.lists(st.integers(0, 50), min_size=1, max_size=12)


@given(waiting, st.integers(0, 11), st.integers(1, 40))
def test_a_cut_holds_as_much_as_its_limit_allows_and_no_partition_more_than_its_share(
    counts: list[int], first: int, limit: int
) -> None:
    turns, following = take_turns(counts, first % len(counts), limit)
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
        turns, first = take_turns(left, first, limit)
        for turn in turns:
            left[turn.partition] -= turn.messages
    assert not any(left)


@given(st.integers(2, 8), st.integers(1, 20))
def test_no_partition_waits_longer_than_once_round(partitions: int, limit: int) -> None:
    """All are busy without end: between two turns of one, each other has at most one more than once round takes."""
    first = 0
    since = [0] * partitions
    for _ in range(4 * partitions):
        turns, first = take_turns([1000] * partitions, first, limit)
        for p in range(partitions):
            since[p] += 1
        for turn in turns:
            since[turn.partition] = 0
        assert max(since) <= partitions


def test_a_quiet_partition_is_not_held_back_by_a_busy_one() -> None:
    turns, _ = take_turns([100_000, 1], first=0, limit=10)
    assert {turn.partition: turn.messages for turn in turns} == {0: 5, 1: 1}
