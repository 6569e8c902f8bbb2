"""Phases of the event time."""

import math

import pytest
import torch

from streamlstm.series.calendar import Calendar


def test_the_hour_is_sine_and_cosine_of_the_day():
    minute = torch.tensor([0, 6 * 60, 12 * 60, 18 * 60, 24 * 60])
    expected = [[0, 1], [1, 0], [0, -1], [-1, 0], [0, 1]]
    torch.testing.assert_close(Calendar(["hour"], "cpu").inputs(minute), torch.tensor(expected).float())


def test_the_week_is_seven_days():
    x = Calendar(["weekday"], "cpu").inputs(torch.tensor([0, 1440, 7 * 1440]))
    assert torch.equal(x[0], x[2])
    torch.testing.assert_close(x[1], torch.tensor([math.sin(2 * math.pi / 7), math.cos(2 * math.pi / 7)]))


def test_times_before_the_epoch_have_a_phase_too():
    calendar = Calendar(["hour", "weekday"], "cpu")
    minute = torch.tensor([-1, -(7 * 1440) * 10**9 + 5, 5])
    x = calendar.inputs(minute)
    assert torch.equal(x[1], x[2])
    assert torch.equal(x[0], calendar.inputs(torch.tensor([7 * 1440 - 1]))[0])


@pytest.mark.parametrize(("phases", "features"), [([], 0), (["hour"], 2), (["weekday", "hour"], 4)])
def test_inputs_are_as_wide_as_said(phases, features):
    calendar = Calendar(phases, "cpu")
    assert calendar.features == features
    assert calendar.inputs(torch.arange(5)).shape == (5, features)


def test_a_row_has_the_same_bits_wherever_it_stands():
    calendar, minutes = Calendar(["hour", "weekday"], "cpu"), torch.arange(0, 20_000, 7)
    together = calendar.inputs(minutes)
    assert all(torch.equal(calendar.inputs(minutes[i : i + 1]), together[i : i + 1]) for i in range(0, 2000, 97))
