"""The clock of a series: each rule of it by itself, and all together against one record at a time."""

import itertools

import numpy as np
import pytest
import streams
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.records.batch import Range, RecordBatch, SeriesId
from streamlstm.series.admission import BEGINNING, Rules, Verdict, admit, clock_columns
from streamlstm.series.table import SeriesTable

FRESH, LATE, DUPLICATE, FUTURE = Verdict
LEAP = 1 << 32


def rules(**changed):
    base = {
        "k2": 6,
        "warm_age": 8,
        "learn_interval": False,
        "fixed_interval": 10,
        "gap_reset": None,
        "max_ahead": 1000,
        "ttl": None,
    }
    return Rules(**(base | changed))


def batch_of(records):
    """From (series, time, broker); without a time it is a tombstone."""
    names = list(dict.fromkeys(q for q, _, _ in records))
    resets = [(i - gone, q) for gone, (i, q) in enumerate((i, q) for i, (q, t, _) in enumerate(records) if t is None)]
    records = [record for record in records if record[1] is not None]
    count = len(records)
    return RecordBatch(
        cut=(Range("in", 0, 0, count),),
        series=tuple(SeriesId("in", 0, str(q)) for q in names),
        code=np.array([names.index(q) for q, _, _ in records], np.int32),
        range_index=np.zeros(count, np.int32),
        offset=np.arange(count),
        row=np.zeros(count, np.int32),
        time_ns=np.array([t for _, t, _ in records], np.int64),
        broker_ns=np.array([b for _, _, b in records], np.int64),
        target=np.zeros(count),
        reset_at=np.array([at for at, _ in resets], np.int32),
        reset_code=np.array([names.index(q) for _, q in resets], np.int32),
    )


def table_of(rule):
    return SeriesTable(clock_columns(rule.k2), "cpu")


def told(rule, times, table=None):
    """Verdicts of one series' times, and (n, m, interval) of the fresh ones."""
    admitted = admit(table_of(rule) if table is None else table, rule, batch_of([(0, t, -1) for t in times]))
    rows = zip(admitted.clock_M.tolist(), admitted.age_M.tolist(), admitted.interval_ns_M.tolist(), strict=True)
    return [Verdict(v) for v in admitted.verdict_N.tolist()], list(rows), admitted


def clocks(rule, times):
    return [n for n, _, _ in told(rule, times)[1]]


def test_the_first_record_has_clock_and_age_one_and_starts_a_carry():
    verdicts, rows, admitted = told(rules(), [500])
    assert verdicts == [FRESH]
    assert rows == [(1, 1, 10)]
    assert admitted.restart_M.tolist() == [True]
    assert admitted.gap_resets == 0


@pytest.mark.parametrize(("gap", "intervals"), [(1, 1), (10, 1), (14, 1), (15, 2), (24, 2), (25, 3), (1000, 100)])
def test_the_clock_advances_by_the_gap_in_intervals_rounded_half_up_and_at_least_one(gap, intervals):
    assert clocks(rules(), [0, gap]) == [1, 1 + intervals]


def test_rounding_is_exact_where_floats_are_not():
    interval = 2 * 10**15 + 2
    gap = 1001 * interval + interval // 2
    assert clocks(rules(fixed_interval=interval), [0, gap - 1]) == [1, 1002]
    assert clocks(rules(fixed_interval=interval), [0, gap]) == [1, 1003]


def test_the_age_counts_records_whatever_the_gap():
    assert [m for _, m, _ in told(rules(), [0, 10, 500, 507])[1]] == [1, 2, 3, 4]


def test_without_an_interval_the_clock_counts_records():
    assert told(rules(fixed_interval=0), [0, 10, 500, 507])[1] == [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 4, 0)]


def test_an_automatic_interval_is_the_lower_median_of_the_first_eight_gaps_from_the_next_record_on():
    gaps = [90, 10, 20, 80, 30, 70, 40, 60]
    times = [0, *itertools.accumulate(gaps)]
    rows = told(rules(learn_interval=True, fixed_interval=0), [*times, times[-1] + 100, times[-1] + 400])[1]
    # The ninth record completes the eight gaps and still counts as one; 40 is the fourth smallest of them.
    assert [interval for _, _, interval in rows] == [0] * 9 + [40, 40]
    assert [n for n, _, _ in rows] == [*range(1, 10), 9 + 3, 12 + 8]


def test_an_automatic_interval_stays_as_it_was_learnt():
    times = [10 * i for i in range(9)] + [80 + 1000 * i for i in range(1, 20)]
    rows = told(rules(learn_interval=True, fixed_interval=0), times)[1]
    assert rows[-1][2] == 10


def test_late_and_duplicate_records_are_no_gaps_of_an_automatic_interval():
    times = [0, 10, 5, 20, 20, 30, 40, 30, 50, 60, 70, 80, 90]
    rows = told(rules(learn_interval=True, fixed_interval=0), times)[1]
    assert [interval for _, _, interval in rows] == [0] * 9 + [10]


def test_a_timestamp_still_in_the_retained_window_is_a_duplicate():
    times = [10, 20, 30, 40, 50, 60, 70]
    assert told(rules(), [*times, 70, 50, 20])[0][-3:] == [DUPLICATE] * 3


def test_a_timestamp_that_has_left_the_retained_window_is_late():
    times = [10, 20, 30, 40, 50, 60, 70]
    assert told(rules(), [*times, 10])[0][-1] == LATE


def test_a_timestamp_between_those_retained_is_late():
    assert told(rules(), [10, 20, 30, 25, 5])[0][-2:] == [LATE, LATE]


def test_a_late_record_and_a_duplicate_move_nothing():
    table, other = table_of(rules()), table_of(rules())
    told(rules(), [10, 20, 30, 25, 20], table)
    told(rules(), [10, 20, 30], other)
    everybody = table.select(np.array([0]))
    for column in clock_columns(6):
        assert (table.gather(column.name, everybody) == other.gather(column.name, everybody)).all()


def test_a_silence_longer_than_gap_reset_restarts_the_age_and_the_clock_goes_on_by_one():
    verdicts, rows, admitted = told(rules(gap_reset=100), [0, 10, 111, 121])
    assert verdicts == [FRESH] * 4
    assert rows == [(1, 1, 10), (2, 2, 10), (3, 1, 10), (4, 2, 10)]
    assert admitted.restart_M.tolist() == [True, False, True, False]
    assert admitted.gap_resets == 1


def test_after_a_tombstone_the_age_restarts_and_the_clock_goes_on_by_one():
    verdicts, rows, admitted = told(rules(), [0, 10, None, None, 500, 510])
    assert verdicts == [FRESH] * 4
    assert rows == [(1, 1, 10), (2, 2, 10), (3, 1, 10), (4, 2, 10)]
    assert admitted.restart_M.tolist() == [True, False, True, False]
    assert (admitted.control_resets, admitted.gap_resets) == (1, 0)


def test_a_tombstone_after_the_last_record_waits_for_the_next():
    table = table_of(rules())
    assert told(rules(), [0, 10, None], table)[2].control_resets == 1
    assert told(rules(), [20, 30], table)[1] == [(3, 1, 10), (4, 2, 10)]


def test_a_tombstone_and_a_silence_are_one_reset():
    admitted = told(rules(gap_reset=100), [0, None, 500])[2]
    assert (admitted.control_resets, admitted.gap_resets) == (1, 0)


def test_a_tombstone_of_a_series_that_was_never_seen_makes_none():
    table = table_of(rules())
    assert told(rules(), [None], table)[2].control_resets == 0
    assert len(table) == 0


def test_what_came_before_a_tombstone_is_late_and_no_duplicate():
    assert told(rules(), [0, 10, None, 10, 5])[0][-2:] == [LATE, LATE]


def test_a_tombstone_resets_no_other_series():
    admitted = admit(
        table_of(rules()), rules(), batch_of([(0, 0, -1), (1, 0, -1), (0, None, -1), (0, 9, -1), (1, 9, -1)])
    )
    assert admitted.age_M.tolist() == [1, 1, 1, 2]


def test_a_silence_of_exactly_gap_reset_does_not_restart():
    assert told(rules(gap_reset=100), [0, 100])[2].gap_resets == 0


def test_a_reset_forgets_the_interval_and_its_gaps():
    rule = rules(gap_reset=1000, learn_interval=True, fixed_interval=0)
    times = [*(10 * i for i in range(10)), *(5000 + 50 * i for i in range(10))]
    rows = told(rule, times)[1]
    assert [interval for _, _, interval in rows] == [0] * 9 + [10] + [0] * 9 + [50]


def test_a_reset_forgets_some_of_eight_gaps_too():
    rule = rules(gap_reset=1000, learn_interval=True, fixed_interval=0)
    times = [*(10 * i for i in range(6)), *(5000 + 50 * i for i in range(10))]
    assert told(rule, times)[1][-1][2] == 50


def test_what_was_seen_before_a_reset_is_late_and_no_duplicate():
    assert told(rules(gap_reset=100), [0, 10, 500, 10, 500])[0][-2:] == [LATE, DUPLICATE]


def test_a_record_further_ahead_of_the_broker_than_max_ahead_is_future_and_moves_nothing():
    table = table_of(rules())
    admitted = admit(table, rules(), batch_of([(0, 2001, 1000), (0, 2000, 1000), (0, 1900, 1000), (0, 2010, 1010)]))
    assert admitted.verdict_N.tolist() == [FUTURE, FRESH, LATE, FRESH]
    assert admitted.clock_M.tolist() == [1, 2]


def test_a_record_without_a_broker_timestamp_is_never_future():
    assert told(rules(), [2**62])[0] == [FRESH]


def test_a_future_record_of_an_unknown_series_makes_no_series():
    table = table_of(rules())
    admit(table, rules(), batch_of([(0, 10**9, 0)]))
    assert len(table) == 0


def test_a_series_seen_ttl_ago_by_the_watermark_of_all_starts_anew():
    table = table_of(rules())
    rule = rules(ttl=100)
    admitted = admit(
        table, rule, batch_of([(0, 10, -1), (0, 20, -1), (1, 119, -1), (0, 30, -1), (1, 130, -1), (0, 5, -1)])
    )
    assert admitted.verdict_N.tolist() == [FRESH] * 5 + [LATE]
    admitted = admit(table, rule, batch_of([(0, 6, 230)]), admitted.watermark)
    assert admitted.verdict_N.tolist() == [FRESH]
    assert (admitted.forgotten_M.tolist(), admitted.restart_M.tolist(), admitted.watermark) == ([True], [True], 230)
    assert (admitted.age_M.tolist(), admitted.clock_M.tolist()) == ([1], [1])


def test_the_watermark_is_the_brokers_time_where_there_is_one():
    table = table_of(rules())
    assert admit(table, rules(), batch_of([(0, 900, 10), (0, 901, 7), (1, 50, -1)])).watermark == 50
    assert admit(table, rules(), batch_of([]), 33).watermark == 33


def test_the_same_key_on_another_partition_is_another_series():
    batch = batch_of([(0, 10, -1), (1, 5, -1), (0, 10, -1)])
    names = (SeriesId("in", 0, "a"), SeriesId("in", 1, "a"))
    columns = {name: getattr(batch, name) for name in batch.__slots__} | {"series": names}
    assert admit(table_of(rules()), rules(), RecordBatch(**columns)).verdict_N.tolist() == [FRESH, FRESH, DUPLICATE]


@pytest.mark.parametrize("times", [[-(2**63), 2**63 - 1], [-(2**63), -(2**63), -(2**63) + 1], [-1, 0, 1]])
def test_the_ends_of_time_overflow_no_clock(times):
    rule = rules(fixed_interval=1)
    verdicts, rows, _ = told(rule, times)
    fresh = sorted(set(times))
    assert verdicts == [FRESH if t not in times[:i] else DUPLICATE for i, t in enumerate(times)]
    assert rows[-1][1] == len(fresh)
    assert all(0 < n <= 1 + LEAP * len(fresh) for n, _, _ in rows)


def test_the_earliest_time_there_is_belongs_to_a_series_like_any_other():
    """It is no sign that a series was never seen."""
    table = table_of(rules())
    told(rules(), [-(2**63)], table)
    assert told(rules(), [-(2**63), -(2**63) + 10], table)[1] == [(2, 2, 10)]


def test_the_change_of_those_warming_adds_up():
    rule, table = rules(gap_reset=100), table_of(rules())
    assert told(rule, [10 * i for i in range(7)], table)[2].warming_change == 1
    assert told(rule, [70], table)[2].warming_change == -1
    assert told(rule, [80], table)[2].warming_change == 0
    assert told(rule, [1000], table)[2].warming_change == 1


class Told:
    """One series, one record at a time, all times kept."""

    def __init__(self, rule):
        self.rule, self.n, self.m, self.interval = rule, 0, 0, rule.fixed_interval
        self.times, self.gaps = [], []

    def take(self, t):
        if not self.times:
            self.times, self.n, self.m = [t], 1, 1
            return FRESH, True
        if t <= max(self.times):
            return (DUPLICATE if self.m and t in self.times[-min(self.m, self.rule.k2) :] else LATE), False
        gap = min(t - self.times[-1], 1 << 61)
        restart = not self.m or (self.rule.gap_reset is not None and gap > self.rule.gap_reset)
        if restart:
            self.n, self.m, self.gaps, self.interval = self.n + 1, 0, [], self.rule.fixed_interval
        elif self.interval:
            whole, rest = divmod(gap, self.interval)
            self.n += min(max(1, whole + (2 * rest >= self.interval)), LEAP)
        else:
            self.n += 1
        self.m += 1
        self.times.append(t)
        self.used = self.interval
        if self.rule.learn_interval and not restart:
            self.gaps = [*self.gaps, gap][:8]
            if len(self.gaps) == 8:
                self.interval = sorted(self.gaps)[3]
        return FRESH, restart


def naive(rule, records):
    """Verdicts, and rows of the fresh records."""
    series, verdicts, rows, resets, water = {}, [], [], 0, BEGINNING
    for q, t, broker in records:
        i = len(verdicts)
        if t is not None:
            water = max(water, t if broker < 0 else broker)
        if t is None:
            resets += q in series and series[q].m > 0
            if q in series:
                series[q].m = 0
        elif broker >= 0 and t - broker > rule.max_ahead:
            verdicts.append(FUTURE)
        else:
            if rule.ttl is not None and q in series and water - series[q].seen >= rule.ttl:
                del series[q]
            one = series.setdefault(q, Told(rule))
            one.used = one.interval
            verdict, restart = one.take(t)
            verdicts.append(verdict)
            if verdict == FRESH:
                one.seen = water
                rows.append((i, q, one.n, one.m, one.interval if restart else one.used, restart))
    warming = sum(one.m < rule.warm_age for one in series.values())
    return verdicts, rows, warming, resets


@st.composite
def logs(draw):
    """Few series, times that mostly advance, and every kind of nonsense between."""
    hostile = draw(st.booleans())
    now, records = {}, []
    ends = st.sampled_from([-(2**63), -(2**63) + 1, -1, 0, 2**61, 2**62, 2**63 - 2, 2**63 - 1])
    for _ in range(draw(st.integers(0, 120))):
        q = draw(st.integers(0, 4))
        kind = draw(st.integers(0, 21))
        if kind > 19:
            records.append((q, None, -1))
            continue
        if hostile and kind == 0:
            t = draw(ends)
        else:
            step = draw(st.integers(-40, 0)) if kind < 4 else draw(st.sampled_from([1, 4, 5, 10, 14, 15, 16, 60, 200]))
            t = max(-(2**63), min(2**63 - 1, now.get(q, 1000) + step))
        now[q] = max(now.get(q, t), t)
        broker = -1 if kind < 15 else max(0, min(2**63 - 1, t - draw(st.integers(-50, 1100))))
        records.append((q, t, broker))
    return records


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    records=logs(),
    interval=st.sampled_from(["auto", 0, 1, 10, 7 * 10**9]),
    gap_reset=st.sampled_from([None, 50, 2**60]),
    ttl=st.sampled_from([None, 1, 100, 2**62]),
    k2=st.integers(2, 9),
    cuts=st.lists(st.integers(0, 120), max_size=5),
)
def test_admission_in_batches_is_admission_record_by_record(records, interval, gap_reset, ttl, k2, cuts):
    rule = rules(
        k2=k2,
        learn_interval=interval == "auto",
        fixed_interval=0 if interval == "auto" else interval,
        gap_reset=gap_reset,
        ttl=ttl,
    )
    table, verdicts, rows, warming, resets, water = table_of(rule), [], [], 0, 0, BEGINNING
    bounds = sorted({0, len(records), *(c for c in cuts if c < len(records))})
    for start, end in itertools.pairwise(bounds):
        batch = batch_of(records[start:end])
        found = admit(table, rule, batch, water)
        water = found.watermark
        seen = len(verdicts)
        verdicts += [Verdict(v) for v in found.verdict_N.tolist()]
        slots = [int(table.series[slot].key) for slot in found.slot_M.tolist()]
        columns = (found.clock_M, found.age_M, found.interval_ns_M, found.restart_M)
        values = zip(*(column.tolist() for column in columns), strict=True)
        index = (found.record_M + seen).tolist()
        rows += [(i, q, *value) for i, q, value in zip(index, slots, values, strict=True)]
        warming += found.warming_change
        resets += found.control_resets
    assert (verdicts, rows, warming, resets) == naive(rule, records)


def test_the_configuration_is_taken_over_in_nanoseconds():
    config = streams.small_config(
        series={"interval": "1500ms", "gap_reset": "1h", "max_ahead": "1d", "ttl": "30d"},
        model={"horizons": 9, "season": 4},
        training={"k1": 4, "k2": 14},
    )
    assert Rules.of(config) == Rules(14, 18, False, 1_500_000_000, 3600 * 10**9, 86_400 * 10**9, 30 * 86_400 * 10**9)
