import numpy as np
import pytest

from streamlstm.records.batch import Messages, Range, Unread
from streamlstm.recovery.exclusions import drop_excluded


def messages() -> Messages:
    cut = (Range("in", 0, 2, 6), Range("in", 1, 0, 3), Range("in", 0, 6, 8))
    index = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2], np.int32)
    offset = np.array([2, 3, 4, 5, 0, 1, 2, 6, 7], np.int64)
    values = [b"%d" % at for at in range(9)]
    return Messages(cut, index, offset, offset * 10, list(values), list(values), [[] for _ in values])


def test_messages_in_an_excluded_range_are_dropped_and_the_cut_stays():
    kept, dropped = drop_excluded(messages(), [Range("in", 0, 4, 7)])

    assert dropped == 3
    assert kept.cut == messages().cut
    assert kept.value == [b"0", b"1", b"4", b"5", b"6", b"8"]
    assert kept.offset.tolist() == [2, 3, 0, 1, 2, 7]
    assert kept.range_index.tolist() == [0, 0, 1, 1, 1, 2]
    assert kept.broker_ns.tolist() == [20, 30, 0, 10, 20, 70]
    assert len(kept.key) == len(kept.headers or []) == 6


def test_another_partition_or_topic_is_not_touched():
    same = messages()

    assert drop_excluded(same, [Range("in", 2, 0, 99), Range("out", 0, 0, 99), Range("in", 0, 8, 9)]) == (same, 0)


def test_all_of_a_cut_may_be_excluded():
    kept, dropped = drop_excluded(messages(), [Range("in", 0, 0, 99), Range("in", 1, 0, 99)])

    assert dropped == 9
    assert len(kept) == len(kept.offset) == 0
    assert kept.cut == messages().cut


def test_a_batch_that_could_not_be_unpacked_is_dropped_with_all_its_records() -> None:
    cut = (Range("in", 0, 0, 20),)
    bomb, junk = Unread(3, 7, 5, "too large"), Unread(10, 14, 5, "not gzip")
    given = Messages(
        cut=cut,
        range_index=np.zeros(3, np.int32),
        offset=np.array([2, 7, 14]),
        broker_ns=np.full(3, -1),
        key=[None] * 3,
        value=[b"x", None, None],
        unread={1: bomb, 2: junk},
    )
    rest, dropped = drop_excluded(given, [Range("in", 0, 3, 8)])
    assert dropped == 5
    assert rest.offset.tolist() == [2, 14]
    assert rest.unread == {1: junk}


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        ([(0, 10), (15, 20)], (10, 14, 5)),
        ([(8, 12)], (12, 14, 3)),
        ([(10, 12)], (12, 14, 3)),
        ([(13, 20)], (10, 12, 3)),
        ([(11, 13)], (10, 14, 3)),
        ([(13, 20), (8, 11)], (11, 12, 2)),
        ([(10, 11), (11, 12)], (12, 14, 3)),
        ([(12, 20), (10, 12)], None),
        ([(0, 99)], None),
    ],
)
def test_of_a_batch_that_could_not_be_unpacked_only_what_is_outside_is_left(excluded, left) -> None:
    """Offsets 10 to 14, and a record before it and behind it."""
    given = Messages(
        cut=(Range("in", 0, 0, 20),),
        range_index=np.zeros(3, np.int32),
        offset=np.array([7, 14, 15]),
        broker_ns=np.full(3, -1),
        key=[None] * 3,
        value=[b"x", None, b"y"],
        unread={1: Unread(10, 14, 5, "not gzip")},
    )
    ranges = [Range("in", 0, *r) for r in excluded]

    rest, dropped = drop_excluded(given, [*ranges, Range("in", 1, 0, 99)])

    assert list(rest.unread.values()) == ([] if left is None else [Unread(*left, "not gzip")])
    around = [at for at in (7, 15) if not any(r.start <= at < r.end for r in ranges)]
    assert sorted(rest.offset.tolist()) == sorted(around + ([] if left is None else [left[1]]))
    assert len(rest.key) == len(rest.value) == len(rest)
    assert dropped + len(around) + (left[2] if left else 0) == 7
