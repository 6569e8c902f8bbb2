"""One update: its gradient against autograd, its step against torch's Adam, and what the guard does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.learning.model import Shape, initial, view
from streamlstm.learning.tbptt import KEEP_EVERY, TARGET_LIMIT, Learner, Settings, Windows, gradient, targets

SHAPE = Shape(features=3, hidden=5, horizons=4)


def some_windows(seed=0, batch=6, steps=12, shape=SHAPE, spread=3):
    """Random windows with gaps in the clock and a missing value."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, steps, generator=g, dtype=torch.float64).cumsum(1)
    y[0, 3] = torch.nan
    return Windows(
        x_BTF=torch.randn(batch, steps, shape.features, generator=g),
        y_BT=y,
        base_BT=y.nan_to_num(0) + 0.1,
        scale_BT=torch.rand(batch, steps, generator=g, dtype=torch.float64) + 0.5,
        clock_BT=torch.randint(1, spread + 1, (batch, steps), generator=g).cumsum(1) + 1000,
        h_BH=torch.randn(batch, shape.hidden, generator=g),
        c_BH=torch.randn(batch, shape.hidden, generator=g),
    )


def by_autograd(flat, shape, windows, loss):
    """The unrolled network in float64, with the targets matched one by one."""
    p = flat.double().requires_grad_()
    w = view(p, shape)
    h, c = windows.h_BH.double(), windows.c_BH.double()
    losses = []
    batch, steps = windows.y_BT.shape
    for t in range(steps):
        z = torch.cat([windows.x_BTF[:, t].double(), h], 1) @ w.gates + w.gate_bias
        i, f, g, o = z.split(shape.hidden, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        output = h @ w.head + w.head_bias
        for b in range(batch):
            for u in range(t + 1, steps):
                j = int(windows.clock_BT[b, u] - windows.clock_BT[b, t])
                if j > shape.horizons or windows.y_BT[b, u].isnan():
                    continue
                truth = (windows.y_BT[b, u] - windows.base_BT[b, t]) / windows.scale_BT[b, t]
                e = output[b, j - 1] - truth.clamp(-TARGET_LIMIT, TARGET_LIMIT)
                huber = e * e / 2 if e.abs() < 1 else e.abs() - 0.5
                losses.append({"mse": e * e, "mae": e.abs(), "huber": huber}[loss])
    total = torch.stack(losses).mean()
    total.backward()
    return total.item(), p.grad


@pytest.mark.parametrize("loss", ["huber", "mse", "mae"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_autograds_on_the_unrolled_network(loss, seed):
    flat = initial(SHAPE, seed) + 0.2 * torch.randn(SHAPE.parameters, generator=torch.Generator().manual_seed(seed))
    windows = some_windows(seed)
    ours = gradient(flat, SHAPE, windows, loss)
    value, expected = by_autograd(flat, SHAPE, windows, loss)
    assert ours.loss.item() == pytest.approx(value, rel=1e-6)
    # float32 over 12 steps against float64.
    torch.testing.assert_close(ours.flat.double(), expected, rtol=2e-5, atol=2e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1, 3, 50]))
def test_targets_are_matched_by_the_clock(seed, horizons, spread):
    shape = Shape(2, 3, horizons)
    windows = some_windows(seed, batch=3, steps=9, shape=shape, spread=spread)
    found = targets(windows, horizons)
    for b in range(3):
        at = {int(n): i for i, n in enumerate(windows.clock_BT[b])}
        for i in range(9):
            for j in range(1, horizons + 1):
                k = at.get(int(windows.clock_BT[b, i]) + j)
                truth = math.nan if k is None else windows.y_BT[b, k].item()
                scaled = (truth - windows.base_BT[b, i].item()) / windows.scale_BT[b, i].item()
                expected = torch.tensor(scaled).clamp(-TARGET_LIMIT, TARGET_LIMIT)
                torch.testing.assert_close(found[b, i, j - 1], expected, equal_nan=True)


def test_no_target_gives_no_gradient():
    windows = some_windows()._replace(y_BT=torch.full((6, 12), torch.nan, dtype=torch.float64))
    flat = initial(SHAPE, 1)
    result = gradient(flat, SHAPE, windows, "huber")
    assert result.loss.item() == 0
    assert not result.flat.any()


def test_a_fresh_network_is_the_naive_forecast_and_remembers():
    w = view(initial(SHAPE, 3), SHAPE)
    assert not w.head.any()
    assert w.gate_bias[SHAPE.hidden : 2 * SHAPE.hidden].eq(1).all()


def learner(rate=1e-3, clip=1.0, patience=3):
    return Learner(SHAPE, Settings("huber", rate, clip, patience), 7, "cpu")


def test_the_step_is_torchs_adam_after_the_clip():
    ours = learner(rate=0.01, clip=0.05)
    p = torch.nn.Parameter(initial(SHAPE, 7))
    adam = torch.optim.Adam([p], lr=0.01)
    for seed in range(20):
        windows = some_windows(seed)
        p.grad = gradient(p.detach(), SHAPE, windows, "huber").flat
        torch.nn.utils.clip_grad_norm_([p], 0.05)
        adam.step()
        outcome = ours.update(windows)
        assert outcome.clipped == (outcome.norm > 0.05)
    flat = torch.cat([tensor.reshape(-1) for tensor in ours.weights().values()])
    torch.testing.assert_close(flat, p.detach(), rtol=1e-4, atol=1e-6)


def test_learning_lowers_the_loss():
    ours, windows = learner(rate=0.01), some_windows()
    losses = [ours.update(windows).loss for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def poisoned():
    windows = some_windows()
    return windows._replace(h_BH=windows.h_BH * torch.inf)


def test_an_update_that_is_not_finite_changes_nothing_but_its_number():
    ours = learner()
    before = ours.weights()
    outcome = ours.update(poisoned())
    assert outcome.skipped
    assert ours.number == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.weights().items())


def test_after_patience_skips_in_a_row_the_last_good_weights_come_back():
    ours = learner(patience=3)
    for _ in range(KEEP_EVERY):
        ours.update(some_windows())
    kept = ours.weights()
    ours.update(some_windows(1))
    assert not all(torch.equal(kept[name], tensor) for name, tensor in ours.weights().items())
    outcomes = [ours.update(poisoned()) for _ in range(3)]
    assert [o.rolled_back for o in outcomes] == [False, False, True]
    assert all(torch.equal(kept[name], tensor) for name, tensor in ours.weights().items())


def test_a_good_update_ends_the_row_of_skips():
    ours = learner(patience=2)
    for windows in (poisoned(), some_windows(), poisoned()):
        assert not ours.update(windows).rolled_back


def test_a_saved_learner_goes_on_bit_for_bit():
    one, other = learner(), learner()
    for seed in range(KEEP_EVERY + 2):
        one.update(some_windows(seed, batch=2))
    other.load(one.weights(), one.training(), one.counters())
    for seed in range(3):
        one.update(some_windows(seed))
        other.update(some_windows(seed))
    assert all(torch.equal(tensor, other.weights()[name]) for name, tensor in one.weights().items())
    assert one.counters() == other.counters()


def test_a_snapshot_is_not_moved_by_the_next_update():
    ours = learner()
    before = ours.weights()
    copies = {name: tensor.clone() for name, tensor in before.items()}
    ours.update(some_windows())
    assert all(torch.equal(before[name], tensor) for name, tensor in copies.items())
