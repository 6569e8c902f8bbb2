"""
Bit rot over real checkpoints: any bit of any file flipped, any file cut anywhere, is found before it is parsed, and the
previous generation used.
"""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import streams
from fakes import fingerprint

from streamlstm.engine.core import Engine
from streamlstm.recovery.checkpoint import CheckpointStore, open_store
from streamlstm.recovery.progress import Link
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.recovery.stored import Room, TieredEngine
from streamlstm.transport.interfaces import Frozen, Position

SEED = 17


def provenance(offset: int) -> Provenance:
    return Provenance(
        lineage="L",
        incarnation="i",
        positions=(Position("in", 0, offset),),
        topic_ids={"in": "id"},
        progress=Link(offset, "digest"),
        settings=Settings("n", "hash", {"model.seed": 17}, {"training.k1": 4}),
        fingerprint=fingerprint(),
        created_ms=1_700_000_000_000,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> CheckpointStore:
    """Two generations of a real engine, with all the files that one can have."""
    root = tmp_path_factory.mktemp("damage")
    config = streams.small_config(series={"max_series": 50})
    batch = streams.random_batch(SEED, 600, 60, "mixed")
    opened = open_store(root / "state").open()
    engine = TieredEngine(Engine.create(config, "cpu"), Room(root / "scratch"))
    for start, end in ((0, 200), (200, 400), (400, 600)):
        engine.step(streams.part(batch, start, end))
        beside = Frozen({"lengths": [3]}, {"open": np.arange(30.0)})
        opened.write(engine.state(), provenance(end), beside)
    return opened


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    flipped = bytearray(data)
    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def campaign(store: CheckpointStore, trials: int) -> str:
    """Damage one file of the newest generation at a time; every one must be named, and the one before be used."""
    rng = random.Random(SEED)
    whole = store.newest()[0]
    assert whole is not None
    previous = store.steps()[-2]
    expected = store.load(previous).state.digests()
    assert isinstance(store.directory, Path)
    files = sorted((store.directory / f"{whole.generation.step:020d}").iterdir())
    kinds = {path.name.partition("-")[0] for path in files}
    assert kinds == {
        "MANIFEST.json",
        "beside.json",
        "beside.pt",
        "meta.json",
        "model.pt",
        "optim.pt",
        "state",
        "stored",
    }
    found: Counter[str] = Counter()
    for trial in range(trials):
        path = files[trial % len(files)]
        kind = "cut" if rng.random() < 0.2 else "flip"
        data = path.read_bytes()
        path.write_bytes(damaged(data, kind, rng))
        loaded, refused = store.newest()
        path.write_bytes(data)
        assert loaded is not None
        assert loaded.generation.step == previous, (path.name, kind, trial)
        assert loaded.state.digests() == expected, (path.name, kind, trial)
        ((step, reason, _),) = refused
        assert (step, path.name in reason) == (whole.generation.step, True), (reason, kind, trial)
        found[kind] += 1
    assert store.newest()[1] == []
    names = ", ".join(f"{path.name} ({path.stat().st_size})" for path in files)
    return (
        f"damage: {found.total()} trials (seed {SEED}; {found['flip']} bits flipped, {found['cut']} files cut) over "
        f"{names}: {found.total()} found, {found.total()} times the previous generation used"
    )


def test_no_damage_to_a_real_checkpoint_goes_unseen(store):
    print(campaign(store, 400))


@pytest.mark.soak
def test_no_damage_in_10_000_trials_goes_unseen(store):
    print(campaign(store, 10_500))
