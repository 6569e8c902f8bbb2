"""What waits to be cut is a queue, however it came in and however it is taken out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streamlstm.transport.kafka.waiting import Records, Waiting


def records(first: int, count: int, *, headers: bool) -> Records:
    """``count`` of them, at every second offset from ``2 * first`` on, each with a value of its own."""
    offset = 2 * np.arange(first, first + count)
    value = [b"%d" % at for at in offset.tolist()]
    return Records(
        offset=offset,
        broker_ns=offset * 1000,
        key=[b"k", *[None] * (count - 1)],
        value=list(value),
        headers=[[("n", v)] for v in value] if headers else None,
        payload=[len(v) for v in value],
        leader_epoch=first,
    )


def values(taken: list[Records]) -> list[bytes | None]:
    return [value for piece in taken for value in piece.value]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.floats(0, 1))), st.integers(-1, 99))
def test_what_is_taken_is_the_oldest_of_what_waits(steps: list[tuple[int, bool, float]], offset: int) -> None:
    waiting, model, came = Waiting(), list[bytes](), 0
    for count, headers, share in steps:
        waiting.add(records(came, count, headers=headers))
        model += [b"%d" % (2 * at) for at in range(came, came + count)]
        came += count
        wanted = int(share * len(model))
        taken = waiting.take(wanted)
        assert values(taken) == model[:wanted]
        for piece in taken:
            assert piece.value == [b"%d" % at for at in piece.offset.tolist()]
            assert piece.payload == [len(v or b"") for v in piece.value]
            assert piece.headers is None or [[("n", v)] for v in piece.value] == piece.headers
            assert (piece.broker_ns == piece.offset * 1000).all()
            assert len(piece.key) == len(piece)
        del model[:wanted]
        assert len(waiting) == len(model)
        assert list(waiting.payloads()) == [len(v) for v in model]
        assert waiting.before(offset) == sum(int(v) < offset for v in model)
        assert waiting.size >= 100 * len(model)
    assert values(waiting.take(len(waiting))) == model
    assert waiting.size == 0


def test_what_is_forgotten_takes_no_room() -> None:
    waiting = Waiting()
    waiting.add(records(0, 5, headers=True))
    waiting.take(2)
    waiting.clear()
    assert (len(waiting), waiting.size, list(waiting.payloads()), waiting.before(99)) == (0, 0, [], 0)
    waiting.add(records(7, 2, headers=False))
    assert values(waiting.take(2)) == [b"14", b"16"]
