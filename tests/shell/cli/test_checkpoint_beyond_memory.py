"""What the tools say of a checkpoint most of whose series are beyond memory."""

import json
import math
from pathlib import Path

import pytest

from streamlstm.cli.main import main
from streamlstm.recovery.checkpoint import open_store

CONFIG = """\
source: {{type: files, topics: [history]}}
decode: {{series_id: [$.name], timestamp: {{path: $.time}}, target: $.value}}
series: {{interval: 10s, max_series: 5}}
model: {{hidden_size: 2, horizons: 2, calendar: []}}
training: {{k1: 4, k2: 6, max_wait: 5}}
checkpoint: {{url: {kept}, every: {{records: 600}}}}
"""
SERIES, ROWS = 30, 1200


class Kept:
    """Generations that a replay of 30 series with room for 5 has left, and the tools over them."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self.capsys = directory, capsys
        self.kept, self.config = directory / "kept", directory / "c.yaml"
        self.config.write_text(CONFIG.format(kept=self.kept))
        self.data = self.write("d.ndjson", 0, ROWS)
        self.said("replay", "--from", self.data, "--checkpoint-to", self.kept, "--set", "checkpoint.url=none")
        *_, self.older, self.newest = open_store(self.kept).steps()

    def write(self, name: str, first: int, last: int) -> Path:
        path = self.directory / name
        lines = [
            json.dumps({"name": f"s{i % SERIES}", "time": 1_795_075_200 + 10 * (i // SERIES), "value": math.sin(i / 7)})
            for i in range(first, last)
        ]
        path.write_text("\n".join(lines) + "\n")
        return path

    def said(self, *command: object, json_: bool = True) -> dict:
        assert main([*map(str, command), "-c", str(self.config), *(["--json"] if json_ else [])]) == 0
        out = self.capsys.readouterr().out
        return json.loads(out) if json_ else out


@pytest.fixture
def kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Kept:
    return Kept(tmp_path, capsys)


def test_list_show_and_verify_count_those_in_memory_and_those_stored(kept: Kept) -> None:
    listed = kept.said("checkpoint", "list")["checkpoints"][-1]
    verified = kept.said("checkpoint", "verify", "latest")["checkpoints"][-1]
    shown = kept.said("checkpoint", "show", "latest")
    counts = [(told["series"], told["series_stored"]) for told in (listed, verified, shown)]
    assert counts == [(5, 25)] * 3
    parquet = sum(size for name, size in shown["files"].items() if name.endswith(".parquet"))
    assert shown["bytes_per_series"] == round(parquet / SERIES, 1)


def test_the_tables_say_the_same(kept: Kept) -> None:
    header, *_, last = kept.said("checkpoint", "list", json_=False).splitlines()
    assert [last.split()[header.split().index(name)] for name in ("series", "stored")] == ["5", "25"]
    header, *_, last = kept.said("checkpoint", "verify", json_=False).splitlines()
    assert [last.split()[header.split().index(name)] for name in ("series", "stored")] == ["5", "25"]
    assert "5 series in memory, 25 stored" in kept.said("checkpoint", "show", "latest", json_=False)


def test_diff_finds_a_series_wherever_it_is(kept: Kept) -> None:
    found = kept.said("checkpoint", "diff", str(kept.older), str(kept.newest))["series"]
    assert (found["in_memory"], found["stored"]) == ({"a": 5, "b": 5}, {"a": 25, "b": 25})
    assert (found["added"], found["gone"]) == ([], [])
    assert len(found["changed"]) + found["same"] == SERIES
    assert len(found["changed"]) == SERIES
    told = kept.said("checkpoint", "diff", str(kept.older), str(kept.newest), json_=False)
    assert "in memory: 5 -> 5" in told
    assert "stored: 25 -> 25" in told


def test_an_archive_holds_them_too(kept: Kept) -> None:
    """Its diff and a replay from it read them from the archive."""
    archive = kept.directory / "a.tar"
    kept.said("checkpoint", "export", "latest", "--out", archive, json_=False)
    found = kept.said("checkpoint", "diff", archive, "latest")
    assert found["equal"] is True
    assert (found["series"]["same"], found["series"]["changed"]) == (SERIES, [])

    rest = ["--from", kept.write("rest.ndjson", ROWS, ROWS + 300)]
    from_store = kept.said("replay", *rest, "--from-checkpoint", "latest")
    from_archive = kept.said("replay", *rest, "--from-checkpoint", archive)
    assert from_archive["digests"] == from_store["digests"]
