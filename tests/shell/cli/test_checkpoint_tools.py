import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from streamlstm.cli import stored
from streamlstm.cli.main import main
from streamlstm.config.load import load
from streamlstm.engine.state import EngineState
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.progress import Link
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.transport.interfaces import Position

LINEAGE = "0123456789abcdef"


def state(step: int, series: Sequence[str] = ("a", "b")) -> EngineState:
    """With every step a weight, a moment and a column of each series move; the other tensor and column stay."""
    rows = len(series)
    return EngineState(
        step=step,
        series=tuple(SeriesId("in", 0, key) for key in series),
        columns={"still": [torch.ones(rows)], "carry": [torch.full((rows, 2), float(step))]},
        weights={"w": torch.full((3,), float(step)), "fixed": torch.zeros(2)},
        training={"moment": torch.full((2,), step / 2)},
        meta={"fresh": 10 * step, "learner": {"number": step}, "queue": {"series": [["in", 0, "a"]]}},
    )


def made(step: int, settings: Settings, lineage: str = LINEAGE) -> Provenance:
    return Provenance(
        lineage=lineage,
        incarnation="i" * 16,
        positions=(Position("in", 0, 10 * step),),
        topic_ids={"in": "topic-id"},
        progress=Link(2 * step, f"digest {step}") if step else None,
        settings=settings,
        fingerprint={"cpu": "one that nobody has"},
        created_ms=1_795_075_200_000,
    )


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration whose checkpoints are of steps 0, 3 and 7."""
    file = tmp_path / "c.yaml"
    decode = {"series_id": ["$.id"], "timestamp": {"path": "$.ts"}, "target": "$.v"}
    url = str(tmp_path / "state")
    file.write_text(json.dumps({"source": {"topics": ["in"]}, "decode": decode, "checkpoint": {"url": url}}))
    write(str(file), state(0, ()), state(3), state(7, ("b", "c")))
    return str(file)


def write(config: str, *states: EngineState, lineage: str = LINEAGE, **override: str) -> None:
    loaded = load(Path(config), sets=[f"{k.replace('__', '.')}={v}" for k, v in override.items()], environ={})
    store = open_store(loaded.config.checkpoint.url).open()
    for written in states:
        store.write(written, made(written.step, Settings.of(loaded.config), lineage))
    store.close()


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["checkpoint", *args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    return json.loads(run(capsys, *args, "--json"))


def refused(capsys: pytest.CaptureFixture[str], code: int, *args: str) -> str:
    assert main(["checkpoint", *args]) == code
    return capsys.readouterr().err


def steps(tmp_path: Path) -> list[int]:
    return open_store(str(tmp_path / "state")).steps()


def aside(tmp_path: Path) -> list[str]:
    return open_store(str(tmp_path / "state")).bad()


def damage(tmp_path: Path, step: int) -> None:
    file = tmp_path / "state" / f"{step:020d}" / "model.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# show


def test_show_says_what_differs_from_the_configuration_and_this_machine(capsys, config):
    shown = told(capsys, "show", "7", "-c", config, "--set", "training.k1=8")
    assert shown["config"]["differs"] == [{"key": "training.k1", "class": "learning", "then": 16, "now": 8}]
    assert "cpu was one that nobody has" in " ".join(shown["fingerprint_differs"])
    assert shown["bits_match"] is False


def test_show_says_where_it_stands_and_what_is_in_it(capsys, config):
    shown = told(capsys, "show", "latest", "-c", config)
    assert shown["positions"] == [{"topic": "in", "partition": 0, "next_offset": 70}]
    assert shown["topic_ids"] == {"in": "topic-id"}
    assert (shown["revision"], shown["excluded"]) == (0, [])
    assert shown["progress"] == {"offset": 14, "digest": "digest 7"}
    assert (shown["series"], shown["queued_windows"]) == (2, 1)
    assert shown["counters"] == {"fresh": 70, "learner.number": 7}
    assert shown["columns"]["carry"] == {"dtype": "float32", "shape": [2]}
    assert sum(shown["files"].values()) == shown["bytes"]
    assert shown["bytes_per_series"] > 0


def test_show_as_text_has_the_same(capsys, config):
    text = run(capsys, "show", "3", "-c", config)
    for fact in ("checkpoint of step 3", "2 series", "in-0  next offset 30", "other bits here", "MANIFEST.json"):
        assert fact in text


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(capsys, config):
    assert "there is: 0, 3, 7 (or latest)" in refused(capsys, 65, "show", "4", "-c", config)


# verify


def test_verify_reads_all_and_changes_nothing(capsys, config, tmp_path):
    found = told(capsys, "verify", "-c", config)
    assert [row["step"] for row in found["checkpoints"]] == [0, 3, 7]
    assert found["bad"] == 0


def test_where_there_is_nothing_to_verify_that_is_no_success(capsys, config, tmp_path):
    """A volume that is not mounted must not pass for checkpoints that were found whole."""
    said = refused(capsys, 65, "verify", "-c", config, "--set", f"checkpoint.url={tmp_path / 'none'}")
    assert f"{tmp_path / 'none'} does not exist" in said


def test_a_checkpoint_that_is_pruned_while_it_is_verified_is_neither_bad_nor_missing(
    capsys, config, tmp_path, monkeypatch
):
    store = open_store(tmp_path / "state")
    load_it = store.load

    def late(step):
        shutil.rmtree(tmp_path / "state" / f"{step:020d}")
        return load_it(step)

    store.load = late
    monkeypatch.setattr(stored, "open_for_reading", lambda _: store)
    assert "was pruned meanwhile; verify again" in refused(capsys, 75, "verify", "3", "-c", config)
    assert store.steps() == [0, 7]


def test_verify_names_the_file_that_is_damaged_and_ends_with_65(capsys, config, tmp_path):
    damage(tmp_path, 3)
    assert "1 of 3 checkpoints" in (said := refused(capsys, 65, "verify", "-c", config))
    assert "3: model.pt is damaged" in said
    assert (steps(tmp_path), aside(tmp_path)) == ([0, 3, 7], [])


@pytest.mark.parametrize("command", ["show", "restore", "export", "diff"])
def test_a_damaged_one_is_named_with_what_to_do(capsys, config, tmp_path, command):
    damage(tmp_path, 7)
    options = {"export": ["--out", str(tmp_path / "x.tar")], "diff": ["3"]}.get(command, [])
    said = refused(capsys, 65, command, "latest", *options, "-c", config)
    assert f"the checkpoint of step 7 in {tmp_path / 'state'} is bad: model.pt is damaged" in said
    assert "take another (`streamlstm checkpoint list`" in said


@pytest.mark.parametrize("file", ["model.pt", "MANIFEST.json"])
def test_a_damaged_one_at_a_path_is_named_by_its_path(capsys, config, tmp_path, file):
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "state" / f"{7:020d}", copy)
    (copy / file).write_bytes(b"{")
    for command in (["diff", str(copy), "3"], ["restore", str(copy)]):
        assert f"{copy} is bad: {file} " in (said := refused(capsys, 65, *command, "-c", config))
        assert "take another" in said


def test_verify_of_one_does_not_look_at_the_others(capsys, config, tmp_path):
    damage(tmp_path, 3)
    run(capsys, "verify", "7", "-c", config)


# diff


def test_a_checkpoint_is_the_same_bits_as_itself(capsys, config):
    assert told(capsys, "diff", "3", "3", "-c", config)["equal"] is True
    assert "the same bits" in run(capsys, "diff", "3", "3", "-c", config)


def test_diff_says_what_differs_to_the_element(capsys, config):
    found = told(capsys, "diff", "3", "7", "-c", config)
    assert found["equal"] is False
    assert found["weights"] == [{"name": "w", "a": "float32[3]", "b": "float32[3]", "elements": 3, "max_abs": 4.0}]
    assert [t["name"] for t in found["training"]] == ["moment"]
    assert [s[2] for s in found["series"]["added"]] == ["c"]
    assert [s[2] for s in found["series"]["gone"]] == ["a"]
    assert [s[2] for s in found["series"]["changed"]] == ["b"]
    assert found["series"]["columns"] == {"carry": 1}
    assert {"name": "in-0", "a": 30, "b": 70} in found["positions"]
    assert {"name": "fresh", "a": 30, "b": 70} in found["counters"]


def test_a_negative_zero_is_other_bits_and_the_same_nan_is_not(capsys, config):
    one, other = state(8), state(9)
    one.weights["w"], other.weights["w"] = torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan])
    write(config, one, other)
    (found,) = told(capsys, "diff", "8", "9", "-c", config)["weights"]
    assert (found["elements"], found["max_abs"]) == (1, 0.0)


# export, and restore from it


def test_an_export_brings_a_lost_checkpoint_back_to_the_bit(capsys, config, tmp_path):
    out = str(tmp_path / "seven.tar")
    run(capsys, "export", "7", "-c", config, "--out", out)
    before = (tmp_path / "state" / f"{7:020d}" / "MANIFEST.json").read_bytes()
    shutil.rmtree(tmp_path / "state" / f"{7:020d}")

    done = told(capsys, "restore", out, "-c", config)

    assert (done["source"], done["step"]) == ("path", 7)
    assert (tmp_path / "state" / f"{7:020d}" / "MANIFEST.json").read_bytes() == before
    assert told(capsys, "diff", out, "7", "-c", config)["equal"] is True


def test_an_export_starts_a_new_machine(capsys, config, tmp_path):
    out = str(tmp_path / "seven.tar")
    run(capsys, "export", "latest", "-c", config, "--out", out)
    shutil.rmtree(tmp_path / "state")
    run(capsys, "restore", out, "-c", config)
    assert steps(tmp_path) == [7]


def test_exporting_twice_gives_the_same_bytes_and_never_overwrites(capsys, config, tmp_path):
    one, two = tmp_path / "1.tar", tmp_path / "2.tar"
    run(capsys, "export", "7", "-c", config, "--out", str(one))
    run(capsys, "export", "7", "-c", config, "--out", str(two))
    assert one.read_bytes() == two.read_bytes()
    said = " ".join(refused(capsys, 2, "export", "3", "-c", config, "--out", str(one)).split())
    assert "'--out'" in said or "--out:" in said
    assert "exists: name another file, or remove it" in said
    assert one.read_bytes() == two.read_bytes()


def test_an_export_that_cannot_be_written_is_a_matter_of_the_disk(capsys, config, tmp_path):
    out = tmp_path / "missing" / "x.tar"
    said = refused(capsys, 74, "export", "7", "-c", config, "--out", str(out))
    assert f"cannot write {out}: No such file or directory; look at the disk, or name a file elsewhere" in said


def test_a_damaged_checkpoint_is_not_exported(capsys, config, tmp_path):
    damage(tmp_path, 7)
    assert "model.pt is damaged" in refused(capsys, 65, "export", "7", "-c", config, "--out", str(tmp_path / "x.tar"))
    assert [path.name for path in tmp_path.iterdir() if "tar" in path.name] == []


def test_export_and_show_work_beside_a_running_service(capsys, config, tmp_path):
    running = open_store(str(tmp_path / "state")).open()
    run(capsys, "export", "7", "-c", config, "--out", str(tmp_path / "7.tar"))
    run(capsys, "show", "7", "-c", config)
    run(capsys, "verify", "-c", config)
    run(capsys, "restore", "3", "-c", config, "--dry-run")
    running.close()


def test_a_damaged_archive_is_refused_and_nothing_is_moved(capsys, config, tmp_path):
    out = tmp_path / "seven.tar"
    run(capsys, "export", "7", "-c", config, "--out", str(out))
    data = bytearray(out.read_bytes())
    with tarfile.open(out) as tar:
        (model,) = [m for m in tar.getmembers() if m.name.endswith("model.pt")]
    data[model.offset_data + 40] ^= 1
    out.write_bytes(data)
    assert "model.pt is damaged" in refused(capsys, 65, "restore", str(out), "-c", config)
    assert (steps(tmp_path), aside(tmp_path)) == ([0, 3, 7], [])


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_archive_is_refused(capsys, config, tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    assert "is no archive of a checkpoint" in refused(capsys, 65, "restore", str(tmp_path / "x.tar"), "-c", config)


def test_an_archive_of_another_run_is_refused(capsys, config, tmp_path):
    out = str(tmp_path / "nine.tar")
    write(config, state(9), lineage="another", checkpoint__url=str(tmp_path / "elsewhere"))
    run(capsys, "export", "9", "-c", config, "--set", f"checkpoint.url={tmp_path / 'elsewhere'}", "--out", out)
    assert "is of run another" in refused(capsys, 65, "restore", out, "-c", config)


def test_an_archive_of_another_deployment_is_refused(capsys, config, tmp_path):
    out = str(tmp_path / "nine.tar")
    write(config, state(9), name="theirs", checkpoint__url=str(tmp_path / "elsewhere"))
    run(capsys, "export", "9", "-c", config, "--set", f"checkpoint.url={tmp_path / 'elsewhere'}", "--out", out)
    assert "of the deployment 'theirs'" in refused(capsys, 65, "restore", out, "-c", config)


# restore


def test_restore_puts_newer_ones_aside_and_says_so(capsys, config, tmp_path):
    done = told(capsys, "restore", "3", "-c", config)
    assert done["put_aside"] == [{"step": 7, "name": f"{7:020d}.bad-1"}]
    assert (steps(tmp_path), aside(tmp_path)) == ([0, 3], [f"{7:020d}.bad-1"])


def test_a_rehearsal_says_the_same_and_moves_nothing(capsys, config, tmp_path):
    assert "would be put aside: step 7" in run(capsys, "restore", "3", "-c", config, "--dry-run")
    assert (steps(tmp_path), aside(tmp_path)) == ([0, 3, 7], [])


def test_what_was_put_aside_is_brought_back_by_its_name(capsys, config, tmp_path):
    run(capsys, "restore", "3", "-c", config)
    run(capsys, "restore", f"{7:020d}.bad-1", "-c", config)
    assert (steps(tmp_path), aside(tmp_path)) == ([0, 3, 7], [])


def test_a_bad_one_is_not_brought_back(capsys, config, tmp_path):
    damage(tmp_path, 7)
    run(capsys, "restore", "3", "-c", config)
    assert "model.pt is damaged" in refused(capsys, 65, "restore", f"{7:020d}.bad-1", "-c", config)
    assert (steps(tmp_path), aside(tmp_path)) == ([0, 3], [f"{7:020d}.bad-1"])


def test_a_damaged_one_is_not_gone_back_to(capsys, config, tmp_path):
    damage(tmp_path, 3)
    assert "model.pt is damaged" in refused(capsys, 65, "restore", "3", "-c", config)
    assert steps(tmp_path) == [0, 3, 7]


def test_one_of_another_configuration_is_refused_with_what_was_changed(capsys, config, tmp_path):
    said = refused(capsys, 78, "restore", "3", "-c", config, "--set", "model.hidden_size=8")
    assert "since the checkpoint of step 3 keys were changed: model.hidden_size (was 64, is 8); set them back" in said
    assert steps(tmp_path) == [0, 3, 7]


def test_one_that_the_chain_was_trimmed_beyond_is_refused(capsys, config, tmp_path):
    store = open_store(str(tmp_path / "state")).open()
    for step in (0, 3):
        store.put_aside(step)
    store.close()
    assert "nothing could be replayed" in refused(capsys, 65, "restore", f"{3:020d}.bad-1", "-c", config)
    run(capsys, "restore", f"{3:020d}.bad-1", "-c", config, "--set", "sink.progress.trim=false")
    assert steps(tmp_path) == [3]


def test_while_the_service_runs_it_is_told_who_holds_the_lock(capsys, config, tmp_path):
    running = open_store(str(tmp_path / "state")).open()
    assert "is in use by another process" in refused(capsys, 75, "restore", "3", "-c", config)
    running.close()
    assert steps(tmp_path) == [0, 3, 7]


# prune


def test_prune_removes_what_is_not_kept_and_says_what(capsys, config, tmp_path):
    assert told(capsys, "prune", "-c", config)["removed"] == []
    few = ("--set", "checkpoint.keep.last=2", "--set", "checkpoint.keep.daily=0")
    foreseen = told(capsys, "prune", "-c", config, *few, "--dry-run")
    assert steps(tmp_path) == [0, 3, 7]
    done = told(capsys, "prune", "-c", config, *few)
    assert done["removed"] == foreseen["removed"] == [f"{0:020d}"]
    assert done["kept"] == foreseen["kept"] == steps(tmp_path) == [3, 7]


def test_prune_takes_the_lock(capsys, config, tmp_path):
    running = open_store(str(tmp_path / "state")).open()
    assert "is in use by another process" in refused(capsys, 75, "prune", "-c", config)
    running.close()


def test_a_mistyped_one_makes_no_directory(capsys, config, tmp_path):
    none = tmp_path / "none"
    refused(capsys, 65, "restore", "3", "-c", config, "--set", f"checkpoint.url={none}")
    assert not none.exists()
