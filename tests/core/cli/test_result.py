import json
from collections import Counter

import numpy as np
import pytest

from streamlstm.cli.result import Result, as_json_text, as_lines
from streamlstm.config.model import Config
from streamlstm.engine.report import EXPERTS, Outcome
from streamlstm.service.replay import Summary
from streamlstm.service.scores import StreamScores


def result(horizons: int, *, season: object = "none", records: int = 40) -> Result:
    config = Config.model_validate(
        {
            "source": {"type": "files"},
            "decode": {"series_id": ["$.name"], "timestamp": {"path": "$.time"}, "target": "$.value"},
            "model": {"horizons": horizons, "season": season},
        }
    )
    scores = StreamScores(horizons)
    error = np.ones((records, len(EXPERTS), horizons)) * np.array([1.0, 2.0, 4.0])[None, :, None]
    offsets = np.zeros((records, horizons), np.int64)
    offsets[:1, 0] = -1  # one pair less at horizon 1
    scores.add(np.zeros(records, np.int64), np.zeros(records), error, offsets)
    outcomes = {**dict.fromkeys(Outcome, 0), Outcome.FORECAST: 39, Outcome.DEAD: 1}
    summary = Summary(40, 3, outcomes, Counter({"schema": 1}), updates=7, skipped_updates=2, compared=3, differing=1)
    return Result(config, scores.score(), summary, 2.0, None, 0, {"weights": "aa", "series": "bb"})


@pytest.mark.parametrize(
    ("horizons", "shown"),
    [
        (1, ["1", "all"]),
        (7, ["1", "2", "3", "6", "7", "all"]),
        (24, ["1", "2", "3", "6", "12", "24", "all"]),
    ],
)
def test_of_many_horizons_some_are_shown_and_always_the_last(horizons: int, shown: list[str]) -> None:
    lines = list(as_lines(result(horizons), recorded=False))
    assert [line.split()[0] for line in lines[3 : lines.index("")]] == shown


def test_the_table_s_columns_stand_under_their_heads() -> None:
    lines = list(as_lines(result(2, season=24), recorded=False))
    table = lines[2 : lines.index("")]
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == [
        "1",
        "39",
        "1.0000",
        "4.0000",
        "16.0000",
        "1.0000",
        "2.0000",
        "4.0000",
        "+0.750",
        "+0.938",
    ]


def test_the_summary_adds_up_and_says_what_was_rejected() -> None:
    lines = list(as_lines(result(2), recorded=True))
    assert "records   40 = 39 forecast + 1 dead" in lines
    assert "rejected  1 schema" in lines
    assert "updates   7, 2 skipped" in lines
    assert "time      2.0 s, 20 records/s" in lines
    assert "steps     3; digests: 2 as recorded, 1 differ" in lines
    assert lines[-2:] == ["weights   aa", "series    bb"]


def test_json_has_every_horizon_and_no_nan() -> None:
    said = json.loads(as_json_text(result(30, season=24)))
    assert [s["horizon"] for s in said["scores"]] == [*range(1, 31), "all"]
    assert said["scores"][0]["pairs"] == {"lstm": 39, "last_value": 39, "seasonal_naive": 39}
    assert said["scores"][0]["skill"] == {"last_value": 0.75, "seasonal_naive": 0.9375}
    assert said["recorded_digests"] == {"compared": 3, "differing": 1}
    empty = json.loads(as_json_text(result(2, records=0)))
    assert empty["scores"][0]["mse"]["lstm"] is None
