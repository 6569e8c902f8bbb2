"""Going back to an older generation: wherever it is killed, and whatever the start after it finds."""

import itertools
from pathlib import Path

import pytest
from fakes import PACE, SETTINGS, Broker, Crash, Fate, FatedDisk, Process, message

from streamlstm.recovery.archive import export
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.restore import Restored, Rules, restore

RULES = Rules(SETTINGS, trims=True)


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    """What a run over some records left, whose checkpoints are in ``state``."""
    made = Broker({"in": [[message(f"s{i % 3}", float(i * 7 % 31)) for i in range(80)]]})
    Process(made, tmp_path / "state", pace=PACE).run()
    return made


def steps(tmp_path: Path) -> list[int]:
    return open_store(tmp_path / "state").steps()


def go_back(tmp_path: Path, what: str, fate: Fate | None = None) -> Restored:
    store = open_store(tmp_path / "state", FatedDisk(fate) if fate else None)
    try:
        return restore(store, what, RULES, dry_run=False)
    finally:
        store.close()


def test_the_start_after_it_computes_the_same_bits_and_publishes_nothing_again(broker, tmp_path):
    reference = Broker({"in": broker.inputs["in"]})
    digests = Process(reference, tmp_path / "reference").run().state().digests()
    published = list(broker.published)
    oldest = steps(tmp_path)[0]

    go_back(tmp_path, str(oldest))
    again = Process(broker, tmp_path / "state")
    engine = again.run()

    assert again.ready is not None
    assert again.ready.generation.step == oldest
    assert again.ready.replayed_steps > 0
    assert engine.state().digests() == digests
    assert broker.published == published


@pytest.mark.parametrize("from_archive", [False, True])
def test_killed_at_any_call_it_leaves_a_store_to_start_from_and_is_finished_by_itself(tmp_path, broker, from_archive):
    kept = steps(tmp_path)
    archive = tmp_path / "oldest.tar"
    export(open_store(tmp_path / "state"), kept[0], archive)
    digests = open_store(tmp_path / "state").load(kept[-1]).state.digests()
    for at in itertools.count():
        state = tmp_path / f"killed-{at}"
        copy(tmp_path / "state", state)
        what = str(kept[0])
        if from_archive:
            what = str(archive)
            (state / f"{kept[0]:020d}" / "optim.pt").write_bytes(b"damaged")
        fate = Fate(at)
        store = open_store(state, FatedDisk(fate))
        try:
            restore(store, what, RULES, dry_run=False)
            finished = True
        except Crash:
            finished = False
        store.close()

        found, _ = open_store(state).newest()
        assert found is not None
        assert found.generation.step in kept
        again = open_store(state)
        assert restore(again, what, RULES, dry_run=False).generation.step == kept[0]
        assert again.steps() == kept[:1]
        again.close()
        started = Process(clone(broker), state)
        assert started.run().state().digests() == digests
        if finished:
            break
    assert at > 5


def copy(old: Path, new: Path) -> None:
    """Every generation, as one machine takes them in from another."""
    store, made = open_store(old), open_store(new).open()
    for step in store.steps():
        made.take_in(store.files(step), step)
    made.close()


def clone(broker: Broker) -> Broker:
    """As it was, for another life."""
    return Broker(
        broker.inputs,
        published=list(broker.published),
        progress=list(broker.progress),
        next_progress=broker.next_progress,
    )
