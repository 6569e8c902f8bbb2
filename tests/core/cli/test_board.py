import math

import numpy as np
import pytest
from reports import make_report

from streamlstm.cli.board import Board
from streamlstm.engine.report import EXPERTS, Outcome


def test_a_row_shows_the_newest_record_of_its_series() -> None:
    board = Board(ahead=3)
    yhat = np.arange(12.0).reshape(4, 3)
    error = np.full((4, len(EXPERTS), 3), np.nan)
    error[3, 0, 0] = -0.5
    board.update(make_report(keys=["a", "b"], target=[1, 2, 3, 4], yhat=yhat, error=error, warming=[1, 1, 0, 1]))
    a, b = board
    assert (a.series, a.now, a.soon, a.later, a.warming) == ("a", 3, 6, 8, False)
    assert (b.series, b.now, b.error, b.warming) == ("b", 4, -0.5, True)
    assert math.isnan(a.error)


def test_skill_is_of_late_an_error_thirty_records_ago_counts_half() -> None:
    board = Board(ahead=1)
    for i in range(31):
        error = np.full((1, len(EXPERTS), 2), np.nan)
        error[0, :2, 0] = [1.0 if i == 0 else 0.0, 2.0 if i in (0, 30) else 0.0]
        error[0, 0, 1] = 9.0  # the last value's is not known: no pair
        board.update(make_report(keys=["a"], records=1, horizons=2, error=error))
    (row,) = board
    assert row.skill == pytest.approx(1 - 0.5 / (4 + 2))


def test_skill_is_unknown_before_anything_was_settled() -> None:
    board = Board(ahead=1)
    board.update(make_report(keys=["a"], records=1))
    assert math.isnan(next(iter(board)).skill)


def test_what_was_not_forecast_makes_no_row() -> None:
    board = Board(ahead=1)
    board.update(make_report(keys=["a", "b"], outcome=[Outcome.LATE, Outcome.FORECAST], records=2))
    assert [row.series for row in board] == ["b"]
