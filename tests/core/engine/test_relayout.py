"""A state taken over from one (k1, k2) to another: what both hold is carried over, and nothing else is made up."""

import numpy as np
import pytest
import streams
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.relayout import Layout, relayout

HORIZONS = 3
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def config_of(k1: int, k2: int, **training) -> Config:
    return streams.small_config(training={"k1": k1, "k2": k2, "batch_series": 5, "max_wait": 40, **training})


def layout(config: Config) -> Layout:
    return Layout(config.training.k1, config.k2)


def taken_over(engine: Engine, then: Config, now: Config) -> Engine:
    return Engine.restore(now, "cpu", relayout(engine.state(), layout(then), layout(now)).state)


LAYOUTS = st.integers(1, 6).flatmap(lambda k1: st.tuples(st.just(k1), st.integers(HORIZONS + k1, HORIZONS + k1 + 12)))
KINDS = st.sampled_from(["lockstep", "runs", "skewed", "mixed"])


def test_an_unchanged_layout_is_the_state_itself():
    config = config_of(4, 10)
    engine, _ = streams.run(config, streams.random_batch(3, 200, 7, "mixed"), [0, 200])
    state = engine.state()

    assert relayout(state, Layout(4, 10), Layout(4, 10)).state is state


@EXAMPLES
@given(LAYOUTS, LAYOUTS, st.integers(0, 10**6), KINDS, st.integers(20, 160))
def test_what_is_forecast_does_not_depend_on_the_layout(then, now, seed, kind, cut):
    """While nothing is learnt, forecasts, scores and settled errors go on as if k1 and k2 had not been changed."""
    before, after = config_of(*then, enabled=False), config_of(*now, enabled=False)
    batch = streams.random_batch(seed, 180, 5, kind)
    first, second = streams.part(batch, 0, cut), streams.part(batch, cut, 180)
    same, other = Engine.create(before, "cpu"), Engine.create(before, "cpu")
    same.step(first)
    other.step(first)
    expected = same.step(second)
    report = taken_over(other, before, after).step(second)

    for name in ("record_M", "clock_M", "age_M", "yhat_MK", "settled_error_MXK", "settled_offset_MK"):
        np.testing.assert_array_equal(getattr(report.forecasts, name), getattr(expected.forecasts, name), name)


@EXAMPLES
@given(LAYOUTS, LAYOUTS, st.integers(0, 10**6), KINDS)
def test_after_a_change_each_window_is_the_one_that_was_always_kept(then, now, seed, kind):
    """Windows that can be learnt from after a change are those of an engine that had the new layout all along."""
    before, after = config_of(*then, enabled=False), config_of(*now, enabled=False)
    batch = streams.random_batch(seed, 160, 5, kind)
    engine, always = Engine.create(before, "cpu"), Engine.create(after, "cpu")
    first = streams.part(batch, 0, 160)
    engine.step(first)
    always.step(first)
    changed, kept = taken_over(engine, before, after).state(), always.state()

    order = [changed.series.index(series) for series in kept.series]
    ages = kept.column("age").tolist()
    saved_now, saved_kept = changed.column("saved_age")[order], kept.column("saved_age")
    k2 = after.k2
    for row, age in enumerate(ages):
        for place, saved in enumerate(saved_now[row].tolist()):
            if saved < 0:
                continue
            assert saved_kept[row, place] == saved, "a carry that the new layout would have saved, in its place"
            for name in ("saved_h", "saved_c"):
                assert torch.equal(changed.column(name)[order][row, place], kept.column(name)[row, place])
            ring = np.arange(saved + 1, age + 1) % (k2 + after.training.k1)
            for name in ("window_x", "window_y", "window_base", "window_scale", "window_clock"):
                np.testing.assert_array_equal(
                    changed.column(name)[order][row, ring].numpy(), kept.column(name)[row, ring].numpy(), name
                )


def test_growing_windows_are_left_out_until_whole_ones_are_there():
    before, after = config_of(4, 10), config_of(4, 20)
    code = np.zeros(120, np.int64)
    batch = streams.batch_of(code, np.arange(120) * 10 * streams.SECOND, np.sin(np.arange(120.0)))
    engine = Engine.create(before, "cpu")
    engine.step(streams.part(batch, 0, 60))
    report = taken_over(engine, before, after).step(streams.part(batch, 60, 120))

    used = [update.used for update in report.updates]
    assert used[0] == 0, "it would begin where no carry was saved"
    assert used[-1] == 1
    assert sorted(used) == used, "once there, they stay"


def test_windows_queued_at_another_length_are_left_out_and_counted():
    before = config_of(4, 10, batch_series=64, max_wait=5000)
    engine, _ = streams.run(before, streams.random_batch(3, 96, 7, "lockstep"), [0, 96])
    state = engine.state()
    queued = len(state.meta["queue"]["series"])
    assert queued

    longer = relayout(state, Layout(4, 10), Layout(4, 12))
    assert longer.windows_left_out == queued
    assert not any(name.startswith("queue.") for name in longer.state.training)
    denser = relayout(state, Layout(4, 10), Layout(2, 10))
    assert denser.windows_left_out == 0
    assert denser.state.meta == state.meta


def test_the_state_it_came_from_is_not_written_to():
    engine, _ = streams.run(config_of(4, 10), streams.random_batch(3, 200, 30, "mixed"), [0, 200])
    state = engine.state()
    before = state.digests()

    Engine.restore(config_of(2, 14), "cpu", relayout(state, Layout(4, 10), Layout(2, 14)).state).step(
        streams.random_batch(4, 50, 30, "mixed")
    )
    assert state.digests() == before


def test_there_and_back_an_engine_learns_on():
    """Each change may cost windows, never the weights or the scores."""
    batch = streams.random_batch(5, 800, 5, "lockstep")
    configs = [config_of(4, 10), config_of(1, 20), config_of(6, 9), config_of(4, 10)]
    engine = Engine.create(configs[0], "cpu")
    updates = 0
    for i, config in enumerate(configs):
        if i:
            weights = engine.state().weights
            engine = taken_over(engine, configs[i - 1], config)
            assert all(torch.equal(tensor, engine.state().weights[name]) for name, tensor in weights.items())
        report = engine.step(streams.part(batch, 200 * i, 200 * (i + 1)))
        updates += sum(update.used > 0 for update in report.updates)
        assert np.isfinite(report.forecasts.yhat_MK[-9:]).all()
    assert updates > 10


@pytest.mark.parametrize("series", [0, 1, 1100])
def test_any_number_of_series_is_taken_over(series):
    before, after = config_of(4, 10), config_of(3, 11)
    engine = Engine.create(before, "cpu")
    if series:
        code = np.arange(2 * series) % series
        engine.step(streams.batch_of(code, np.arange(2 * series) * streams.SECOND, np.ones(2 * series)))

    assert len(taken_over(engine, before, after).state().series) == series
