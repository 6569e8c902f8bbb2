"""What ``replay --checkpoint-to`` and ``--from-checkpoint`` take, refuse and leave."""

import json
import math
from pathlib import Path

import pytest

from streamlstm.cli.main import main
from streamlstm.recovery.checkpoint import open_store

CONFIG = """\
source: {type: files, topics: [history]}
decode: {series_id: [$.name], timestamp: {path: $.time}, target: $.value}
series: {interval: 10s}
model: {hidden_size: 2, horizons: 2, calendar: []}
training: {k1: 4, k2: 6}
checkpoint: {every: {records: 600}}
"""
ROWS = 1200  # of which a step takes 500


class Here:
    """A directory with a configuration and data, and how a replay is run in it."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self.capsys = directory, capsys
        self.config = directory / "c.yaml"
        self.config.write_text(CONFIG)
        self.lines = [
            json.dumps({"name": f"s{i % 3}", "time": 1_795_075_200 + 10 * (i // 3), "value": math.sin(i / 7)})
            for i in range(ROWS)
        ]
        self.data = self.write("d.ndjson", self.lines)
        self.kept, self.out = directory / "kept", directory / "f.parquet"

    def write(self, name: str, lines: list[str]) -> Path:
        path = self.directory / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def run(self, *options: object, sources: list[Path] | None = None) -> int:
        self.capsys.readouterr()
        files = [word for path in sources or [self.data] for word in ("--from", path)]
        return main(["replay", "-c", str(self.config), "--json", *map(str, (*files, *options))])

    def said(self, *options: object, sources: list[Path] | None = None) -> dict:
        assert self.run(*options, sources=sources) == 0
        said = json.loads(self.capsys.readouterr().out)
        del said["seconds"]
        return said

    def kept_options(self) -> list[object]:
        return ["--checkpoint-to", self.kept, "--out", self.out]


@pytest.fixture
def here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(tmp_path, capsys)


def test_checkpoints_change_nothing_of_what_is_written_or_printed(here: Here) -> None:
    plain = here.said("--out", here.directory / "plain.parquet")
    assert here.said(*here.kept_options()) == plain
    assert here.out.read_bytes() == (here.directory / "plain.parquet").read_bytes()
    assert sorted(p.name for p in here.directory.iterdir()) == [
        "c.yaml", "d.ndjson", "f.parquet", "kept", "plain.parquet",
    ]  # fmt: skip


def test_a_finished_replay_says_the_same_again_and_touches_nothing(here: Here) -> None:
    first = here.said(*here.kept_options())
    before = {path: path.stat().st_mtime_ns for path in here.directory.rglob("*") if path.name != "lock"}
    assert here.said(*here.kept_options(), "--resume") == first
    assert {path: path.stat().st_mtime_ns for path in here.directory.rglob("*") if path.name != "lock"} == before


def test_what_comes_later_is_added_by_going_on(here: Here) -> None:
    """A second file behind the first, and more rows of it: as if it had been one replay."""
    whole = here.said("--out", here.directory / "whole.jsonl")
    first, second = here.write("1.ndjson", here.lines[:500]), here.write("2.ndjson", here.lines[500:])
    kept = ["--checkpoint-to", here.kept, "--out", here.directory / "f.jsonl", "--resume"]
    here.said(*kept, sources=[first])
    here.said(*kept, "--rows", 1000, sources=[first, second])
    assert here.said(*kept, sources=[first, second])["digests"] == whole["digests"]
    assert (here.directory / "f.jsonl").read_bytes() == (here.directory / "whole.jsonl").read_bytes()


def test_a_parquet_file_that_is_whole_is_not_added_to(here: Here) -> None:
    here.said(*here.kept_options(), "--rows", 500)
    first = here.out.read_bytes()
    assert here.run(*here.kept_options(), "--resume") == 65
    assert "f.parquet is whole already and cannot be added to" in here.capsys.readouterr().err
    assert here.out.read_bytes() == first


def test_checkpoints_are_not_gone_on_from_unasked(here: Here) -> None:
    here.said(*here.kept_options())
    assert here.run(*here.kept_options()) == 2
    assert "holds checkpoints; add --resume to go on from them" in " ".join(here.capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--score-from", 5], "--score-from was 0"),
        (["--standardise", 10], "--standardise was None"),
        (["--dead-letters", "dead.jsonl"], "--dead-letters was None"),
    ],
)
def test_another_command_does_not_go_on(here: Here, options: list[object], says: str) -> None:
    here.said(*here.kept_options())
    assert here.run(*here.kept_options(), "--resume", *options) == 2
    assert f"--resume takes the command that was begun: {says}" in " ".join(here.capsys.readouterr().err.split())


def test_another_configuration_does_not_go_on(here: Here) -> None:
    here.said(*here.kept_options())
    assert here.run(*here.kept_options(), "--resume", "--set", "training.clip_norm=0.5") == 78
    told = (
        f"since the replay in {here.kept} was begun keys were changed: training.clip_norm (was 1.0, is 0.5); set them"
    )
    assert told in here.capsys.readouterr().err


@pytest.mark.parametrize("change", ["a value", "a row less", "rows in front", "cut short"])
def test_a_file_that_was_changed_is_named(here: Here, change: str) -> None:
    first, second = here.write("1.ndjson", here.lines[:300]), here.write("2.ndjson", here.lines[300:])
    kept = [*here.kept_options(), "--rows", 500]
    here.said(*kept, sources=[first, second])
    lines = list(here.lines[:300])
    if change == "a value":
        lines[7] = lines[7].replace("s1", "s2")
    elif change == "a row less":
        del lines[7]
    elif change == "rows in front":
        lines = lines[:2] + lines
    else:
        here.write("2.ndjson", here.lines[300:400])
    here.write("1.ndjson", lines)
    assert here.run(*here.kept_options(), "--resume", sources=[first, second]) == 65
    name = "2.ndjson" if change == "cut short" else "1.ndjson"
    assert f"{name} is not what it was" in (said := here.capsys.readouterr().err)
    assert "give it as it was, or begin again with another --checkpoint-to" in said


def test_a_file_less_is_said_with_what_to_do(here: Here) -> None:
    first, second = here.write("1.ndjson", here.lines[:300]), here.write("2.ndjson", here.lines[300:])
    here.said(*here.kept_options(), "--rows", 700, sources=[first, second])
    assert here.run(*here.kept_options(), "--resume", sources=[first]) == 65
    assert "2 files were read, and 1 are given: give them all, in the same order" in here.capsys.readouterr().err


@pytest.mark.parametrize("where", ["no parent", "in use"])
def test_a_directory_that_cannot_be_used_is_named_as_it_was_typed(here: Here, where: str) -> None:
    place = here.kept if where == "in use" else here.directory / "missing/kept"
    held = open_store(place).open() if where == "in use" else None
    assert here.run("--checkpoint-to", place) == (75 if held else 78)
    assert f"error: --checkpoint-to: {place}" in (said := here.capsys.readouterr().err)
    assert "checkpoint.url" not in said
    if held:
        held.close()


def test_an_empty_directory_to_begin_with_is_said_to_be_empty(here: Here) -> None:
    here.kept.mkdir()
    assert here.run("--from-checkpoint", here.kept) == 65
    assert f"no checkpoint in {here.kept}" in here.capsys.readouterr().err


def test_an_output_that_was_cut_by_somebody_else_is_named(here: Here) -> None:
    out = here.directory / "f.jsonl"
    options = ["--checkpoint-to", here.kept, "--out", out]
    here.said(*options, "--rows", 500)
    out.write_bytes(out.read_bytes()[:-1])
    assert here.run(*options, "--resume") == 65
    assert "f.jsonl has" in here.capsys.readouterr().err


def test_the_service_keeps_its_directory_to_itself(here: Here) -> None:
    state = here.directory / "state"
    assert here.run("--checkpoint-to", state, "--set", f"checkpoint.url={state}") == 2
    assert "checkpoint.url" in here.capsys.readouterr().err
    assert not state.exists()


def test_going_on_needs_a_place_to_go_on_from(here: Here) -> None:
    assert here.run("--resume") == 2
    assert "--checkpoint-to" in here.capsys.readouterr().err


def test_a_replay_begins_with_a_checkpoint_and_learns_on(here: Here) -> None:
    """The first half learnt and kept, then the second from there: the weights of both halves in one go."""
    whole = here.said()
    first = here.write("1.ndjson", here.lines[:600])
    second = here.write("2.ndjson", here.lines[600:])
    here.said("--checkpoint-to", here.kept, sources=[first])
    store = open_store(here.kept)
    name = here.kept / f"{store.steps()[-1]:020d}"
    for place in (here.kept, name):
        rest = here.said("--from-checkpoint", place, sources=[second])
        assert rest["digests"]["weights"] != here.said(sources=[second])["digests"]["weights"]
        assert rest["updates"] + here.said(sources=[first])["updates"] == whole["updates"]
    assert here.run("--from-checkpoint", "7", "--set", f"checkpoint.url={here.kept}") == 65
    assert "there is no checkpoint '7'" in here.capsys.readouterr().err


@pytest.mark.parametrize("how", ["latest", "step", "path", "store"])
def test_a_damaged_checkpoint_to_begin_with_is_named_with_what_to_do(here: Here, how: str) -> None:
    here.said("--checkpoint-to", here.kept)
    step = open_store(here.kept).steps()[-1]
    path = here.kept / f"{step:020d}"
    (path / "model.pt").write_bytes(b"")
    name = {"latest": "latest", "step": step, "path": path, "store": here.kept}[how]
    assert here.run("--from-checkpoint", name, "--set", f"checkpoint.url={here.kept}") == 65
    where = path if how == "path" else f"the checkpoint of step {step} in {here.kept}"
    assert f"{where} is bad: model.pt has 0 bytes" in (said := here.capsys.readouterr().err)
    assert "take another (`streamlstm checkpoint list`" in said


def test_a_state_of_another_shape_is_a_matter_of_configuration(here: Here) -> None:
    here.said("--checkpoint-to", here.kept)
    assert here.run("--from-checkpoint", here.kept, "--set", "model.hidden_size=3") == 78
    assert "does not fit the configuration" in here.capsys.readouterr().err


def test_lines_are_the_published_bytes_in_the_order_of_the_log(here: Here) -> None:
    out = here.directory / "f.ndjson"
    here.said("--out", out, "--rows", 30)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"]["offset"] for line in lines] == list(range(30))
    assert set(lines[0]) == {"schema", "series_id", "cutoff", "y", "status", "forecasts", "model", "source"}
