"""The update queue against its rules told record by record."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.engine.schedule import Fire, Join, UpdateQueue


class Told:
    """The rules of the queue in the order of the text, one record at a time."""

    def __init__(self, k1, batch_series, max_wait):
        self.k1, self.batch_series, self.max_wait = k1, batch_series, max_wait
        self.queue, self.fresh, self.newest = [], 0, {}
        self.wanted = self.quiet = 0

    def record(self, slot, joins):
        self.fresh += 1
        self.newest[slot] = self.fresh
        fired = []

        def fire(rule):
            fired.append((rule, len(self.queue)))
            self.queue = []

        if joins:
            if slot in [s for s, _ in self.queue]:
                fire("B")
            if not self.queue:
                series = sum(r > self.fresh - self.max_wait for r in self.newest.values())
                self.wanted, self.quiet = min(self.batch_series, series), max(series, 4 * self.k1)
            self.queue.append((slot, self.fresh))
        if joins and len(self.queue) >= self.wanted:
            fire("A")
        elif self.queue and self.fresh - self.queue[0][1] >= self.max_wait:
            fire("C")
        elif self.queue and self.fresh - self.queue[-1][1] >= self.quiet:
            fire("D")
        return fired


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    records=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=150),
    k1=st.integers(1, 4),
    batch_series=st.sampled_from([1, 2, 4, 64]),
    max_wait=st.sampled_from([1, 2, 7, 30, 500]),
    cuts=st.lists(st.integers(0, 150), max_size=6),
)
def test_a_plan_fires_what_the_rules_fire_record_by_record(records, k1, batch_series, max_wait, cuts):
    told = Told(k1, batch_series, max_wait)
    expected = [
        (i, rule, windows)
        for i, (slot, dice) in enumerate(records)
        for rule, windows in told.record(slot, joins=dice < 4)
    ]
    queue, planned = UpdateQueue(k1, batch_series, max_wait), []
    bounds = sorted({0, len(records), *(c for c in cuts if c < len(records))})
    for start, end in itertools.pairwise(bounds):
        joins = [Join(i - start, records[i][0]) for i in range(start, end) if records[i][1] < 4]

        def seen(position, start=start):
            newest = {slot: i + 1 for i, (slot, _) in enumerate(records[: start + position + 1])}
            return sum(r > start + position + 1 - max_wait for r in newest.values())

        fires = queue.plan(start, end - start, joins, seen)
        planned += [(start + f.position, f.rule, f.windows) for f in fires]
    assert planned == expected
    assert len(queue.slots) == len(told.queue)


def test_a_series_that_comes_round_again_fires_before_it_joins():
    queue = UpdateQueue(k1=4, batch_series=9, max_wait=1000)
    assert queue.plan(0, 8, [Join(3, 0), Join(7, 0)], lambda _: 5) == [Fire(7, 1, "B")]
    assert queue.slots == [0]


def test_lockstep_series_learn_together_once_all_are_here():
    queue = UpdateQueue(k1=4, batch_series=256, max_wait=4096)
    joins = [Join(i, i) for i in range(7)]
    assert queue.plan(0, 7, joins, lambda _: 7) == [Fire(6, 7, "A")]
