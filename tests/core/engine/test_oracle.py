"""
The engine against the rules told naively: one record, one series at a time, plain Python and float64, no blocks.

It keeps everything that ever happened and looks things up by clock; nothing of the engine is used but its report.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import streams
import torch

from streamlstm.engine.core import Engine, _Queued
from streamlstm.engine.report import Outcome
from streamlstm.engine.state import EngineState
from streamlstm.learning.tbptt import targets
from streamlstm.records.batch import Range, RecordBatch, SeriesId

NAN = math.nan
LIFE_SHARE, MEAN_SHARE, FLOOR = 0.05, 1e-7, 1e-30


@dataclasses.dataclass
class Made:
    """A record of a series, and the forecast issued by it."""

    offset: int
    n: int
    m: int
    y: float
    base: float
    scale: float
    yhat: list[float]


class OneSeries:
    """All that is known of a series, with nothing forgotten but by a reset."""

    def __init__(self, interval):
        self.fixed = interval
        self.interval, self.gaps = interval, []
        self.times, self.n, self.m = [], 0, 0
        self.records: list[Made] = []
        self.h = self.c = None
        self.reset = False
        self.count, self.mean, self.variance, self.values = 0, 0.0, 0.0, []
        self.last = self.before = NAN

    def at(self, n):
        return next((r for r in reversed(self.records) if r.n == n), None)

    def value(self, n):
        found = self.at(n)
        return NAN if found is None else found.y


class Naive:
    """Admit, settle, forecast; and the queue's joins and fires, as the text says them."""

    def __init__(self, config, weights):
        self.config, self.w = config, {k.removeprefix("lstm."): v.double().numpy() for k, v in weights.items()}
        self.k1, self.k2, self.K = config.training.k1, config.k2, config.model.horizons
        self.series: dict[SeriesId, OneSeries] = {}
        self.fresh, self.seen, self.queue, self.water = 0, {}, [], -(1 << 63)
        self.facts, self.updates, self.outcomes = [], [], []

    def record(self, name, offset, t, broker, y):
        s = self.config.series
        self.water = max(self.water, t if broker < 0 else broker)
        if broker >= 0 and t > broker + round(s.max_ahead * 1e9):
            self.outcomes.append(Outcome.DEAD)
            return
        if s.ttl is not None and name in self.series and self.water - self.series[name].seen >= round(s.ttl * 1e9):
            del self.series[name]
        fixed = round(s.interval * 1e9) if isinstance(s.interval, float) else 0
        one = self.series.setdefault(name, OneSeries(fixed))
        if one.times and t <= one.times[-1]:
            same = not one.reset and t in one.times[-min(one.m, self.k2) :]
            late = Outcome.DEAD if s.late == "dead_letter" else Outcome.LATE
            self.outcomes.append(Outcome.DUPLICATE if same else late)
            return
        one.seen = self.water
        used = self.place(one, t)
        self.outcomes.append(Outcome.WARMING if one.m < max(self.k2, 2 * self.K) else Outcome.FORECAST)
        self.measure(one, y)
        errors, issued = self.settle(one, y)
        self.forecast(one, offset, t, y)
        self.fresh += 1
        number = len(self.updates)
        self.learn(name, one)
        self.facts.append((offset, one.n, one.m, used, number, errors, issued, one.records[-1].yhat))

    def place(self, one, t):
        s = self.config.series
        gap = t - one.times[-1] if one.times else None
        restart = gap is None or one.reset or (s.gap_reset is not None and gap > round(s.gap_reset * 1e9))
        if restart:
            one.n, one.m, one.records, one.gaps, one.interval = one.n + 1, 0, [], [], one.fixed
            one.h = one.c = np.zeros(self.config.model.hidden_size)
            one.reset = False
        elif one.interval:
            one.n += max(1, (2 * gap + one.interval) // (2 * one.interval))
        else:
            one.n += 1
        one.m += 1
        one.times.append(t)
        used = one.interval
        if s.interval == "auto" and not restart and len(one.gaps) < 8:
            one.gaps.append(gap)
            if len(one.gaps) == 8:
                one.interval = sorted(one.gaps)[3]
        return used

    def measure(self, one, y):
        one.before = one.last
        if math.isnan(y):
            return
        season = self.config.season
        alpha = 1 / (7 * season) if season else 0.01
        one.count += 1
        w = max(1 / one.count, alpha)
        error = y - one.mean
        one.mean, one.variance = one.mean + w * error, (1 - w) * (one.variance + w * error * error)
        one.values.append(y)
        one.last = y
        if one.count == 1:
            one.before = y

    def settle(self, one, y):
        season, errors, issued = self.config.season, np.full((3, self.K), NAN), [-1] * self.K
        for j in range(1, self.K + 1):
            made = one.at(one.n - j)
            if made is None or math.isnan(y) or math.isnan(made.base):
                continue
            back = one.value(one.n - -(-j // season) * season) if season else NAN
            seasonal = made.base if math.isnan(back) else back
            errors[:, j - 1] = y - made.yhat[j - 1], y - made.base, y - seasonal
            issued[j - 1] = made.offset
        return errors, issued

    def forecast(self, one, offset, t, y):
        life = np.std(one.values) if one.values else 0.0
        scale = math.sqrt(one.variance) + LIFE_SHARE * life + MEAN_SHARE * abs(one.mean) + FLOOR
        base = one.last
        one.records.append(Made(offset, one.n, one.m, y, base, scale, [NAN] * self.K))
        x = [(base - one.mean) / scale, 3 * (base - one.before) / scale]
        season = self.config.season
        if season:
            # At up to eight places of the coming horizons: the last season, then the mean of up to seven.
            places = np.unique(np.linspace(1, self.K, min(self.K, 8)).astype(int)).tolist()
            several = [[one.value(one.n + p - (-(-p // season) + k) * season) for k in range(7)] for p in places]
            known = [[v for v in of if not math.isnan(v)] for of in several]
            x += [(of[0] - base) / scale for of in several]
            x += [(sum(of) / len(of) if of else NAN) / scale - base / scale for of in known]
        x = [0.0 if math.isnan(v) else max(-6.0, min(6.0, v)) for v in x]
        x.append(float(math.isnan(y)))
        for phase in self.config.model.calendar:
            minutes = {"hour": 1440, "weekday": 7 * 1440}[phase]
            angle = 2 * math.pi * (t // 60_000_000_000 % minutes) / minutes
            x += [math.sin(angle), math.cos(angle)]
        z = np.concatenate([x, one.h]) @ self.w["gates"] + self.w["gate_bias"]
        i, f, g, o = np.split(z, 4)
        sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731, because it is a formula
        one.c = sigmoid(f) * one.c + sigmoid(i) * np.tanh(g)
        one.h = sigmoid(o) * np.tanh(one.c)
        one.records[-1].yhat = (base + scale * (one.h @ self.w["head"] + self.w["head_bias"])).tolist()

    def learn(self, name, one):
        training = self.config.training
        self.seen[name] = self.fresh
        if not training.enabled:
            return
        joins = one.m % self.k1 == 0 and one.m >= self.k2
        if joins:
            window = (name, self.fresh, [r.n for r in one.records[-self.k2 :]], [r.y for r in one.records[-self.k2 :]])
            if name in [w[0] for w in self.queue]:
                self.fire("B")
            if not self.queue:
                series = sum(r > self.fresh - training.max_wait for r in self.seen.values())
                self.wanted, self.quiet = min(training.batch_series, series), max(series, 4 * self.k1)
            self.queue.append(window)
        if joins and len(self.queue) >= self.wanted:
            self.fire("A")
        elif self.queue and self.fresh - self.queue[0][1] >= training.max_wait:
            self.fire("C")
        elif self.queue and self.fresh - self.queue[-1][1] >= self.quiet:
            self.fire("D")

    def fire(self, rule):
        self.updates.append((rule, [(name, clocks, values) for name, _, clocks, values in self.queue]))
        self.queue = []


class Watched(Engine):
    """An engine that notes what its updates were given."""

    def _learn(self, work, fire, parts: list[_Queued]):
        if not hasattr(self, "learnt"):
            self.learnt = []
        windows = [part.windows for part in parts]
        clocks = torch.cat([w.clock_BT for w in windows])
        values = torch.cat([w.y_BT for w in windows])
        joined = type(windows[0])(*(torch.cat(column) for column in zip(*windows, strict=True)))
        units = targets(joined, self._horizons).double()
        said = units * joined.scale_BT.unsqueeze(2) + joined.base_BT.unsqueeze(2)
        # Farther than twenty units is cut off.
        said[units.abs() >= 20] = torch.inf
        self.learnt.append((fire.rule, clocks.tolist(), values.tolist(), said))
        return super()._learn(work, fire, parts)


def tell(config, batch, weights):
    naive = Naive(config, weights)
    for i in range(len(batch)):
        for q in batch.reset_code[batch.reset_at == i].tolist():
            if batch.series[q] in naive.series:
                naive.series[batch.series[q]].reset = True
        naive.record(
            batch.series[batch.code[i]],
            int(batch.offset[i]),
            int(batch.time_ns[i]),
            int(batch.broker_ns[i]),
            float(batch.target[i]),
        )
    return naive


def facts_of(report):
    f = report.forecasts
    for i, record in enumerate(f.record_M.tolist()):
        numbers = (f.clock_M[i], f.age_M[i], f.interval_ns_M[i], f.update_M[i])
        yield (
            int(report.batch.offset[record]),
            *(int(v) for v in numbers),
            f.settled_error_MXK[i],
            f.settled_offset_MK[i].tolist(),
            f.yhat_MK[i],
        )


def configured(seed, **training):
    return streams.small_config(
        model={"horizons": 1 + seed % 5, "season": [4, "none", 3][seed % 3], "hidden_size": 6},
        training={"k1": 1 + seed % 4, "k2": 6 + seed % 4 + seed % 5, "max_wait": [40, 300, 7][seed % 3], **training},
        series={
            "gap_reset": [None, "400s", "100s"][seed % 3],
            "interval": ["auto", "10s", None, "auto"][seed % 4],
            "late": ["drop", "dead_letter"][seed % 2],
            "ttl": [None, "150s"][seed % 2],
        },
    )


@pytest.mark.parametrize("kind", ["lockstep", "runs", "skewed", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_what_happens_to_records_and_which_windows_are_learnt_from_is_as_told(seed, kind):
    """Training is on, so the network's own numbers are left out: they hang on float32."""
    config = configured(seed)
    batch = streams.random_batch(seed + 50, 400, 8, kind)
    naive = tell(config, batch, Engine.create(config, "cpu").state().weights)
    engine = Watched.create(config, "cpu")
    reports = [engine.step(streams.part(batch, a, b)) for a, b in itertools.pairwise([0, 3, 170, 171, 400])]

    assert [Outcome(o) for report in reports for o in report.outcome_N.tolist()] == naive.outcomes
    ours = [fact for report in reports for fact in facts_of(report)]
    assert [fact[:5] for fact in ours] == [fact[:5] for fact in naive.facts]
    assert [fact[6] for fact in ours] == [fact[6] for fact in naive.facts]
    for fact, told in zip(ours, naive.facts, strict=True):
        np.testing.assert_allclose(fact[5][1:], told[5][1:], rtol=1e-9)
        np.testing.assert_array_equal(np.isnan(fact[5][0]), np.isnan(told[5][0]))
    assert sum(offset >= 0 for fact in ours for offset in fact[6]) > 100
    assert [u.rule for report in reports for u in report.updates] == [rule for rule, _ in naive.updates]
    assert len(naive.updates) > 5
    for (rule, clocks, values, _), (told_rule, told) in zip(engine.learnt, naive.updates, strict=True):
        assert (rule, clocks) == (told_rule, [window[1] for window in told])
        np.testing.assert_array_equal(values, [window[2] for window in told])


@pytest.mark.parametrize("seed", range(3))
def test_a_position_trains_on_values_that_have_arrived_at_the_clock_it_speaks_about(seed):
    config = configured(seed)
    batch = streams.random_batch(seed + 70, 300, 4, "mixed")
    engine = Watched.create(config, "cpu")
    engine.step(batch)
    trained = 0
    for _, clocks, values, said in engine.learnt:
        for b, (n_T, y_T) in enumerate(zip(clocks, values, strict=True)):
            known = dict(zip(n_T, y_T, strict=True))
            for t, n in enumerate(n_T):
                for j in range(1, config.model.horizons + 1):
                    truth, ours = known.get(n + j, NAN), said[b, t, j - 1].item()
                    if math.isinf(ours):
                        assert not math.isnan(truth)
                        continue
                    # Without any value so far there is nothing to measure from.
                    nothing_yet = all(math.isnan(y) for y in y_T[: t + 1])
                    assert ours == pytest.approx(truth, rel=1e-5, abs=1e-4, nan_ok=True) or nothing_yet
                    trained += not math.isnan(ours)
    assert trained > 100


@pytest.mark.parametrize("kind", ["lockstep", "runs", "skewed", "mixed"])
@pytest.mark.parametrize("seed", range(3))
def test_forecasts_by_given_weights_are_those_of_a_plain_lstm_in_float64(seed, kind):
    config = configured(seed, enabled=False)
    batch = streams.random_batch(seed + 90, 300, 6, kind)
    fresh, g = Engine.create(config, "cpu").state(), torch.Generator().manual_seed(seed)
    weights = {name: 0.5 * torch.randn(tensor.shape, generator=g) for name, tensor in fresh.weights.items()}
    start = EngineState(fresh.step, fresh.series, fresh.columns, weights, fresh.training, fresh.meta)
    naive = tell(config, batch, weights)
    report = Engine.restore(config, "cpu", start).step(batch)
    for fact, told in zip(facts_of(report), naive.facts, strict=True):
        spread = max(1e-9, np.ptp(batch.target[~np.isnan(batch.target)]))
        np.testing.assert_allclose(fact[7], told[7], rtol=1e-3, atol=1e-4 * spread)
        np.testing.assert_allclose(fact[5][0], told[5][0], rtol=1e-3, atol=1e-4 * spread)
    assert not report.updates


def many(count, series):
    """Lockstep with holes, over more series than a chunk has rows."""
    rng = np.random.default_rng(1)
    code = np.arange(count) % series
    time_ns = np.arange(count) // series * 10 * streams.SECOND
    time_ns[rng.random(count) < 0.02] -= 15 * streams.SECOND
    target = rng.normal(size=count).cumsum()
    target[rng.random(count) < 0.03] = np.nan
    return streams.batch_of(code, time_ns, target)


def test_dividing_the_log_changes_no_bit_over_several_chunks_of_series():
    config = streams.small_config(
        model={"hidden_size": 3, "horizons": 1, "season": "none"},
        training={"k1": 2, "k2": 3, "batch_series": 400},
        series={"interval": "10s"},
    )
    series = 2100
    batch = many(series * 5, series)
    count = len(batch)
    engine, reports = streams.run(config, batch, [0, count])
    assert len(engine._table._chunks["age"]) == 3
    assert sum(len(report.updates) for report in reports) > 3
    for cuts, resumes in (
        ([0, 1, 2, 1023, 1024, 1025, 2099, 2100, 2101, 5000, 5001, 9000, count], frozenset({3, 8, 9})),
        ([*range(0, count, 700), count], frozenset()),
    ):
        other, others = streams.run(config, batch, cuts, resumes)
        assert streams.outputs(others) == streams.outputs(reports)
        assert other.state().digests() == engine.state().digests()
        assert other.state().meta == engine.state().meta


def woven(seed, count, places):
    """A stream over several partitions and topics, as cuts of any number of ranges."""
    rng = np.random.default_rng(seed)
    streams_of = {place: streams.random_batch(seed + i, count, 3, "mixed") for i, place in enumerate(places)}
    at, ranges = dict.fromkeys(places, 0), []
    while any(at[place] < count for place in places):
        place = places[int(rng.integers(len(places)))]
        end = min(count, at[place] + int(rng.integers(1, 12)))
        if end > at[place]:
            ranges.append((Range(*place, at[place], end), streams.part(streams_of[place], at[place], end)))
            at[place] = end
    return ranges


def as_one(pieces):
    """Ranges in listed order as one cut."""
    names: dict[SeriesId, int] = {}
    columns = {name: [] for name in ("code", "range_index", "offset", "row", "time_ns", "broker_ns", "target")}
    rejected, resets, records, skipped = [], [], 0, 0
    for i, (place, piece) in enumerate(pieces):
        mine = [SeriesId(place.topic, place.partition, s.key) for s in piece.series]
        codes = [names.setdefault(mine[q], len(names)) for q in piece.code.tolist()]
        columns["code"].append(np.array(codes, np.int32))
        columns["range_index"].append(np.full(len(piece), i, np.int32))
        for name in ("offset", "row", "time_ns", "broker_ns", "target"):
            columns[name].append(getattr(piece, name))
        rejected += [r._replace(topic=place.topic, partition=place.partition) for r in piece.rejected]
        for at, q in zip(piece.reset_at.tolist(), piece.reset_code.tolist(), strict=True):
            resets.append((records + at, names.setdefault(mine[q], len(names))))
        records, skipped = records + len(piece), skipped + piece.skipped
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return RecordBatch(
        tuple(r for r, _ in pieces),
        tuple(names),
        **joined,
        rejected=tuple(rejected),
        skipped=skipped,
        reset_at=np.array([at for at, _ in resets], np.int32),
        reset_code=np.array([q for _, q in resets], np.int32),
    )


@pytest.mark.parametrize("late", ["drop", "dead_letter"])
def test_a_cut_of_many_ranges_is_its_ranges_one_by_one(late):
    """Several topics and partitions, each more than once in a cut; the same keys on all of them."""
    config = streams.small_config(series={"late": late})
    pieces = woven(4, 120, [("a", 0), ("a", 1), ("b", 0)])
    singly, at_once, some = (Engine.create(config, "cpu") for _ in range(3))
    alone = [singly.step(as_one([piece])) for piece in pieces]
    whole = [at_once.step(as_one(pieces))]
    parts = [some.step(as_one(pieces[i : i + 7])) for i in range(0, len(pieces), 7)]
    assert streams.outputs(whole) == streams.outputs(alone) == streams.outputs(parts)
    assert at_once.state().digests() == singly.state().digests() == some.state().digests()
    assert len(at_once.state().series) == 9
    assert sum(len(report.updates) for report in alone) > 10
    order = [whole[0].batch.cut.index(place) for place, _ in pieces]
    assert order == sorted(order)
    counts = whole[0].counts()
    assert sum(counts.values()) == 360
    assert counts[Outcome.DEAD] == len(whole[0].rejected)


FLOAT32 = float(np.finfo(np.float32).max)
EVERY = np.arange(160)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(np.full(160, FLOAT32), id="the largest"),
        pytest.param(np.where(EVERY % 2, FLOAT32, -FLOAT32), id="the largest, to and fro"),
        pytest.param(np.where(EVERY % 2, 1e38, -1e38), id="nearly the largest, to and fro"),
        pytest.param(np.where(EVERY == 80, FLOAT32, 1.0), id="one spike"),
        pytest.param(np.where(EVERY % 3, 1e-30, 1e30), id="tiny and huge"),
        pytest.param(np.where(EVERY % 2, 5e-324, -5e-324), id="denormal"),
        pytest.param(np.zeros(160), id="zero"),
        pytest.param(np.full(160, 7.0), id="constant"),
        pytest.param(np.where(EVERY < 60, np.nan, EVERY), id="missing at first"),
        pytest.param(np.full(160, np.nan), id="missing throughout"),
    ],
)
@pytest.mark.parametrize("loss", ["huber", "mse", "mae"])
def test_hostile_values_spoil_neither_weights_nor_forecasts(target, loss):
    config = streams.small_config(model={"loss": loss})
    engine = Engine.create(config, "cpu")
    with np.errstate(all="raise"):
        report = engine.step(streams.batch_of(np.zeros(160, np.int64), EVERY * 10 * streams.SECOND, target))
    assert report.updates
    assert not any(update.skipped for update in report.updates)
    assert not any(report.resets.values())
    known = np.cumsum(~np.isnan(target)) > 0
    assert np.isfinite(report.forecasts.yhat_MK).all(1).tolist() == known.tolist()
    state = engine.state()
    learnt = {**state.weights, **{name: t for name, t in state.training.items() if name.startswith("lstm.")}}
    assert all(tensor.isfinite().all() for tensor in learnt.values())
    kept = ("carry_h", "carry_c", "mean", "variance", "window_x", "window_scale", "score_absolute", "score_squared")
    assert all(state.column(name).isfinite().all() for name in kept)
