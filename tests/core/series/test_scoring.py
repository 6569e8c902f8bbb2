"""Running means of prequential errors."""

import math

import numpy as np
import pytest
import torch

from streamlstm.series import scoring

NAN = math.nan


def fresh(series, experts=2, horizons=3):
    zero = torch.zeros(series, experts, horizons, dtype=torch.float64)
    return scoring.Scores(zero[:, 0].clone(), zero.clone(), zero.clone())


def errors(count, seed=0, missing=0.3):
    """``[N, 2, 3]``; a horizon without a forecast has none for any expert."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(count, 2, 3)) * 10
    e[np.broadcast_to(rng.random((count, 1, 3)) < missing, e.shape)] = NAN
    return torch.from_numpy(e)


def test_the_means_are_plain_at_first_and_forget_after_the_half_life():
    e = errors(900)
    state = scoring.score(fresh(1), e, [1] * 900)
    for k in range(3):
        for x in range(2):
            count, absolute, squared = 0, 0.0, 0.0
            for one in e[:, x, k].tolist():
                if not math.isnan(one):
                    count += 1
                    w = max(1 / count, 1 - 0.5 ** (1 / 300))
                    absolute += w * (abs(one) - absolute)
                    squared += w * (one * one - squared)
            assert state.scored[0, k] == count
            assert state.absolute[0, x, k].item() == pytest.approx(absolute, rel=1e-12)
            assert state.squared[0, x, k].item() == pytest.approx(squared, rel=1e-12)


def test_what_was_not_forecast_is_not_scored():
    state = scoring.score(fresh(1), errors(20), [1] * 20)
    again = scoring.score(state, torch.full((4, 2, 3), NAN, dtype=torch.float64), [1] * 4)
    assert all(torch.equal(a, b) for a, b in zip(again, state, strict=True))


@pytest.mark.parametrize("waves", [[7, 7, 3, 1], [40] * 60, [1] * 20, [1500, 900, 4], pytest.param([5], id="one wave")])
def test_waves_give_the_bits_of_one_row_at_a_time(waves):
    e = errors(sum(waves), seed=len(waves))
    together = scoring.score(fresh(waves[0]), e, waves)
    starts = np.cumsum([0, *waves]).tolist()
    for b in range(0, waves[0], max(1, waves[0] // 9)):
        state = fresh(1)
        for w, width in enumerate(waves):
            if b < width:
                state = scoring.score(state, e[starts[w] + b : starts[w] + b + 1], [1])
        assert all(torch.equal(ours[b : b + 1], alone) for ours, alone in zip(together, state, strict=True))


def test_the_largest_errors_leave_everything_finite():
    e = torch.full((500, 2, 3), 6.8e38, dtype=torch.float64)
    e[::2] *= -1
    assert all(column.isfinite().all() for column in scoring.score(fresh(1), e, [1] * 500))


def test_the_state_that_went_in_stays_as_it_was():
    state = fresh(1)
    scoring.score(state, errors(5), [1] * 5)
    assert all(not column.any() for column in state)
