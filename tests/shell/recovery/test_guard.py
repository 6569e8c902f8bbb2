"""Weights that go bad, skipped updates, the way back to good ones: killed anywhere in it, the bits are the same."""

import contextlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import streams
from fakes import PACE, Broker, Crash, Fate, Process, decode_in_time, message

from streamlstm.cli.engines import engine_maker
from streamlstm.config.keys import config_hash, identity_values, learning_values
from streamlstm.config.model import Config
from streamlstm.learning.tbptt import KEEP_EVERY
from streamlstm.recovery.provenance import Settings

WELL = 90
"""Records of a first life, in which weights are kept for the guard; every one but the first few brings an update."""

ALL = 112
PATIENCE = 3


def learning_at(rate: float) -> Config:
    config = streams.small_config(
        model={"hidden_size": 3, "horizons": 1, "season": "none", "loss": "mse"},
        training={"k1": 1, "k2": 4, "batch_series": 1, "max_wait": 4, "guard": {"patience": PATIENCE}},
    )
    optimizer = config.training.optimizer.model_copy(update={"lr": rate})
    return config.model_copy(update={"training": config.training.model_copy(update={"optimizer": optimizer})})


GOOD, BAD = learning_at(1e-2), learning_at(1e30)
"""The rate may be changed where a process stopped cleanly; after one such update no loss is finite any more."""


def life(config: Config, broker: Broker, state: Path, fate: Fate | None = None) -> Process:
    """Small steps, and a checkpoint every few: between the skipped updates of one row too."""
    settings = Settings("n", config_hash(config), identity_values(config), learning_values(config))
    pace = replace(PACE, trim=False, checkpoint_every_records=3)
    process = Process(broker, state, fate, settings=settings, pace=pace, keep=3, sizes=(1, 2))
    process.world = replace(process.world, decode=decode_in_time, maker=engine_maker(config, "cpu"))
    return process


def filled(records: int) -> Broker:
    return Broker({"in": [[message("s", float(i * 7 % 31)) for i in range(records)]]})


def copied(broker: Broker, state: Path, to: Path) -> tuple[Broker, Path]:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(state, to)
    log = replace(broker, progress=list(broker.progress), published=list(broker.published), dead_letters=[])
    return log, to


def skipped_in_row(state: Path) -> int:
    """What the newest checkpoint says."""
    newest = max(path for path in state.iterdir() if len(path.name) == 20)
    return json.loads((newest / "meta.json").read_text())["state"]["learner"]["skipped_in_row"]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_at_any_call_while_the_guard_skips_and_goes_back_it_ends_with_the_same_bits(tmp_path, every):
    broker, state = filled(WELL), tmp_path / "state"
    life(GOOD, broker, state).run()
    broker.inputs = filled(ALL).inputs

    reference, where = copied(broker, state, tmp_path / "reference")
    never = life(BAD, reference, where)
    expected = never.run().state()
    updates = [update for one in never.watching.commits for report in one.reports for update in report.updates]
    assert updates[0].number > KEEP_EVERY
    assert updates[-1].number < 2 * KEEP_EVERY
    assert sum(update.rolled_back for update in updates) > 3

    met: set[int] = set()
    for at in itertools.count(0, every):
        log, where = copied(broker, state, tmp_path / "killed")
        finished = True
        for fate in (Fate(at), Fate(at % 40)):
            with contextlib.suppress(Crash):
                life(BAD, log, where, fate).run()
            finished &= not fate.dead
            met.add(skipped_in_row(where))
        engine = life(BAD, log, where).run()
        assert engine.state().digests() == expected.digests(), at
        assert [m.value for m in log.published] == [m.value for m in reference.published], at
        if finished:
            break
    assert met == set(range(PATIENCE))
