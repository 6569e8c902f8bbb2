from streamlstm.records.batch import Range
from streamlstm.recovery.joining import MOST_OFFSETS, MOST_STEPS, join_steps
from streamlstm.recovery.progress import RecordedStep


def recorded(count: int, size: int = 1, incarnation: str = "a", first: int = 1) -> list[RecordedStep]:
    return [
        RecordedStep(n, (Range("in", 0, n * size, (n + 1) * size),), "digest", incarnation)
        for n in range(first, first + count)
    ]


def numbers(joined: list[list[RecordedStep]]) -> list[list[int]]:
    return [[step.number for step in steps] for steps in joined]


def test_short_steps_are_joined_up_to_a_bound():
    sizes = [len(steps) for steps in join_steps(recorded(3 * MOST_STEPS + 5))]
    assert sizes == [MOST_STEPS] * 3 + [5]


def test_long_steps_stay_alone():
    assert [len(steps) for steps in join_steps(recorded(3, size=MOST_OFFSETS))] == [1, 1, 1]
    assert [len(steps) for steps in join_steps(recorded(4, size=MOST_OFFSETS // 2))] == [2, 2]
    assert [len(steps) for steps in join_steps(recorded(2, size=10 * MOST_OFFSETS))] == [1, 1]


def test_another_process_begins_another_group():
    steps = recorded(2) + recorded(2, incarnation="b", first=3)
    assert numbers(list(join_steps(steps))) == [[1, 2], [3, 4]]


def test_a_group_ends_where_it_is_asked_to():
    assert numbers(list(join_steps(recorded(5), ends={2, 4}))) == [[1, 2], [3, 4], [5]]


def test_some_are_left_alone():
    assert numbers(list(join_steps(recorded(5), alone=lambda step: step.number in (2, 5)))) == [[1], [2], [3, 4], [5]]


def test_nothing_is_nothing():
    assert list(join_steps([])) == []
