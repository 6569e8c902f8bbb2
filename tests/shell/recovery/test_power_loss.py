"""The commit protocol of checkpoints against an adversarial file system."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from adversary import Adversary, PowerCut, leave, model
from fakes import fingerprint

from streamlstm.engine.state import EngineState
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.recovery.scratch import Scratch
from streamlstm.series.table import Rows

STATES = 400


def state(step: int, directory: Path, origin: str = "") -> EngineState:
    """Two series leave in each step; ``origin`` is the generation whose files hold the first two."""
    torch.manual_seed(step)
    series = tuple(SeriesId("in", i, "k") for i in range(2))
    scratch = Scratch(directory, columns(0))
    for left in range(1, step + 1):
        scratch.put(Rows(tuple(SeriesId("in", 0, f"{left}-{i}") for i in range(2)), columns(2)), left)
    stored = scratch.view(None, origin)
    here = {name: [values] for name, values in columns(2).items()}
    return EngineState(step, series, here, {"w": torch.randn(2)}, {}, {}, stored)


def columns(rows: int) -> dict[str, torch.Tensor]:
    return {"h": torch.arange(3.0 * rows).view(rows, 3), "seen_ns": torch.zeros(rows, dtype=torch.int64)}


def provenance() -> Provenance:
    return Provenance("L", "i", (), {}, None, Settings("n", "h", {}, {}), fingerprint(), 0)


def explore(tmp_path: Path, forget: str, states: int) -> tuple[int, int, int]:
    """Crash states tried; those where a visible generation was not whole; those where an announced one was lost."""
    first = open_store(tmp_path / "first").open()
    origin = first.write(state(1, tmp_path), provenance()).generation.digest
    first.close()
    states_of = {1: state(1, tmp_path), 2: state(2, tmp_path, origin)}
    digests = {step: made.digests() for step, made in states_of.items()}
    linked = f"{2:020d}/stored-in-0-1.parquet"
    rng = random.Random(17)
    seen = torn = lost = 0
    operations = None
    while seen < states:
        root, after = tmp_path / "work", tmp_path / "after"
        shutil.copytree(tmp_path / "first", root)
        cut_after = rng.randrange(1, operations + 2) if operations else None
        disk = Adversary(root, model(root), cut_after, forget)
        announced = False
        try:
            open_store(root, disk).write(states_of[2], provenance())
            assert (root / linked).stat().st_nlink == 2
            announced = True
        except PowerCut:
            pass
        operations = operations or disk.done
        leave(disk.inode, after, rng)
        store = open_store(after).open()
        loaded, refused = store.newest()
        assert loaded is not None
        assert loaded.state.digests() == digests[loaded.generation.step]
        torn += bool(refused)
        lost += announced and loaded.generation.step == 1
        seen += 1
        store.close()
        shutil.rmtree(root)
        shutil.rmtree(after)
    return seen, torn, lost


def test_no_power_cut_leaves_a_torn_checkpoint_or_loses_one_that_was_announced(tmp_path):
    assert explore(tmp_path, "", STATES) == (STATES, 0, 0)


@pytest.mark.parametrize("forget", ["sync", "sync_directory", "sync_parent"])
def test_none_of_the_syncs_could_be_left_out(tmp_path, forget):
    _, torn, lost = explore(tmp_path, forget, STATES // 2)

    # Torn ones are found by their manifest and cost a generation; without the parent's sync one is simply not there.
    assert torn + lost > 0
    if forget != "sync_parent":
        assert torn > 0
