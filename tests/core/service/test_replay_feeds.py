from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import SECOND_NS, START_NS, make_messages, make_report, make_update

from streamlstm.engine.report import EXPERTS, Outcome, StepReport
from streamlstm.records.batch import Cut, Messages, Range, RecordBatch, Rejected, Unread
from streamlstm.recovery.progress import positions_after
from streamlstm.service.replay import Fed, Recorded, Tally, feed_merged, feed_recorded, feed_source, replay
from streamlstm.transport.interfaces import Position


class Script:
    """An engine that says what it is told to."""

    def __init__(self, reports: Sequence[StepReport]) -> None:
        self._reports = iter(reports)

    def step(self, batch: RecordBatch) -> StepReport:
        return next(self._reports)


def drive(reports: Sequence[StepReport], recorded: Sequence[str | None] = (), horizons: int = 1) -> tuple:
    told: list[StepReport] = []
    tally = Tally(horizons)
    digests = [*recorded, *[None] * (len(reports) - len(recorded))]
    feed = [Fed(make_messages([b""] * 4), digest) for digest in digests]
    replay(feed, lambda _: make_report().batch, Script(reports), tally, lambda r, _: told.append(r))
    return tally.summary, tally.scores.score(), told


def test_a_replay_adds_up_what_its_steps_say() -> None:
    outcome = [Outcome.FORECAST, Outcome.LATE, Outcome.WARMING, Outcome.SKIPPED]
    undecoded = Rejected("in", 0, 4, 0, "schema", "", "")
    reports = [
        make_report(outcome=outcome, horizons=1, undecoded=[undecoded], updates=[make_update(1)]),
        make_report(outcome=outcome, horizons=1, updates=[make_update(2, skipped=True)], step=2),
    ]
    summary, _, told = drive(reports)
    assert {o.name: n for o, n in summary.records.items() if n} == {
        "FORECAST": 2, "WARMING": 2, "LATE": 2, "SKIPPED": 2, "DEAD": 1,
    }  # fmt: skip
    assert (summary.messages, summary.steps, summary.updates, summary.skipped_updates) == (8, 2, 1, 1)
    assert summary.rejected == {"schema": 1}
    assert told == reports


def test_a_series_keeps_its_number_when_steps_list_it_elsewhere() -> None:
    """Series b is constant; were it taken for a, the scale of a would be wrong."""
    errors = np.ones((4, len(EXPERTS), 1))
    common = {"horizons": 1, "error": errors, "settled_offset": np.zeros((4, 1), np.int64)}
    reports = [
        make_report(keys=["a", "b"], target=[1, 5, 3, 5], **common),
        make_report(keys=["b", "a"], target=[5, 1, 5, 3], **common),
    ]
    tally = Tally(1, standardise=4)
    feed = [Fed(make_messages([b""] * 4))] * 2
    replay(feed, lambda _: make_report().batch, Script(reports), tally, lambda *_: None)
    assert tally.scores.score().left_out == 1
    assert tally.scores.score().pairs_XK1[0, 0] == 4
    assert tally.scores.score().mse_XK1[0, 0] == 1.0


def test_steps_with_another_digest_than_recorded_are_counted() -> None:
    reports = [make_report(horizons=1), make_report(horizons=1, step=2)]
    summary, _, _ = drive(reports, [reports[0].digest().hex(), "00" * 32])
    assert (summary.compared, summary.differing) == (2, 1)


def test_a_step_without_forecasts_is_no_trouble() -> None:
    summary, score, _ = drive([make_report(records=0, keys=[], horizons=1)])
    assert summary.steps == 1
    assert score.pairs_XK1[0, 0] == 0


def test_a_feed_ends_with_its_source_or_at_the_limit() -> None:
    asked: list[int] = []

    def poll(count: int) -> Messages | None:
        asked.append(count)
        return make_messages([b"x"] * count) if len(asked) <= 3 else None

    assert [len(f.messages) for f in feed_source(poll, 10)] == [10, 10, 10]
    asked.clear()
    assert [len(f.messages) for f in feed_source(poll, 10, limit=25)] == [10, 10, 5]
    assert asked == [10, 10, 5]


class Log:
    """Partitions with holes, read as Kafka is."""

    def __init__(self, partitions: dict[int, list[tuple[int, int]]]) -> None:
        self.partitions = partitions
        self.reads = 0

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        self.reads += 1
        (where,) = cut
        inside = [(o, t) for o, t in self.partitions[where.partition] if where.start <= o < where.end]
        return make_messages(
            [b"%d-%d" % (where.partition, o) for o, _ in inside],
            cut=cut,
            offset=np.array([o for o, _ in inside], np.int64),
            broker_ns=np.array([t for _, t in inside], np.int64),
            headers=[[("o", b"%d" % o)] for o, _ in inside] if where.partition else None,
        )


def naive_merge(partitions: dict[int, list[tuple[int, int]]]) -> list[bytes]:
    """Take the head with the least (time, partition, offset), again and again."""
    left = {p: list(messages) for p, messages in partitions.items()}
    order = []
    while any(left.values()):
        p = min((q for q in left if left[q]), key=lambda q: (left[q][0][1], q, left[q][0][0]))
        order.append(b"%d-%d" % (p, left[p].pop(0)[0]))
    return order


@st.composite
def logs(draw: st.DrawFn) -> dict[int, list[tuple[int, int]]]:
    partitions = {}
    for p in range(draw(st.integers(1, 3))):
        offsets = sorted(draw(st.sets(st.integers(0, 30), max_size=12)))
        partitions[p] = [(o, draw(st.integers(0, 5))) for o in offsets]
    return partitions


@given(logs(), st.integers(1, 7), st.none() | st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_partitions_are_merged_by_their_heads(
    partitions: dict[int, list[tuple[int, int]]], size: int, limit: int | None
) -> None:
    log = Log(partitions)
    starts = [Position("in", p, 0) for p in partitions]
    ends = [Position("in", p, 31) for p in partitions]
    cuts = [fed.messages for fed in feed_merged(log, starts, ends, 1.0, size, limit)]
    assert [value for m in cuts for value in m.value] == naive_merge(partitions)[:limit]
    assert all(len(m) <= size for m in cuts)
    # What makes it a cut: every range starts where its partition's last one ended, and holds its own messages.
    position = dict.fromkeys(partitions, 0)
    for m in cuts:
        assert sorted(m.range_index.tolist()) == m.range_index.tolist()
        for i, r in enumerate(m.cut):
            assert r.start == position[r.partition]
            position[r.partition] = r.end
            offsets = m.offset[m.range_index == i].tolist()
            assert offsets == sorted(offsets)
            assert all(r.start <= o < r.end for o in offsets)
            assert offsets[-1] == r.end - 1
        if m.headers:
            assert all(h == [] or h == [("o", b"%d" % o)] for h, o in zip(m.headers, m.offset.tolist(), strict=True))


@given(logs(), st.integers(1, 7), st.lists(st.integers(1, 4), max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_merge_goes_on_from_positions_alone(
    partitions: dict[int, list[tuple[int, int]]], size: int, lives: list[int]
) -> None:
    """Cut after any steps, as often as one likes: the steps that follow are those of a merge that was never cut."""
    log = Log(partitions)
    starts, ends = [Position("in", p, 0) for p in partitions], [Position("in", p, 31) for p in partitions]
    whole = [fed.messages for fed in feed_merged(log, starts, ends, 1.0, size)]
    pieces: list[Messages] = []
    at: Sequence[Position] = starts
    for steps in [*lives, 99]:
        life = [fed.messages for fed in islice(feed_merged(log, at, ends, 1.0, size), steps)]
        pieces += life
        at = positions_after(at, [m.cut for m in life])
    assert [(m.cut, m.value, m.offset.tolist(), m.range_index.tolist()) for m in pieces] == [
        (m.cut, m.value, m.offset.tolist(), m.range_index.tolist()) for m in whole
    ]


def test_a_partition_far_behind_does_not_make_the_others_pile_up() -> None:
    log = Log({0: [(o, 0) for o in range(5000)], 1: [(o, 10) for o in range(5000)]})
    positions = [Position("in", p, 0) for p in (0, 1)], [Position("in", p, 5000) for p in (0, 1)]
    feed = feed_merged(log, *positions, 1.0, 100)
    next(feed)
    assert log.reads == 2


class LogWithJunk(Log):
    """Its last message of a piece stands for a batch."""

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        read = super().read(cut, timeout_s)
        at = len(read) - 1
        read.value[at] = None
        return replace(read, unread={at: Unread(int(read.offset[at]) - 4, int(read.offset[at]), 5, "not gzip")})


def test_a_batch_that_could_not_be_unpacked_is_merged_as_one() -> None:
    log = LogWithJunk({0: [(0, 0), (9, 1)], 1: [(0, 0), (7, 2), (19, 3)]})
    positions = [Position("in", p, 0) for p in (0, 1)], [Position("in", p, 20) for p in (0, 1)]
    cuts = [fed.messages for fed in feed_merged(log, *positions, 1.0, 4)]
    assert [{m: one[:3] for m, one in cut.unread.items()} for cut in cuts] == [{2: (5, 9, 5)}, {0: (15, 19, 5)}]
    assert all(cut.value[m] is None for cut in cuts for m in cut.unread)


def test_recorded_cuts_are_read_as_they_were() -> None:
    log = Log({0: [(o, 0) for o in range(9)]})
    fed = list(
        feed_recorded([Recorded((Range("in", 0, 0, 4),), "aa"), Recorded((Range("in", 0, 4, 9),), "bb")], log, 1.0)
    )
    assert [(len(f.messages), f.digest) for f in fed] == [(4, "aa"), (5, "bb")]


@pytest.mark.parametrize("times", [[START_NS], [START_NS, START_NS + SECOND_NS]])
def test_the_scores_of_a_replay_are_those_of_its_reports(times: list[int]) -> None:
    n = len(times)
    report = make_report(
        records=n, horizons=1, time_ns=times,
        error=np.full((n, len(EXPERTS), 1), 2.0), settled_offset=np.zeros((n, 1), np.int64),
    )  # fmt: skip
    _, score, _ = drive([report])
    assert score.mse_XK1[0, 0] == 4.0
    assert score.pairs_XK1[0, 1] == n
