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
from streamlstm.engine.state import EngineState, RelaidStored
from streamlstm.errors import CheckpointError
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.directory import Directory
from streamlstm.recovery.manifest import LAYOUT, Layout, Migration
from streamlstm.recovery.stored import Room, TieredEngine
from streamlstm.series.table import Rows

GOLDEN = Path(__file__).parents[2] / "golden"
SCHEMAS = sorted(GOLDEN.glob("schema-*"))


def floats(values: list[Any]) -> np.ndarray:
    return np.array(values, np.float64)


def test_there_is_one_of_every_schema_and_a_migration_from_each_but_the_newest():
    assert [path.name for path in SCHEMAS] == [f"schema-{n}" for n in range(1, LAYOUT.schema + 1)]
    assert sorted(LAYOUT.migrations) == list(range(1, LAYOUT.schema))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_golden_checkpoint_loads_and_goes_on(path, tmp_path):
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
    config = load(path / "config.yaml", environ={}).config
    engine = TieredEngine.of(Engine.restore(config, "cpu", loaded.state), Room(tmp_path), loaded.state)
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


def renamed_row(rows: Rows) -> Rows:
    return replace(rows, columns={("steps" if name == "age" else name): each for name, each in rows.columns.items()})


def moved(meta: dict[str, Any]) -> dict[str, Any]:
    return {**meta, "lineage": f"{meta['lineage']} of old"}


NEXT = LAYOUT.schema + 1
THEN = Layout(NEXT, {**LAYOUT.migrations, LAYOUT.schema: Migration(meta=moved, state=renamed, rows=renamed_row)})


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
    assert loaded.generation.stored > 0
    ages = {one: row["age"] for one, row in by_series(was.state).items()}
    assert {one: row["steps"] for one, row in by_series(loaded.state).items()} == ages
    assert len(ages) == loaded.generation.series + loaded.generation.stored


def test_files_of_an_older_schema_are_not_taken_over_by_a_newer_generation(tmp_path):
    state = tmp_path / "state"
    shutil.copytree(SCHEMAS[-1], state)
    config = load(state / "config.yaml", environ={}).config
    store = CheckpointStore(Directory(state)).open()
    loaded, _ = store.newest()
    assert loaded is not None
    old = replace(loaded.state, stored=RelaidStored(loaded.state.stored, lambda rows: rows))
    taken_over = {}
    for number, begun in enumerate((loaded.state, old)):
        engine = TieredEngine.of(Engine.restore(config, "cpu", begun), Room(tmp_path), begun)
        again = replace(engine.state(), step=loaded.state.step + 1 + number)
        store.write(again, loaded.generation.provenance)
        taken_over[number] = [file.step for file in store.header(again.step).files_left if file.step < again.step]
    store.close()
    assert taken_over == {0: [1, 2], 1: []}


def by_series(state: EngineState) -> dict[SeriesId, dict[str, int]]:
    """One scalar column of every series, in memory or not."""
    return {
        one: {name: int(rows.columns[name][at]) for name in ("age", "steps") if name in rows.columns}
        for rows in state.rows()
        for at, one in enumerate(rows.series)
    }


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
