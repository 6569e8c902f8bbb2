"""Writes the golden checkpoint of the current schema. See README.md."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import streams  # noqa: E402, because the tests' own modules are found by the line above

from streamlstm.config.docs import to_yaml  # noqa: E402, because of the line above
from streamlstm.config.keys import config_hash, identity_values, learning_values  # noqa: E402, because of it too
from streamlstm.engine.core import Engine  # noqa: E402, because of it too
from streamlstm.records.batch import Range  # noqa: E402, because of it too
from streamlstm.recovery.checkpoint import open_store  # noqa: E402, because of it too
from streamlstm.recovery.manifest import LAYOUT  # noqa: E402, because of it too
from streamlstm.recovery.progress import Link  # noqa: E402, because of it too
from streamlstm.recovery.provenance import Provenance, Settings  # noqa: E402, because of it too
from streamlstm.recovery.stored import Room, TieredEngine  # noqa: E402, because of it too
from streamlstm.transport.interfaces import Position  # noqa: E402, because of it too

BEFORE, AFTER, SERIES = 300, 60, 12
IN_MEMORY = 6


def main() -> None:
    """A few series with all that can happen to one, windows in the queue, and series beyond memory in two files."""
    config = streams.small_config(series={"max_series": IN_MEMORY}, training={"max_wait": IN_MEMORY})
    batch = streams.random_batch(17, BEFORE + AFTER, SERIES, "mixed")
    scratch = tempfile.TemporaryDirectory()
    engine = TieredEngine(Engine.create(config, "cpu"), Room(Path(scratch.name)))
    out = HERE / f"schema-{LAYOUT.schema}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    settings = Settings(config.name, config_hash(config), identity_values(config), learning_values(config))
    made = Provenance(
        lineage="golden",
        incarnation="first",
        positions=(Position("in", 0, BEFORE),),
        topic_ids={"in": "topic id"},
        progress=Link(7, "digest of a record"),
        settings=settings,
        fingerprint={"cpu": "any"},
        created_ms=1_700_000_000_000,
        revision=1,
        excluded=(Range("in", 0, 3, 5),),
    )
    store = open_store(Path(scratch.name) / "state").open()
    for start, end in ((0, BEFORE - 20), (BEFORE - 20, BEFORE)):
        engine.step(streams.part(batch, start, end))
        store.write(engine.state(), made)
    store.close()
    state, step = engine.state(), engine.step_number
    shutil.copytree(Path(scratch.name) / "state" / f"{step:020d}", out / f"{step:020d}")
    then = streams.part(batch, BEFORE, BEFORE + AFTER)
    # Records alone: what else a batch may hold is no matter of what was stored.
    code = np.array([int(then.series[i].key[1:]) for i in then.code])
    report = engine.step(streams.batch_of(code, then.time_ns, then.target, then.broker_ns, then.offset))
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    told = {
        "step": step,
        "digests": state.digests(),
        "then": {
            "code": code.tolist(),
            "offset": then.offset.tolist(),
            "time_ns": then.time_ns.tolist(),
            "broker_ns": then.broker_ns.tolist(),
            "target": _plain(then.target),
        },
        "yhat": [_plain(row) for row in report.forecasts.yhat_MK],
    }
    (out / "expected.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


if __name__ == "__main__":
    main()
