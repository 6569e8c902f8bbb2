"""The forecast path: right against torch's own LSTM, and the same bits whoever sits beside a row."""

import numpy as np
import pytest
import torch

from streamlstm.learning.cells import Cell, head
from streamlstm.learning.model import Shape, initial, prepare, view

CPU = torch.device("cpu")


def weights(shape, seed=0):
    flat = initial(shape, seed)
    flat += 0.3 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed))
    return prepare(view(flat, shape)), view(flat, shape)


def rows(shape, waves, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(waves), shape.features, generator=g)
    return x, torch.randn(waves[0], shape.hidden, generator=g), torch.randn(waves[0], shape.hidden, generator=g)


def test_the_cell_is_torchs_lstm():
    shape = Shape(3, 6, 2)
    fast, plain = weights(shape)
    lstm = torch.nn.LSTM(3, 6)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(plain.gates[:3].t())
        lstm.weight_hh_l0.copy_(plain.gates[3:].t())
        lstm.bias_ih_l0.copy_(plain.gate_bias)
        lstm.bias_hh_l0.zero_()
        x, h, c = rows(shape, [4, 4, 4])
        expected, _ = lstm(x.view(3, 4, 3), (h.unsqueeze(0), c.unsqueeze(0)))
    ours, _, zeroed = Cell(3, 6, CPU).run(fast, x, h, c, [4, 4, 4])
    assert zeroed is None
    # float32; tanh is taken by way of the logistic function.
    torch.testing.assert_close(ours.view(3, 4, 6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("horizons", [1, 5, 11, 24])
@pytest.mark.parametrize("hidden", [1, 2, 3, 5, 10, 64, 129, 300])
def test_a_row_has_the_same_bits_whoever_sits_beside_it(hidden, horizons):
    shape = Shape(7, hidden, horizons)
    fast, _ = weights(shape)
    cell = Cell(7, hidden, CPU)
    x, h, c = rows(shape, [150])
    h_all, c_all, _ = cell.run(fast, x, h, c, [150])
    y_all = head(fast, h_all, horizons)
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 31, 33, 64, 149):
        chosen = torch.from_numpy(rng.permutation(150)[:count])
        h_some, c_some, _ = cell.run(fast, x[chosen], h[chosen], c[chosen], [count])
        assert torch.equal(h_some, h_all[chosen])
        assert torch.equal(c_some, c_all[chosen])
        assert torch.equal(head(fast, h_some, horizons), y_all[chosen])


@pytest.mark.parametrize("hidden", [64, 301, 1000, 3000])
def test_a_row_has_the_same_bits_at_every_place_with_three_threads(hidden):
    """A wide network's functions would be shared out between them in parts that do not end with a row."""
    shape = Shape(2, hidden, 1)
    fast, _ = weights(shape)
    cell = Cell(2, hidden, CPU)
    x, h, c = rows(shape, [32])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        h_all, c_all, _ = cell.run(fast, x, h, c, [32])
        for shift in (1, 7, 16):
            h_moved, c_moved, _ = cell.run(fast, x.roll(shift, 0), h.roll(shift, 0), c.roll(shift, 0), [32])
            assert torch.equal(h_moved, h_all.roll(shift, 0))
            assert torch.equal(c_moved, c_all.roll(shift, 0))
    finally:
        torch.set_num_threads(before)


def test_many_steps_in_one_go_are_the_steps_one_by_one():
    shape = Shape(4, 9, 3)
    fast, _ = weights(shape)
    cell = Cell(4, 9, CPU)
    waves = [40, 33, 33, 2, 1]
    x, h, c = rows(shape, waves)
    h_all, c_all, _ = cell.run(fast, x, h, c, waves)
    start = 0
    for width in waves:
        h, c, _ = cell.run(fast, x[start : start + width], h[:width], c[:width], [width])
        assert torch.equal(h, h_all[start : start + width])
        assert torch.equal(c, c_all[start : start + width])
        start += width


def test_a_carry_that_is_not_finite_is_zeroed_and_its_neighbours_keep_their_bits():
    shape = Shape(4, 9, 3)
    fast, _ = weights(shape)
    cell = Cell(4, 9, CPU)
    waves = [3, 3]
    x, h, c = rows(shape, waves)
    h_good, _, _ = cell.run(fast, x, h, c, waves)
    spoilt = x.clone()
    spoilt[1] = torch.nan
    h_all, c_all, zeroed = cell.run(fast, spoilt, h, c, waves)
    assert zeroed.tolist() == [False, True, False, False, False, False]
    assert not h_all[1].any()
    assert not c_all[1].any()
    others = [0, 2, 3, 5]
    assert torch.equal(h_all[others], h_good[others])
    zero = torch.zeros(1, 9)
    again, _, _ = cell.run(fast, x[4:5], zero, zero, [1])
    assert torch.equal(h_all[4:5], again)


def test_an_output_that_is_not_finite_becomes_the_naive_forecast():
    shape = Shape(2, 3, 2)
    fast, _ = weights(shape)
    h = torch.ones(2, 3)
    h[0, 0] = torch.inf
    out = head(fast, h, 2)
    assert out[0].tolist() == [0, 0]
    assert out[1].abs().sum() > 0


def test_the_worked_numbers_of_a_one_dimensional_lstm():
    """A published hand calculation: prices, frozen weights, nine next-day predictions, MSE 0.8451."""
    w = np.random.RandomState(42).randn(4, 2) * 0.1  # rows f, i, C, o over [h, x]
    prices = np.array([100, 102, 105, 103, 108, 110, 107, 112, 115, 113], float)
    x = (prices - prices.mean()) / prices.std()
    shape = Shape(1, 1, 1)
    f, i, g, o = w
    flat = torch.zeros(shape.parameters)
    plain = view(flat, shape)
    for column, (h_weight, x_weight) in enumerate((i, f, g, o)):
        plain.gates[0, column], plain.gates[1, column] = x_weight, h_weight
    plain.head[0, 0] = 1
    fast = prepare(plain)
    zero = torch.zeros(1, 1)
    inputs = torch.tensor(x[:9], dtype=torch.float32).view(9, 1)
    h_NH, c_NH, _ = Cell(1, 1, CPU).run(fast, inputs, zero, zero, [1] * 9)
    predictions = head(fast, h_NH, 1)[:, 0].numpy()
    assert ((predictions - x[1:]) ** 2).mean() == pytest.approx(0.8451, abs=5e-5)
    assert c_NH[1].item() == pytest.approx(0.0204, abs=2e-4)
    assert predictions[2] == pytest.approx(0.0079, abs=1e-3)
