"""The ledger of open forecasts, against a dict of all that were ever made."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.records.batch import SeriesId
from streamlstm.series.ledger import Ledger
from streamlstm.series.season import SeasonRing
from streamlstm.series.table import SeriesTable


def made(horizons, span, season=None, series=1):
    ledger = Ledger(horizons, span, "cpu")
    ring = SeasonRing(season, horizons, span, "cpu") if season else None
    table = SeriesTable([*ledger.columns(), *(ring.columns() if ring else [])], "cpu")
    for i in range(series):
        table.add(SeriesId("in", 0, str(i)))
    return ledger, ring, table


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    season=st.one_of(st.none(), st.integers(2, 7)),
    horizons=st.integers(1, 9),
    span=st.integers(1, 6),
    leaps=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 11, 1 << 32]), min_size=1, max_size=100),
    seed=st.integers(0, 10**6),
)
def test_the_ledger_settles_what_a_dict_of_all_forecasts_settles(season, horizons, span, leaps, seed):
    """With gaps, missing values, restarts, and several clocks of a series in one call."""
    rng = np.random.default_rng(seed)
    ledger, ring, table = made(horizons, span, season)
    clocks = np.cumsum(leaps)
    count = len(clocks)
    y = np.where(rng.random(count) < 0.1, np.nan, rng.normal(size=count))
    base = rng.normal(size=count)
    # A series has nothing to start from before its first value, and no season either.
    y[:2] = base[:2] = np.nan
    scale, output = rng.random(count) + 0.1, rng.normal(size=(count, horizons)).astype(np.float32)
    restarts = rng.random(count) < 0.03
    known, open_, i = {}, {}, 0
    while i < count:
        if restarts[i]:
            known.clear()
            open_.clear()
            ledger.clear(table, table.select(np.array([0])))
            if ring:
                ring.clear(table, table.select(np.array([0])))
        stop = i + 1
        while stop < count and clocks[stop] - clocks[i] < span and not restarts[stop] and rng.random() < 0.8:
            stop += 1
        rows, n = table.select(np.zeros(stop - i, np.int64)), torch.from_numpy(clocks[i:stop])
        truth = torch.from_numpy(y[i:stop])
        if ring:
            ring.write(table, rows, n, truth)
        ledger.expect(
            table,
            rows,
            n,
            torch.arange(i, stop) + 1000,
            torch.from_numpy(base[i:stop]),
            torch.from_numpy(scale[i:stop]),
            torch.from_numpy(output[i:stop]),
        )
        error, issued = ledger.settle(table, rows, n, truth, ring)
        for row in range(i, stop):
            at = int(clocks[row])
            for j in range(1, horizons + 1):
                maker = open_.get(at - j)
                wanted, offset = [math.nan] * 3, -1
                if maker is not None and not math.isnan(y[row]) and not math.isnan(base[maker]):
                    back = known.get(at - -(-j // season) * season, math.nan) if season else math.nan
                    seasonal = base[maker] if math.isnan(back) else back
                    network = base[maker] + scale[maker] * float(output[maker, j - 1])
                    wanted = [y[row] - network, y[row] - base[maker], y[row] - seasonal]
                    offset = maker + 1000
                np.testing.assert_allclose(error[row - i, :, j - 1].numpy(), wanted, rtol=1e-12)
                assert issued[row - i, j - 1] == offset
            open_[at] = row
            known[at] = y[row]
        i = stop


def test_what_falls_due_on_an_empty_slot_is_never_settled():
    ledger, _, table = made(3, 1)
    row, one = table.select(np.array([0])), torch.ones(1, dtype=torch.float64)
    issued = []
    for n in (1, 3, 7, 8):
        ledger.expect(table, row, torch.tensor([n]), torch.tensor([n]), one, one, torch.zeros(1, 3))
        issued.append(ledger.settle(table, row, torch.tensor([n]), one, None)[1][0].tolist())
    assert issued == [[-1, -1, -1], [-1, 1, -1], [-1, -1, -1], [7, -1, -1]]


def test_series_keep_to_themselves():
    ledger, _, table = made(1, 1, series=2)
    both, one = table.select(np.array([0, 1])), torch.ones(2, dtype=torch.float64)
    ledger.expect(table, both, torch.tensor([1, 1]), torch.tensor([5, 6]), one, one, torch.tensor([[1.0], [2.0]]))
    ledger.clear(table, table.select(np.array([0])))
    error, issued = ledger.settle(table, both, torch.tensor([2, 2]), one, None)
    assert issued.tolist() == [[-1], [6]]
    assert error[0].isnan().all()
    assert error[1, 0].tolist() == [-2]
