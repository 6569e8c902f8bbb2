import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.engine.report import EXPERTS
from streamlstm.service.scores import StreamScores, WindowedScores, bucket_horizons

X = len(EXPERTS)
NAN = math.nan


def errors(draw: st.DrawFn, records: int, horizons: int) -> np.ndarray:
    """Errors of records, some unknown: independently by expert, as after a missing value."""
    one = st.just(NAN) | st.floats(-1e3, 1e3, width=32)
    flat = draw(st.lists(one, min_size=records * X * horizons, max_size=records * X * horizons))
    return np.array(flat, np.float64).reshape(records, X, horizons)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN


def ratio(a: float, b: float) -> float:
    return NAN if b == 0 or math.isnan(b) else a / b


@given(st.integers(1, 1000))
def test_buckets_hold_every_horizon_once_and_stay_few(horizons: int) -> None:
    buckets = bucket_horizons(horizons)
    assert [j for b in buckets for j in range(b.first, b.last + 1)] == list(range(1, horizons + 1))
    assert len({b.label for b in buckets}) == len(buckets) <= 24


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_window_scores_equal_a_naive_loop(data: st.DataObject) -> None:
    horizons, window = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    seasonal = data.draw(st.booleans())
    steps = [errors(data.draw, data.draw(st.integers(0, 4)), horizons) for _ in range(data.draw(st.integers(1, 4)))]
    scores = WindowedScores(horizons, window, seasonal=seasonal)
    for step in steps:
        scores.add(step)
    now = scores.score()

    records = [r for step in steps for r in step if np.isfinite(r[0]).any()][-window:]
    naive = mean([abs(r[2 if seasonal else 1, 0]) for r in records if not math.isnan(r[2 if seasonal else 1, 0])])
    for b, bucket in enumerate(scores.buckets):
        pairs = [
            (r[0, j], r[1, j])
            for r in records
            for j in range(bucket.first - 1, bucket.last)
            if not math.isnan(r[0, j]) and not math.isnan(r[1, j])
        ]
        mae = mean([abs(e) for e, _ in pairs])
        assert now.samples_B[b] == len(pairs)
        assert now.mae_B[b] == pytest.approx(mae, nan_ok=True)
        assert now.rmse_B[b] == pytest.approx(math.sqrt(mean([e * e for e, _ in pairs])), nan_ok=True)
        assert now.mase_B[b] == pytest.approx(ratio(mae, naive), nan_ok=True)
        skill = 1 - ratio(sum(e * e for e, _ in pairs), sum(e * e for _, e in pairs))
        assert now.skill_B[b] == pytest.approx(skill, nan_ok=True)


def test_scores_of_nothing_are_unknown_and_not_zero() -> None:
    now = WindowedScores(2, 10, seasonal=False).score()
    assert now.samples_B.tolist() == [0, 0]
    for column in (now.mae_B, now.rmse_B, now.mase_B, now.skill_B):
        assert np.isnan(column).all()


def test_a_perfect_naive_forecast_leaves_skill_unknown() -> None:
    scores = WindowedScores(1, 10, seasonal=False)
    scores.add(np.array([[[1.0], [0.0], [NAN]]]))
    assert math.isnan(scores.score().skill_B[0])


def naive_stream(steps: list, horizons: int, score_from: int, standardise: int) -> dict:
    """The protocol by a loop: one pair at a time."""
    values = defaultdict(list)
    pairs = []
    for series, value, error, offset in steps:
        for i, s in enumerate(series.tolist()):
            if not math.isnan(value[i]) and len(values[s]) < standardise:
                values[s].append(float(value[i]))
            pairs += [
                (s, j, error[i, :, j].tolist()) for j in range(horizons) if offset[i, j] >= max(score_from - 1, 0)
            ]
    scale = defaultdict(lambda: 1.0) if not standardise else {s: float(np.std(v)) for s, v in values.items() if v}
    result = {}
    for x in range(X):
        for j in (*range(horizons), None):
            mine = [
                (e[x] / scale[s], e[0] / scale[s])
                for s, k, e in pairs
                if (j is None or j == k) and not math.isnan(e[x]) and scale.get(s, 1.0 if not standardise else 0.0) > 0
            ]
            both = [(a, b) for a, b in mine if not math.isnan(b)]
            result[x, j] = (
                len(mine),
                mean([a * a for a, _ in mine]),
                mean([abs(a) for a, _ in mine]),
                1 - ratio(sum(b * b for _, b in both), sum(a * a for a, _ in both)),
            )
    return result


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_stream_scores_equal_a_naive_loop(data: st.DataObject) -> None:
    horizons = data.draw(st.integers(1, 4))
    score_from, standardise = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 5))
    steps = []
    for _ in range(data.draw(st.integers(1, 4))):
        m = data.draw(st.integers(0, 5))
        series = np.array(data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m)), np.int64)
        value = data.draw(st.lists(st.just(NAN) | st.integers(-50, 50).map(float), min_size=m, max_size=m))
        error = errors(data.draw, m, horizons)
        offset = np.array(
            data.draw(st.lists(st.integers(0, 8), min_size=m * horizons, max_size=m * horizons)), np.int64
        )
        offset = offset.reshape(m, horizons)
        offset[np.isnan(error).all(axis=1)] = -1
        steps.append((series, np.array(value, np.float64), error, offset))
    scores = StreamScores(horizons, score_from=score_from, standardise=standardise)
    for step in steps:
        scores.add(*step)
    now = scores.score()
    for (x, j), (pairs, mse, mae, skill) in naive_stream(steps, horizons, score_from, standardise).items():
        at = horizons if j is None else j
        assert now.pairs_XK1[x, at] == pairs
        assert now.mse_XK1[x, at] == pytest.approx(mse, rel=1e-6, nan_ok=True)
        assert now.mae_XK1[x, at] == pytest.approx(mae, rel=1e-6, nan_ok=True)
        assert now.skill_XK1[x, at] == pytest.approx(skill, rel=1e-6, abs=1e-9, nan_ok=True)


def test_a_pair_counts_from_the_row_its_forecast_first_speaks_about() -> None:
    """Scored from row 10: the forecast issued at row 9 speaks first about row 10."""
    scores = StreamScores(1, score_from=10)
    error = np.ones((3, X, 1))
    scores.add(np.zeros(3, np.int64), np.zeros(3), error, np.array([[8], [9], [10]]))
    assert scores.score().pairs_XK1[0, 0] == 2


def test_a_series_far_from_zero_is_standardised_as_well_as_one_near_it() -> None:
    scores = StreamScores(1, standardise=4)
    value = 1e9 + np.array([1.0, 2.0, 3.0, 4.0, 1e6])
    scores.add(np.zeros(5, np.int64), value, np.full((5, X, 1), 2.0), np.zeros((5, 1), np.int64))
    assert scores.score().mse_XK1[0, 0] == pytest.approx(4 / 1.25)


def test_a_constant_series_is_left_out_and_said_so() -> None:
    scores = StreamScores(1, standardise=2)
    series = np.array([0, 0, 1, 1])
    scores.add(series, np.array([5.0, 5.0, 1.0, 3.0]), np.ones((4, X, 1)), np.zeros((4, 1), np.int64))
    scores.add(np.array([2, 2]), np.array([1.0, 3.0]), np.full((2, X, 1), NAN), np.full((2, 1), -1))
    now = scores.score()
    assert now.left_out == 1
    assert now.pairs_XK1[0, 0] == 2
    assert now.mse_XK1[0, 0] == 1.0
