"""What the README tells people to type, and what it shows them."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from streamlstm.cli.main import cli
from streamlstm.config.load import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DATA = ROOT.parent / "shared" / "data"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every ``$ streamlstm …`` of the README, without the program's name."""
    console = "\n".join(blocks("console")).replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in console.splitlines() if line.startswith("$ streamlstm")]


def test_the_readme_shows_commands() -> None:
    assert {words[0] for words in commands()} >= {"replay", "config", "topics", "produce", "run", "health"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_takes_what_the_readme_gives_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed to the end, files and all; not run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    for name in ("ETTh2.csv", "metrics.ndjson"):
        (tmp_path / name).write_text("")
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, words[0]
        command, words = found, words[1:]
    command.make_context("streamlstm", words)


def test_the_minimal_configuration_is_the_one_in_config(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "readme.yaml").write_text(text)
    assert load(tmp_path / "readme.yaml", environ={}).config == load(ROOT / "config/minimal.yaml", environ={}).config


def test_the_forecast_shown_has_the_fields_of_one() -> None:
    (text,) = blocks("json")
    shown = json.loads(text)
    assert list(shown) == ["schema", "series_id", "cutoff", "y", "status", "forecasts", "model", "source"]
    assert list(shown["forecasts"][0]) == ["horizon", "ds", "yhat"]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_replaying_history_prints_scores_and_writes_the_forecasts(tmp_path: Path) -> None:
    (words,) = [w for w in commands() if w[0] == "replay" and "ETTh2.csv" in w]
    words = [str(DATA / w) if w == "ETTh2.csv" else str(ROOT / w) if w.startswith("config/") else w for w in words]
    words[words.index("--rows") + 1] = "600"
    words[words.index("--standardise") + 1] = words[words.index("--score-from") + 1] = "200"
    done = subprocess.run(
        [sys.executable, "-m", "streamlstm.cli.main", *words],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "skill against" in done.stdout
    assert "4,200" in done.stdout
    assert (tmp_path / "forecasts.parquet").exists()
