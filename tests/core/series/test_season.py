"""The ring of past values, against a dict of all of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.records.batch import SeriesId
from streamlstm.series.season import PLACES, SEASONS, SeasonRing
from streamlstm.series.table import SeriesTable


def made(season, horizons, span, series=1):
    ring = SeasonRing(season, horizons, span, "cpu")
    table = SeriesTable(ring.columns(), "cpu")
    for i in range(series):
        table.add(SeriesId("in", 0, str(i)))
    return ring, table


def back(ahead, season):
    """Whole seasons back from a place ahead, to what is known."""
    return -(-ahead // season) * season


def expected(known, n, season, horizons):
    """Profile and naive forecasts of clock n, from a dict of values by clock."""
    value = lambda at: known.get(at, math.nan)  # noqa: E731, because it is a formula
    places = np.unique(np.linspace(1, horizons, min(horizons, PLACES)).astype(int)).tolist()
    last = [value(n + p - back(p, season)) for p in places]
    several = [[value(n + p - back(p, season) - k * season) for k in range(SEASONS)] for p in places]
    means = [np.mean(there) if (there := [v for v in of if not math.isnan(v)]) else math.nan for of in several]
    return last, means, [value(n - back(j, season)) for j in range(1, horizons + 1)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    season=st.integers(2, 9),
    horizons=st.integers(1, 20),
    span=st.integers(1, 6),
    leaps=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 50, 1 << 32]), min_size=1, max_size=120),
    seed=st.integers(0, 10**6),
)
def test_the_ring_says_what_a_dict_of_all_values_says(season, horizons, span, leaps, seed):
    """With gaps, missing values, restarts, and several clocks of a series written in one call."""
    rng = np.random.default_rng(seed)
    ring, table = made(season, horizons, span)
    clocks = np.cumsum(leaps)
    values = np.where(rng.random(len(clocks)) < 0.1, np.nan, rng.normal(size=len(clocks)))
    restarts = rng.random(len(clocks)) < 0.03
    known, i = {}, 0
    while i < len(clocks):
        if restarts[i]:
            known.clear()
            ring.clear(table, table.select(np.array([0])))
        stop = i + 1
        while stop < len(clocks) and clocks[stop] - clocks[i] < span and not restarts[stop] and rng.random() < 0.8:
            stop += 1
        rows, n = table.select(np.zeros(stop - i, np.int64)), torch.from_numpy(clocks[i:stop])
        ring.write(table, rows, n, torch.from_numpy(values[i:stop]))
        last, mean = ring.profile(table, rows, n)
        naive = ring.naive(table, rows, n)
        for row in range(stop - i):
            known[int(clocks[i + row])] = values[i + row]
            wanted = expected(known, int(clocks[i + row]), season, horizons)
            for ours, truth in zip((last, mean, naive), wanted, strict=True):
                np.testing.assert_allclose(ours[row].numpy(), truth, rtol=1e-12)
        i = stop


def test_no_naive_forecast_knows_what_came_after_it_was_made():
    season, horizons = 4, 11
    ring, table = made(season, horizons, 1)
    row = table.select(np.array([0]))
    for n in range(1, 60):
        ring.write(table, row, torch.tensor([n]), torch.tensor([float(n)], dtype=torch.float64))
        seen = ring.naive(table, row, torch.tensor([n]))[0]
        ages = n - seen
        j = torch.arange(1, horizons + 1)
        assert (ages[~ages.isnan()] >= j[~ages.isnan()]).all()
        assert (ages[~ages.isnan()] % season == 0).all()


def test_series_keep_to_themselves():
    ring, table = made(3, 2, 1, series=2)
    both, one = table.select(np.array([0, 1])), torch.tensor([5, 5])
    ring.write(table, both, one, torch.tensor([1.0, 2.0], dtype=torch.float64))
    ring.clear(table, table.select(np.array([0])))
    naive = ring.naive(table, both, one + 3)
    assert naive[0].isnan().all()
    assert naive[1].tolist() == [2, 2]


@pytest.mark.parametrize(("season", "horizons"), [(2, 1), (24, 24), (7, 100)])
def test_inputs_are_as_wide_as_said(season, horizons):
    ring, table = made(season, horizons, 1)
    last, mean = ring.profile(table, table.select(np.array([0])), torch.tensor([1]))
    assert last.shape[1] + mean.shape[1] == ring.features
