"""Learning keys are changed at a clean stop, with the real engine: whatever is killed later, the bits are the same."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import streams
from fakes import PACE, Broker, Crash, Fate, Process, decode_in_time, message

from streamlstm.cli.engines import engine_maker
from streamlstm.config.keys import config_hash, identity_values, learning_values, with_learning
from streamlstm.config.model import Config
from streamlstm.errors import ConfigError
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.provenance import Settings

KEEP_ALL = replace(PACE, trim=False)
SMALL = streams.small_config(training={"k1": 2, "k2": 6, "batch_series": 3, "max_wait": 12})


def changed(**training: object) -> Config:
    return with_learning(SMALL, {f"training.{name.replace('__', '.')}": value for name, value in training.items()})


CHANGES = [
    changed(k2=11),
    changed(k1=3, k2=6, batch_series=2),
    changed(optimizer__lr=0.01, clip_norm=0.5, max_wait=5),
]


def process(config: Config, broker: Broker, state: Path, fate: Fate | None = None) -> Process:
    values = identity_values(config), learning_values(config)
    settings = Settings("n", config_hash(config), *values)
    life = Process(broker, state, fate, settings=settings, pace=KEEP_ALL, keep=9)
    life.world = replace(life.world, decode=decode_in_time, maker=engine_maker(config, "cpu"))
    return life


def filled(records: int) -> Broker:
    return Broker({"in": [[message(f"s{i % 3}", float(i * 7 % 31)) for i in range(records)]]})


def stopped(tmp_path: Path) -> tuple[Broker, Path]:
    """A process that stopped cleanly; more input has come since."""
    broker, state = filled(50), tmp_path / "stopped"
    process(SMALL, broker, state).run()
    broker.inputs["in"] = filled(110).inputs["in"]
    return broker, state


def copy(broker: Broker, state: Path, to: Path) -> tuple[Broker, Path]:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(state, to)
    log = Broker(broker.inputs, progress=list(broker.progress), published=list(broker.published), epoch=broker.epoch)
    log.next_progress = broker.next_progress
    return log, to


def published(broker: Broker) -> list[bytes]:
    return [m.value or b"" for m in broker.published]


@pytest.mark.parametrize("config", CHANGES)
def test_killed_after_the_change_it_resumes_as_if_it_had_not_been(tmp_path, config):
    broker, state = stopped(tmp_path)
    plain, where = copy(broker, state, tmp_path / "plain")
    digests = process(config, plain, where).run().state().digests()
    for at in (5, 14, 26, 40, 47, 63):
        log, where = copy(broker, state, tmp_path / "killed")
        with contextlib.suppress(Crash):
            process(config, log, where, Fate(at)).run()
        engine = process(config, log, where).run()

        assert engine.state().digests() == digests, at
        assert published(log) == published(plain)


@pytest.mark.parametrize("config", CHANGES)
def test_a_bad_generation_after_the_change_falls_back_across_it_to_the_same_bits(tmp_path, config):
    broker, state = stopped(tmp_path)
    before = open_store(state).steps()
    plain, where = copy(broker, state, tmp_path / "plain")
    digests = process(config, plain, where).run().state().digests()
    log, where = copy(broker, state, tmp_path / "bad")
    with contextlib.suppress(Crash):
        process(config, log, where, Fate(47)).run()
    # All that were written since the change, and the one it was made from.
    for step in open_store(where).steps():
        if step >= before[-1]:
            (where / f"{step:020d}" / "model.pt").write_bytes(b"")

    again = process(config, log, where)
    engine = again.run()

    assert again.ready is not None
    assert again.ready.generation.step == before[-2]
    assert engine.state().digests() == digests
    assert published(log) == published(plain)


def test_several_changes_are_replayed_one_after_the_other(tmp_path):
    broker, state = stopped(tmp_path)
    for i, config in enumerate(CHANGES):
        broker.inputs["in"] = filled(110 + 20 * i).inputs["in"]
        engine = process(config, broker, state).run()
    for step in open_store(state).steps()[1:]:
        (state / f"{step:020d}" / "model.pt").write_bytes(b"")

    again = process(CHANGES[-1], broker, state)

    assert again.run().state().digests() == engine.state().digests()
    assert again.ready is not None
    assert again.ready.generation.step == 0


def test_with_steps_to_replay_the_newest_values_go_on_and_others_are_refused(tmp_path):
    broker, state = stopped(tmp_path)
    with contextlib.suppress(Crash):
        process(CHANGES[0], broker, state, Fate(25)).run()

    with pytest.raises(
        ConfigError, match=r"training\.k2 \(was 11, is \d+\); but the steps .* as they were: set them back"
    ):
        process(SMALL, broker, state).run()
    process(CHANGES[0], broker, state).run()


def test_max_series_and_max_wait_are_lowered_together_and_older_steps_are_replayed_all_the_same(tmp_path):
    broker, state = stopped(tmp_path)
    before = open_store(state).steps()
    lower = streams.small_config(
        series={"max_series": 5}, training={"k1": 2, "k2": 6, "batch_series": 3, "max_wait": 5}
    )
    plain, where = copy(broker, state, tmp_path / "plain")
    engine = process(changed(max_wait=5), plain, where).run()

    log, where = copy(broker, state, tmp_path / "lowered")
    lowered = process(lower, log, where).run()
    for step in open_store(where).steps():
        if step >= before[-1]:
            (where / f"{step:020d}" / "model.pt").write_bytes(b"")
    again = process(lower, log, where)
    replayed = again.run()

    assert published(log) == published(plain)
    assert lowered.state().digests() == replayed.state().digests() == engine.state().digests()
    assert again.ready is not None
    assert again.ready.generation.step == before[-2]
