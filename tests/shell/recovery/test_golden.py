"""Checkpoints of every schema there was load and go on; those of one to come are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streams
import torch

from streamlstm.config.load import load
from streamlstm.engine.core import Engine
from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.directory import Directory
from streamlstm.recovery.manifest import LAYOUT, Layout, Migration

GOLDEN = Path(__file__).parents[2] / "golden"
SCHEMAS = sorted(GOLDEN.glob("schema-*"))


def floats(values: list[Any]) -> np.ndarray:
    return np.array(values, np.float64)


def test_there_is_one_of_every_schema_and_a_migration_from_each_but_the_newest():
    assert [path.name for path in SCHEMAS] == [f"schema-{n}" for n in range(1, LAYOUT.schema + 1)]
    assert sorted(LAYOUT.migrations) == list(range(1, LAYOUT.schema))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_golden_checkpoint_loads_and_goes_on(path):
    told = json.loads((path / "expected.json").read_bytes())
    store = CheckpointStore(Directory(path))

    loaded, refused = store.newest()

    assert loaded is not None, "regenerate with: python tests/golden/make.py"
    assert refused == []
    assert store.verify(told["step"]) == loaded.generation
    made = loaded.generation.provenance
    assert (made.lineage, made.revision, [tuple(r) for r in made.excluded]) == ("golden", 1, [("in", 0, 3, 5)])
    if path == SCHEMAS[-1]:  # a migration may change what is kept, never what comes of it
        assert loaded.state.digests() == told["digests"]
    engine = Engine.restore(load(path / "config.yaml", environ={}).config, "cpu", loaded.state)
    then = told["then"]
    report = engine.step(
        streams.batch_of(
            np.array(then["code"]),
            np.array(then["time_ns"]),
            floats(then["target"]),
            np.array(then["broker_ns"]),
            np.array(then["offset"]),
        )
    )
    # Other machines round otherwise.
    np.testing.assert_allclose(report.forecasts.yhat_MK, floats(told["yhat"]), rtol=1e-3, atol=1e-4)


def renamed(state: EngineState) -> EngineState:
    columns = {("steps" if name == "age" else name): chunks for name, chunks in state.columns.items()}
    return replace(state, columns=columns, meta={**state.meta, "born": 2})


def moved(meta: dict[str, Any]) -> dict[str, Any]:
    return {**meta, "lineage": f"{meta['lineage']} of old"}


NEXT = LAYOUT.schema + 1
THEN = Layout(NEXT, {**LAYOUT.migrations, LAYOUT.schema: Migration(meta=moved, state=renamed)})


def test_an_older_schema_is_brought_up_to_this_one_by_its_migration():
    store = CheckpointStore(Directory(SCHEMAS[-1]), THEN)
    was = CheckpointStore(Directory(SCHEMAS[-1])).newest()[0]

    loaded, _ = store.newest()

    assert loaded is not None
    assert was is not None
    assert loaded.generation.provenance.lineage == "golden of old"
    assert store.verify(loaded.generation.step) == loaded.generation
    assert loaded.state.meta == {**was.state.meta, "born": 2}
    assert torch.equal(loaded.state.column("steps"), was.state.column("age"))


def test_a_newer_schema_is_refused_with_both_numbers_and_an_older_one_beside_it_is_not_used(tmp_path):
    state = tmp_path / "state"
    shutil.copytree(SCHEMAS[-1], state)
    store = CheckpointStore(Directory(state), THEN).open()
    loaded, _ = store.newest()
    assert loaded is not None
    store.write(replace(loaded.state, step=loaded.state.step + 1), loaded.generation.provenance)
    store.close()

    with pytest.raises(CheckpointError, match=f"layout {NEXT}, and this version reads up to {LAYOUT.schema}"):
        CheckpointStore(Directory(state)).newest()
    assert CheckpointStore(Directory(state), THEN).newest()[1] == []
