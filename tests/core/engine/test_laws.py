"""The engine's laws, over random streams with resets, late, missing, duplicate and rejected records."""

import itertools

import numpy as np
import pytest
import streams
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.report import Outcome
from streamlstm.engine.state import EngineState

KINDS = ("lockstep", "runs", "skewed", "mixed")


def with_learning_rate(config: Config, rate: float) -> Config:
    """Past what the configuration allows: the only way to make good weights go bad."""
    optimizer = config.training.optimizer.model_copy(update={"lr": rate})
    return config.model_copy(update={"training": config.training.model_copy(update={"optimizer": optimizer})})


@st.composite
def scenarios(draw):
    """A configuration, a stream, and divisions of it into steps with resumes."""
    horizons, k1 = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    config = streams.small_config(
        model={
            "hidden_size": draw(st.integers(1, 8)),
            "horizons": horizons,
            "season": draw(st.sampled_from([4, 7, "none"])),
            "loss": draw(st.sampled_from(["mse", "huber", "mae"])),
        },
        training={
            "k1": k1,
            "k2": horizons + k1 + draw(st.integers(0, 9)),
            "batch_series": draw(st.sampled_from([1, 3, 5, 64])),
            "max_wait": draw(st.sampled_from([1, 2, 10, 40, 200, 5000])),
            "guard": {"patience": draw(st.integers(1, 3))},
        },
        series={
            "gap_reset": draw(st.sampled_from([None, "60s", "400s"])),
            "interval": draw(st.sampled_from(["auto", None, "10s"])),
            "late": draw(st.sampled_from(["drop", "dead_letter"])),
            "ttl": draw(st.sampled_from([None, "100s", "600s"])),
            "max_series": 10**6,
        },
    )
    config = with_learning_rate(config, draw(st.sampled_from([1e-3, 1e-1, 1e30])))
    count = draw(st.integers(1, 200))
    series = draw(st.sampled_from([1, 2, 3, 7, 12, 40]))
    batch = streams.random_batch(draw(st.integers(0, 2**31)), count, series, draw(st.sampled_from(KINDS)))
    cuts = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=20))})
    resumes = frozenset(draw(st.lists(st.integers(0, len(cuts)), max_size=4)))
    return config, batch, cuts, resumes


def searching(examples: int, *, derandomize: bool) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=derandomize, suppress_health_check=slow)


@searching(25, derandomize=True)
@given(scenarios())
def test_one_step_of_n_equals_n_steps_of_one_and_resume_equals_never_stopped(scenario):
    hold_to_the_law(scenario)


@pytest.mark.soak
@searching(1000, derandomize=False)
@given(scenarios())
def test_the_law_over_many_more_streams(scenario):
    hold_to_the_law(scenario)


def crammed(config: Config, most: int) -> Config:
    """With room in memory for so many series."""
    return config.model_copy(update={"series": config.series.model_copy(update={"max_series": most})})


def hold_to_the_law(scenario):
    """
    The same bits from steps of one, one step, random steps, and random steps with resumes between them; also when
    hardly any series stays in memory.
    """
    config, batch, cuts, resumes = scenario
    count = cuts[-1]
    engine, reports = streams.run(config, batch, list(range(count + 1)))
    expected, published = engine.state(), streams.outputs(reports)
    cramped = crammed(config, config.training.max_wait)
    for setting, kind, division, resumed in (
        (config, Engine, [0, count], frozenset()),
        (config, Engine, cuts, frozenset()),
        (config, Engine, cuts, resumes),
        (cramped, streams.Shelved, cuts, resumes),
    ):
        other, others = streams.run(setting, batch, division, resumed, kind)
        state = other.state()
        assert streams.outputs(others) == published
        assert state.digests() == expected.digests()
        assert state.meta == expected.meta


def test_the_scenarios_reach_every_rule_and_the_guard():
    """The law above would be empty if its streams never fired rule C, never skipped and never rolled back."""
    rules, skipped, rolled_back, outcomes, resets = set(), 0, 0, set(), set()
    for seed in range(40):
        waits = [1, 10, 40, 5000]
        config = streams.small_config(training={"max_wait": waits[seed % 4], "guard": {"patience": 2}})
        config = with_learning_rate(config, 1e30 if seed % 3 == 0 else 1e-3)
        batch = streams.random_batch(seed, 300, 12, KINDS[seed % 4])
        _, reports = streams.run(config, batch, [0, 300])
        for report in reports:
            rules |= {update.rule for update in report.updates}
            skipped += sum(update.skipped for update in report.updates)
            rolled_back += sum(update.rolled_back for update in report.updates)
            outcomes |= {outcome for outcome, n in report.counts().items() if n}
            resets |= {reason for reason, n in report.resets.items() if n}
    assert rules == {"A", "B", "C", "D"}
    assert skipped
    assert rolled_back
    assert outcomes == set(Outcome)
    assert resets >= {"gap", "control"}


def test_the_scenarios_reach_leaving_returning_and_being_forgotten():
    """The law above would be empty if nobody left, came back, or was forgotten in memory, out of it, and in passing."""
    left, returned, dropped, in_passing = 0, 0, 0, 0
    for seed in range(12):
        config = crammed(
            streams.small_config(training={"max_wait": 3}, series={"ttl": [None, "100s", "600s"][seed % 3]}), 3
        )
        batch = streams.random_batch(seed, 200, 12, KINDS[seed % 4])
        engine, reports = streams.run(config, batch, list(range(201)), kind=streams.Shelved)
        left, returned = left + engine.left, returned + engine.returned
        dropped += sum(report.evictions["ttl"] for report in reports)
        assert all(report.series_total <= 4 for report in reports)
        _, (whole,) = streams.run(config, batch, [0, 200])
        in_passing += whole.evictions["ttl"]
    assert left > 100
    assert returned > 100
    assert dropped > 10
    assert in_passing > 10


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_overflow_change_no_law(kind):
    """Carries that become non-finite are zeroed, record by record, however the log is divided."""
    config = streams.small_config(series={"gap_reset": "60s"})
    batch = streams.random_batch(5, 200, 7, kind)
    fresh = Engine.create(config, "cpu").state()
    weights = {name: tensor.clone() for name, tensor in fresh.weights.items()}
    # Level and change both high: infinity minus infinity.
    weights["lstm.gates"][0], weights["lstm.gates"][1] = 3e38, -3e38
    spoilt = EngineState(fresh.step, fresh.series, fresh.columns, weights, fresh.training, fresh.meta)

    def run(cuts):
        engine = Engine.restore(config, "cpu", spoilt)
        reports = [engine.step(streams.part(batch, a, b)) for a, b in itertools.pairwise(cuts)]
        return engine.state(), reports

    state, reports = run(range(201))
    whole_state, whole = run([0, 200])
    assert sum(report.resets["non_finite"] for report in reports) > 0
    assert all(state.column(name).isfinite().all() for name in ("carry_h", "carry_c"))
    assert streams.outputs(whole) == streams.outputs(reports)
    assert whole_state.digests() == state.digests()
    assert all(np.isfinite(report.forecasts.yhat_MK[report.forecasts.age_M > 20]).all() for report in whole)


@pytest.mark.parametrize("seed", [6, 16])
@pytest.mark.parametrize("kind", ["runs", "mixed"])
def test_a_carry_zeroed_after_a_window_joined_leaves_the_window_wherever_steps_end(seed, kind):
    """Now and then only, so that windows before it and after it are whole."""
    config = streams.small_config(series={"gap_reset": "60s"}, training={"max_wait": 200})
    batch = streams.random_batch(seed, 200, 2, kind)
    fresh = Engine.create(config, "cpu").state()
    weights = {name: tensor.clone() for name, tensor in fresh.weights.items()}
    # Infinity times the change since the last value: not a number where a value is missing, a closed gate elsewhere.
    weights["lstm.gates"][1] = torch.inf
    spoilt = EngineState(fresh.step, fresh.series, fresh.columns, weights, fresh.training, fresh.meta)

    def run(cuts):
        engine = Engine.restore(config, "cpu", spoilt)
        reports = [engine.step(streams.part(batch, a, b)) for a, b in itertools.pairwise(cuts)]
        return engine.state(), reports

    state, reports = run(range(201))
    whole_state, whole = run([0, 200])
    updates = [update for report in reports for update in report.updates]
    assert sum(report.resets["non_finite"] for report in reports) > 0
    assert any(update.used for update in updates)
    assert any(update.used < update.windows for update in updates)
    assert not any(update.skipped for update in updates), "a window that is left out costs the others nothing"
    assert all(np.isfinite(update.loss) for update in updates if update.used)
    assert streams.outputs(whole) == streams.outputs(reports)
    assert whole_state.digests() == state.digests()


@pytest.mark.parametrize(
    "training", [{"max_wait": 5}, {"max_wait": 5000, "enabled": False}, {"batch_series": 1}, {"optimizer": {"lr": 0.1}}]
)
def test_learning_keys_may_change_between_two_runs(training):
    """Windows that were queued under other rules are learnt from at once, or when learning is taken up again."""
    config = streams.small_config(training={"max_wait": 5000, "batch_series": 64})
    batch = streams.random_batch(3, 400, 7, "mixed")
    engine, _ = streams.run(config, batch, [0, 150])
    queued = len(engine.state().meta["queue"]["series"])
    assert queued
    settings = {"max_wait": 5000, "batch_series": 64} | training
    engine = Engine.restore(streams.small_config(training=settings), "cpu", engine.state())
    assert not engine.step(streams.part(batch, 150, 150)).updates
    report = engine.step(streams.part(batch, 150, 300))
    assert bool(report.updates) == settings.get("enabled", True)
    engine = Engine.restore(config, "cpu", engine.state())
    updates = engine.step(streams.part(batch, 300, 400)).updates
    assert updates


def test_the_warming_are_counted_as_their_ages_say():
    config = streams.small_config(series={"gap_reset": "60s"})
    batch = streams.random_batch(11, 300, 9, "mixed")
    _, reports = streams.run(config, batch, [0, 1, 50, 51, 180, 300], frozenset({1, 3}))
    assert any(report.resets["gap"] for report in reports)
    assert any(report.resets["control"] for report in reports)
    ages = {}
    for report in reports:
        f = report.forecasts
        resets = zip(report.batch.reset_at.tolist(), report.batch.reset_code.tolist(), strict=True)
        told = {
            at: [report.batch.series[q] for _, q in group] for at, group in itertools.groupby(resets, lambda r: r[0])
        }
        age_of = dict(zip(f.record_M.tolist(), f.age_M.tolist(), strict=True))
        for record in range(len(report.batch) + 1):
            ages |= {one: 0 for one in told.get(record, ()) if one in ages}
            if record in age_of:
                ages[report.batch.series[report.batch.code[record]]] = age_of[record]
        assert report.series_total == len(ages)
        assert report.series_warming == sum(age < 10 for age in ages.values())


def shuffled(state: EngineState, seed: int) -> EngineState:
    """The same state with every series in another slot."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(state.series)))
    columns = {name: [state.column(name)[order]] for name in state.columns}
    series = tuple(state.series[i] for i in order.tolist())
    return EngineState(state.step, series, columns, state.weights, state.training, state.meta)


@pytest.mark.parametrize("seed", range(4))
def test_permuting_slots_changes_no_forecast_bit(seed):
    config = streams.small_config(model={"hidden_size": 7})
    batch = streams.random_batch(seed, 600, 40, KINDS[seed])
    engine, _ = streams.run(config, batch, [0, 300])
    state = engine.state()
    other = Engine.restore(config, "cpu", shuffled(state, seed))
    rest = streams.part(batch, 300, 600)
    assert streams.outputs([other.step(rest)]) == streams.outputs([engine.step(rest)])
    assert other.state().digests() == engine.state().digests()


def forecasts_of(reports, series):
    """yhat by offset, as bytes, of the named series."""
    found = {}
    for report in reports:
        batch, f = report.batch, report.forecasts
        for i, record in enumerate(f.record_M.tolist()):
            if batch.series[batch.code[record]].key in series:
                found[int(batch.offset[record])] = f.yhat_MK[i].tobytes()
    return found


def only(batch, series):
    """The records of the named series, as a batch of their own."""
    kept = np.array([one.key in series for one in batch.series])
    return streams.chosen(batch, kept[batch.code], kept[batch.reset_code], batch.cut[0])


def test_tile_neighbours_change_no_forecast_bit():
    config = streams.small_config(training={"enabled": False}, model={"hidden_size": 7, "horizons": 3})
    fresh = Engine.create(config, "cpu").state()
    noise = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(t.shape, generator=noise) for name, t in fresh.weights.items()}
    start = EngineState(fresh.step, fresh.series, fresh.columns, weights, fresh.training, fresh.meta)
    batch = streams.random_batch(3, 900, 70, "mixed")
    everybody = Engine.restore(config, "cpu", start).step(batch)
    for chosen in ({"s1"}, {"s0", "s5", "s33"}, {f"s{i}" for i in range(0, 70, 2)}):
        alone = Engine.restore(config, "cpu", start).step(only(batch, chosen))
        assert forecasts_of([alone], chosen) == forecasts_of([everybody], chosen)


def test_with_training_off_nan_in_one_series_changes_no_bit_of_another():
    config = streams.small_config(training={"enabled": False})
    batch = streams.random_batch(4, 500, 9, "mixed")
    poisoned = batch.target.copy()
    poisoned[np.array([batch.series[q].key == "s0" for q in batch.code.tolist()])] = np.nan
    clean, spoilt = Engine.create(config, "cpu"), Engine.create(config, "cpu")
    others = {f"s{i}" for i in range(1, 9)}
    report = clean.step(batch)
    columns = {name: getattr(batch, name) for name in batch.__slots__} | {"target": poisoned}
    assert forecasts_of([spoilt.step(type(batch)(**columns))], others) == forecasts_of([report], others)


@pytest.mark.parametrize("row", [40, 150, 299])
def test_noise_after_a_row_changes_no_forecast_issued_at_or_before_it(row):
    config = streams.small_config()
    batch = streams.random_batch(6, 300, 5, "lockstep")
    noisy = batch.target.copy()
    after = batch.offset > row
    noisy[after] = np.random.default_rng(0).normal(size=int(after.sum())) * 50
    columns = {name: getattr(batch, name) for name in batch.__slots__} | {"target": noisy}
    changed = type(batch)(**columns)
    every = {f"s{i}" for i in range(5)}
    _, reports = streams.run(config, batch, [0, 100, 300])
    _, others = streams.run(config, changed, [0, 100, 300])
    seen, other = forecasts_of(reports, every), forecasts_of(others, every)
    assert {k: v for k, v in seen.items() if k <= row} == {k: v for k, v in other.items() if k <= row}
    assert seen != other or row == 299


def test_a_duplicate_changes_nothing():
    config = streams.small_config(series={"interval": "10s", "gap_reset": None})
    code, time_ns = np.zeros(60, np.int64), np.arange(60) * 10 * streams.SECOND
    target = np.random.default_rng(2).normal(size=60)
    again = np.r_[np.arange(60), 59, 55, 58]
    once = Engine.create(config, "cpu")
    twice = Engine.create(config, "cpu")
    once.step(streams.batch_of(code, time_ns, target))
    report = twice.step(streams.batch_of(code[again], time_ns[again], target[again] + (np.arange(63) >= 60)))
    assert report.counts()[Outcome.DUPLICATE] == 3
    assert {**twice.state().digests()} == {**once.state().digests()}


def test_the_counters_add_up_to_the_records():
    batch = streams.random_batch(8, 400, 12, "mixed")
    _, reports = streams.run(streams.small_config(), batch, [0, 123, 400])
    totals = sum(n for report in reports for n in report.counts().values())
    assert totals == 400


def test_series_that_count_for_the_queue_stay_however_little_room_there_is():
    config = crammed(streams.small_config(training={"max_wait": 40}), 5)
    batch = streams.random_batch(1, 300, 12, "lockstep")
    engine, _ = streams.run(config, batch, [0, 150, 300], kind=streams.Shelved)
    assert engine.left == 0
    assert len(engine.state().series) == 12


def test_the_least_recently_seen_leave():
    config = crammed(streams.small_config(training={"max_wait": 1}), 2)
    code, time_ns = np.array([0, 1, 2, 3, 1]), np.arange(5) * 10 * streams.SECOND
    engine, _ = streams.run(config, streams.batch_of(code, time_ns, np.ones(5)), [0, 5], kind=streams.Shelved)
    assert {one.key for one in engine.state().series} == {"s1", "s3"}
    assert {one.key for one in engine.held} == {"s0", "s2"}


def test_a_forgotten_series_starts_as_a_new_one():
    """Forgotten where it was, it has the state of one that was never seen before."""
    config = streams.small_config(series={"ttl": "100s", "interval": "10s"})
    hour = np.r_[np.arange(30) * 10, 3600 + np.arange(5) * 10] * streams.SECOND
    y = np.random.default_rng(1).normal(size=35)
    both = np.r_[np.zeros(30), np.full(5, 0)].astype(np.int64)
    _, (report,) = streams.run(config, streams.batch_of(both, hour, y), [0, 35])
    assert report.evictions == {"ttl": 1}
    assert report.forecasts.age_M.tolist() == [*range(1, 31), 1, 2, 3, 4, 5]
    assert report.forecasts.clock_M.tolist() == [*range(1, 31), 1, 2, 3, 4, 5]
    trained = streams.small_config(series={"ttl": "100s", "interval": "10s"}, training={"enabled": False})
    forgot, _ = streams.run(trained, streams.batch_of(both, hour, y), [0, 35])
    new, _ = streams.run(trained, streams.batch_of(both[30:], hour[30:], y[30:], offset=np.arange(30, 35)), [30, 35])
    columns = ("age", "clock", "recent_ns", "mean", "carry_h", "window_x", "error_count", "output")
    state, other = forgot.state(), new.state()
    for name in state.columns:
        if name != "last_fresh":
            assert torch.equal(state.column(name), other.column(name)), (name, columns)


def test_a_snapshot_does_not_change_when_the_engine_goes_on():
    config = streams.small_config()
    batch = streams.random_batch(9, 400, 7, "mixed")
    engine, _ = streams.run(config, batch, [0, 200])
    state = engine.state()
    before = state.digests()
    engine.step(streams.part(batch, 200, 400))
    assert state.digests() == before


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"calendar": [], "hidden_size": 6}}, "carry_h"),
        ({"model": {"calendar": [], "season": "none"}}, "season"),
        ({"model": {"calendar": []}, "training": {"k2": 12}}, "recent_ns"),
    ],
)
def test_a_state_of_another_shape_is_refused_by_name(sections, named):
    config = streams.small_config(model={"calendar": []})
    engine, _ = streams.run(config, streams.random_batch(1, 50, 3, "mixed"), [0, 50])
    with pytest.raises(ValueError, match=named):
        Engine.restore(streams.small_config(**sections), "cpu", engine.state())


def test_what_is_skipped_by_policy_is_counted_as_skipped_and_is_no_dead_letter():
    batch = streams.random_batch(8, 200, 3, "mixed")
    lost = len(batch.rejected)
    assert lost
    reports = {}
    for policy in ("dead_letter", "skip"):
        decode = {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y", "on_error": policy}
        reports[policy] = Engine.create(streams.small_config(decode=decode), "cpu").step(batch)
    kept, skipped = (reports[policy].counts() for policy in ("dead_letter", "skip"))
    assert (skipped[Outcome.SKIPPED], skipped[Outcome.DEAD]) == (lost + batch.skipped, kept[Outcome.DEAD] - lost)
    assert not set(batch.rejected) & set(reports["skip"].rejected)
    assert kept[Outcome.SKIPPED] == batch.skipped
    assert sum(skipped.values()) == 200
