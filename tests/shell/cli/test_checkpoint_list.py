import json
from pathlib import Path

import pytest
import torch

from streamlstm.cli.main import main
from streamlstm.engine.state import EngineState
from streamlstm.errors import ConfigError
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.transport.interfaces import Position


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration whose checkpoints are of steps 0 and 7."""
    store = open_store(tmp_path / "state").open()
    for step, series in ((0, ()), (7, (SeriesId("in", 0, "a"),))):
        state = EngineState(step, series, {"n": [torch.zeros(1)]}, {}, {}, {})
        made = Provenance(
            lineage="L",
            incarnation="i",
            positions=(Position("in", 0, 10 * step),),
            topic_ids={},
            progress=None,
            settings=Settings("n", "0123456789abcdef", {}, {}),
            fingerprint={},
            created_ms=1_795_075_200_000,
        )
        store.write(state, made)
    store.close()
    file = tmp_path / "c.yaml"
    decode = {"series_id": ["$.id"], "timestamp": {"path": "$.ts"}, "target": "$.v"}
    written = {
        "version": 1,
        "source": {"topics": ["in"]},
        "decode": decode,
        "checkpoint": {"url": str(tmp_path / "state")},
    }
    file.write_text(json.dumps(written))
    return str(file)


def listed(capsys, config: str) -> dict:
    assert main(["checkpoint", "list", "-c", config, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_checkpoint_is_a_line(capsys, config):
    assert main(["checkpoint", "list", "-c", config]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    columns = "step time age bytes series stored deployment run revision state positions"
    assert header.split() == columns.split()
    assert first.split()[0] == "0"
    assert [second.split()[i] for i in (0, 1, 4, 5, 6, 7, 8)] == ["7", "2026-11-19T08:00:00Z", "1", "0", "n", "L", "0"]
    assert second.split()[-1] == "in-0@70"
    assert "whole, newest" in second
    assert "newest" not in first


def test_json_has_the_positions(capsys, config):
    last = listed(capsys, config)["checkpoints"][-1]
    assert last["positions"] == [{"topic": "in", "partition": 0, "next_offset": 70}]
    assert last["config"] == "01234567"


def test_a_bad_one_is_listed_with_its_reason_and_left_alone(capsys, config, tmp_path):
    damaged = tmp_path / "state" / f"{7:020d}" / "model.pt"
    damaged.write_bytes(b"")

    first, second = listed(capsys, config)["checkpoints"]

    assert first["valid"]
    assert not second["valid"]
    assert second["reason"].startswith("model.pt has 0 bytes")
    assert damaged.exists()


def test_a_running_service_is_not_disturbed(capsys, config, tmp_path):
    running = open_store(tmp_path / "state").open()
    assert len(listed(capsys, config)["checkpoints"]) == 2
    running.close()


def test_those_put_aside_are_named(capsys, config, tmp_path):
    store = open_store(tmp_path / "state").open()
    store.put_aside(7)
    store.close()
    (found,) = listed(capsys, config)["put_aside"]
    assert (found["aside"], found["valid"], found["next"]) == (f"{7:020d}.bad-1", True, False)


def test_one_put_aside_says_why_it_is_bad(capsys, config, tmp_path):
    store = open_store(tmp_path / "state").open()
    (tmp_path / "state" / f"{7:020d}" / "optim.pt").unlink()
    store.put_aside(7)
    store.close()
    (found,) = listed(capsys, config)["put_aside"]
    assert found["reason"] == "optim.pt is missing"


def test_the_next_start_takes_the_newest_that_is_whole(capsys, config, tmp_path):
    (tmp_path / "state" / f"{7:020d}" / "optim.pt").unlink()
    assert [row["next"] for row in listed(capsys, config)["checkpoints"]] == [True, False]


def test_where_nothing_is_there_it_says_so(capsys, config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["checkpoint", "list", "-c", config, "--set", f"checkpoint.url={tmp_path / 'empty'}"]) == 0
    assert capsys.readouterr().out == f"no checkpoint in {tmp_path / 'empty'}\n"


def test_a_directory_that_does_not_exist_is_told_from_an_empty_one(capsys, config, tmp_path):
    assert main(["checkpoint", "list", "-c", config, "--set", f"checkpoint.url={tmp_path / 'none'}"]) == 0
    assert f"{tmp_path / 'none'} does not exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["list"], ["show", "latest"], ["verify"], ["restore", "7", "--dry-run"], ["prune"]]
)
def test_a_file_where_the_directory_should_be_is_a_matter_of_configuration(capsys, config, tmp_path, command):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError) as at_start:
        open_store(tmp_path / "file").open()
    assert main(["checkpoint", *command, "-c", config, "--set", f"checkpoint.url={tmp_path / 'file'}"]) == 78
    assert capsys.readouterr().err == f"streamlstm: error: {at_start.value}\n"
