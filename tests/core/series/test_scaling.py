"""Where a series is and how much it moves, against the definitions in plain Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.series import scaling

NAN = math.nan


def fresh(count):
    zero = torch.zeros(count, dtype=torch.float64)
    return scaling.Scaler(*(zero.clone() for _ in scaling.COLUMNS))


def one_series(values, alpha=0.01, state=None):
    y = torch.tensor(values, dtype=torch.float64)
    return scaling.advance(state or fresh(1), y, [1] * len(values), alpha)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just(NAN), st.floats(-1e6, 1e6)), min_size=1, max_size=60), st.sampled_from([0.01, 0.2]))
def test_the_means_and_spreads_are_those_of_the_definition(values, alpha):
    """EWMA mean and variance with the plain average's weights at first; the lifelong ones by numpy."""
    after, rows = one_series(values, alpha)
    mean = variance = 0.0
    seen = []
    for i, y in enumerate(values):
        if not math.isnan(y):
            seen.append(y)
            w = max(1 / len(seen), alpha)
            error = y - mean
            mean, variance = mean + w * error, (1 - w) * (variance + w * error * error)
        assert after.observed[i] == len(seen)
        assert after.mean[i].item() == pytest.approx(mean, rel=1e-9, abs=1e-6)
        assert after.variance[i].item() == pytest.approx(variance, rel=1e-9, abs=1e-6)
        life = np.std(seen) if seen else 0.0
        scale = math.sqrt(variance) + scaling.LIFE_SHARE * life + scaling.MEAN_SHARE * abs(mean) + scaling.FLOOR
        assert rows.scale[i].item() == pytest.approx(scale, rel=1e-6, abs=1e-6)
        if seen:
            assert rows.base[i] == seen[-1]
            was_last = 1 if not math.isnan(y) and len(seen) > 1 else 0
            assert rows.previous[i] == seen[-1 - was_last]
        else:
            assert rows.base[i].isnan()
            assert rows.previous[i].isnan()


def test_a_missing_value_moves_nothing():
    before, _ = one_series([3.0, 5.0, 4.0])
    after, rows = one_series([3.0, 5.0, 4.0, NAN, NAN])
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(after, before, strict=True))
    assert rows.base[-1] == 4


def test_a_value_that_is_zero_is_not_a_missing_one():
    after, rows = one_series([0.0, NAN])
    assert after.observed.tolist() == [1, 1]
    assert rows.base.tolist() == [0, 0]


@pytest.mark.parametrize("constant", [0.0, 5.0, -1e38, 5e-324])
def test_a_constant_series_has_a_positive_scale_and_no_variance(constant):
    after, rows = one_series([constant] * 50)
    assert after.variance.eq(0).all()
    assert (rows.scale > 0).all()
    assert (rows.mean == constant).all()


@pytest.mark.parametrize("values", [[3.4e38, -3.4e38] * 200, [1e-320, -1e-320] * 50, [3.4e38] + [0.0] * 300])
def test_hostile_values_leave_everything_finite(values):
    after, rows = one_series(values)
    assert all(column.isfinite().all() for column in (*after, *rows))
    assert (rows.scale > 0).all()
    assert (after.variance >= 0).all()
    assert (after.life_squares >= 0).all()


def test_a_quiet_spell_does_not_shrink_the_scale_below_a_share_of_the_lifelong_one():
    noise = np.random.default_rng(1).normal(size=200)
    _, rows = one_series([*noise, *[0.0] * 3000])
    assert rows.scale[-1] > 0.25 * scaling.LIFE_SHARE * noise.std()


def test_a_series_times_a_power_of_two_has_the_scale_times_it():
    values = np.random.default_rng(2).normal(size=100)
    _, one = one_series(values)
    _, other = one_series(values * 1024)
    torch.testing.assert_close(other.scale, one.scale * 1024, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_waves_give_the_bits_of_one_row_at_a_time(seed):
    rng = np.random.default_rng(seed)
    waves = sorted(rng.integers(1, 40, 12).tolist(), reverse=True)
    y = torch.from_numpy(np.where(rng.random(sum(waves)) < 0.2, NAN, rng.normal(size=sum(waves)) * 100))
    after, rows = scaling.advance(fresh(waves[0]), y, waves, 0.05)
    starts = np.cumsum([0, *waves])
    for b in range(waves[0]):
        mine = torch.tensor([int(starts[w]) + b for w, width in enumerate(waves) if b < width])
        state = fresh(1)
        for i in mine.tolist():
            state, row = scaling.advance(state, y[i : i + 1], [1], 0.05)
            for ours, alone in zip((*after, *rows), (*state, *row), strict=True):
                torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=0, equal_nan=True)


def test_the_state_that_went_in_stays_as_it_was():
    state = fresh(1)
    one_series([1.0, 2.0], state=state)
    assert all(column.item() == 0 for column in state)


def test_the_mean_reaches_back_seven_seasons_or_a_hundred_values():
    assert scaling.smoothing(24) == 1 / 168
    assert scaling.smoothing(None) == 1 / 100
