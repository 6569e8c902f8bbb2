import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from streamlstm.cli.main import main

CONFIG = """\
source: {type: files}
decode:
  format: csv
  series_id: ["@field"]
  timestamp: {path: $.date}
  target: $.*
series: {interval: 1h}
model: {hidden_size: 4, horizons: 3, season: 4}
training: {k1: 4, k2: 8}
"""
NDJSON = """\
source: {type: files}
decode: {series_id: [$.name], timestamp: {path: $.time}, target: $.value}
series: {interval: 10s}
model: {hidden_size: 4, horizons: 2}
training: {k1: 4, k2: 8}
"""
ROWS = 120


def values() -> np.ndarray:
    """Two series of ROWS values."""
    rng = np.random.default_rng(5)
    t = np.arange(ROWS)
    return np.round(
        np.stack([np.sin(t * np.pi / 2) + t / 50, 100 + 9 * np.cos(t)], 1) + rng.normal(0, 0.1, (ROWS, 2)), 4
    )


def write_csv(path: Path, table: np.ndarray) -> Path:
    lines = [f"2026-01-{1 + i // 24:02d}T{i % 24:02d}:00:00Z,{a},{b}" for i, (a, b) in enumerate(table.tolist())]
    path.write_text("\n".join(["date,one,two", *lines]) + "\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "d.csv", values())


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    capsys.readouterr()
    assert main(["replay", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read_forecasts(path: Path) -> dict[tuple, tuple]:
    rows = pq.read_table(path).to_pylist()
    return {(r["series_id"], r["offset"], r["horizon"]): (r["yhat"], r["y"]) for r in rows}


@pytest.mark.parametrize(("standardise", "score_from"), [(None, 0), (40, 50)])
def test_the_scores_are_those_of_the_forecasts_in_the_file(
    config: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    standardise: int | None,
    score_from: int,
) -> None:
    out = tmp_path / "f.parquet"
    options = ["--standardise", standardise] if standardise else []
    said = run_json(capsys, "-c", config, "--from", data, "--out", out, "--score-from", score_from, *options)
    table = dict(zip(("one", "two"), values().T, strict=True))
    scale = {name: v[:standardise].std() if standardise else 1.0 for name, v in table.items()}
    for j in (1, 2, 3):
        model, naive = [], []
        for (series, offset, horizon), (yhat, y) in read_forecasts(out).items():
            target = offset + horizon
            if horizon != j or target >= ROWS or offset < score_from - 1:
                continue
            truth = table[series][target]
            assert y == pytest.approx(truth)
            model.append((truth - yhat) / scale[series])
            naive.append((truth - table[series][offset]) / scale[series])
        score = said["scores"][j - 1]
        assert score["pairs"]["lstm"] == len(model)
        assert score["mse"]["lstm"] == pytest.approx(np.mean(np.square(model)), rel=1e-5)
        assert score["mae"]["lstm"] == pytest.approx(np.mean(np.abs(model)), rel=1e-5)
        assert score["mse"]["last_value"] == pytest.approx(np.mean(np.square(naive)), rel=1e-5)
        skill = 1 - np.sum(np.square(model)) / np.sum(np.square(naive))
        assert score["skill"]["last_value"] == pytest.approx(skill, abs=1e-5)


def test_noise_in_the_future_changes_no_forecast_of_the_past(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The leak test, over the whole program."""
    row = 70
    noisy = values()
    noisy[row + 1 :] = np.random.default_rng(9).normal(0, 50, noisy[row + 1 :].shape)
    run_json(capsys, "-c", config, "--from", data, "--out", tmp_path / "a.parquet")
    run_json(capsys, "-c", config, "--from", write_csv(tmp_path / "n.csv", noisy), "--out", tmp_path / "b.parquet")
    quiet, disturbed = read_forecasts(tmp_path / "a.parquet"), read_forecasts(tmp_path / "b.parquet")
    past = {place for place in quiet if place[1] <= row}
    assert len(past) == 2 * 3 * (row + 1)
    assert all(quiet[place][0] == disturbed[place][0] for place in past)
    assert any(quiet[place][0] != disturbed[place][0] for place in quiet.keys() - past)


def test_the_table_and_the_json_say_the_same(config: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_json(capsys, "-c", config, "--from", data)
    assert main(["replay", "-c", str(config), "--from", str(data)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "in the units of the values"
    (all_horizons,) = [line.split() for line in lines if line.lstrip().startswith("all ")]
    score = said["scores"][-1]
    assert score["horizon"] == "all"
    assert all_horizons[1] == str(score["pairs"]["lstm"])
    assert float(all_horizons[2]) == pytest.approx(score["mse"]["lstm"], rel=1e-3)
    assert float(all_horizons[-1]) == pytest.approx(score["skill"]["seasonal_naive"], abs=1e-3)
    assert f"records   {2 * ROWS} = " in captured.out
    assert captured.err == "", "no bar where stderr is no terminal"


def test_outcomes_add_up_to_the_records(config: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_json(capsys, "-c", config, "--from", data, "--rows", 33)
    assert sum(said["records"].values()) == 66
    assert said["messages"] == 33
    assert said["updates"] > 0


def test_several_files_are_one_stream(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run_json(capsys, "-c", config, "--from", write_csv(tmp_path / "w.csv", values()))
    header, *lines = (tmp_path / "w.csv").read_text().splitlines()
    for name, part in (("a.csv", lines[:50]), ("b.csv", lines[50:])):
        (tmp_path / name).write_text("\n".join([header, *part]) + "\n")
    parts = run_json(capsys, "-c", config, "--from", tmp_path / "a.csv", "--from", tmp_path / "b.csv")
    assert parts["scores"] == whole["scores"]
    assert parts["digests"]["weights"] == whole["digests"]["weights"]


def test_without_a_season_there_is_no_seasonal_column(
    config: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "-c", str(config), "--set", "model.season=none", "--from", str(data)]) == 0
    assert "seasonal" not in capsys.readouterr().out


@pytest.fixture
def ndjson(tmp_path: Path) -> tuple[Path, Path]:
    config, data = tmp_path / "n.yaml", tmp_path / "n.ndjson"
    config.write_text(NDJSON)
    lines = [
        json.dumps({"name": "a", "time": 1_795_075_200 + 10 * i, "value": math.sin(i)}).encode() for i in range(30)
    ]
    lines[7] = b'{"name":"a","time":"never","value":1}'
    lines[9] = b'{"name":"\xff'
    data.write_bytes(b"\n".join(lines) + b"\n")
    return config, data


def test_what_could_not_be_used_is_counted_and_kept(
    ndjson: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = ndjson
    letters = tmp_path / "dead.ndjson"
    said = run_json(capsys, "-c", config, "--from", data, "--dead-letters", letters)
    assert said["records"]["dead"] == 2
    assert sum(said["rejected"].values()) == 2
    first, second = map(json.loads, letters.read_text().splitlines())
    assert first["value"] == '{"name":"a","time":"never","value":1}'
    assert first["headers"]["streamlstm.error.offset"] == "7"
    assert second["value"] == {"base64": "eyJuYW1lIjoi/w=="}
    assert second["headers"]["streamlstm.error.reason"] == "decode"


def test_strict_exits_65_after_the_table(ndjson: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, data = ndjson
    assert main(["replay", "-c", str(config), "--from", str(data), "--strict"]) == 65
    captured = capsys.readouterr()
    assert "records   30 = " in captured.out
    assert "records that could not be used: 2" in captured.err


def test_on_error_fail_exits_65_at_the_record(
    ndjson: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = ndjson
    out = tmp_path / "f.parquet"
    argv = ["replay", "-c", str(config), "--from", str(data), "--set", "decode.on_error=fail", "--out", str(out)]
    assert main(argv) == 65
    captured = capsys.readouterr()
    assert "offset 7 row 0" in captured.err
    assert captured.out == ""
    assert not out.exists(), "a file that is not whole does not appear"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--from", "nothing.csv"], "nothing.csv: there is no such file"),
        ([], "--from"),
        (["--from", "{data}", "--start", "2026-01-01T00:00:00Z"], "for files take --rows"),
        (["--from", "{data}", "--rows", "0"], "--rows"),
        (["--from", "other", "--cuts", "progress"], "other is not in source.topics"),
        (["--cuts", "progress", "--start", "2026-01-01T00:00:00Z"], "leave --start and --end away"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    config: Path, data: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert main(["replay", "-c", str(config), *(a.format(data=data) for a in argv)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--dead-letters"])
def test_a_file_that_cannot_be_written_is_one_clear_line(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    path = tmp_path / "no" / "such" / "f"
    assert main(["replay", "-c", str(config), "--from", str(data), option, str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"streamlstm: error: cannot write {path}: ")
    assert line.endswith("No such file or directory")


def test_the_help_of_replay_waits_for_neither_torch_nor_arrow() -> None:
    code = (
        "import sys; from streamlstm.cli.main import main; main(['replay', '--help']);"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'pyarrow', 'kafka'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True).returncode == 0
