"""Recorded steps computed again from a checkpoint, and every digest compared."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import PACE, SETTINGS, Broker, Crash, Fate, Process, decode, digest_directory, fingerprint, message

from streamlstm.errors import CheckpointError, ConfigError, LogGap, ProgressError
from streamlstm.records.batch import Range
from streamlstm.recovery.branching import revert
from streamlstm.recovery.checkpoint import CheckpointStore, open_store
from streamlstm.recovery.progress import read_chain
from streamlstm.recovery.proof import Bench, Verdict, expected_differences, find_start, nothing_compared, prove
from streamlstm.recovery.provenance import Settings

RECORDS = 120
KEEP_ALL = replace(PACE, trim=False)


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    """What a run left that was killed again and again, and its checkpoints in ``state``."""
    made = Broker({"in": [[message(f"s{i % 3}", float(i * 7 % 31)) for i in range(RECORDS)]]})
    for killed in range(20):
        try:
            Process(made, tmp_path / "state", Fate(120), pace=KEEP_ALL, keep=9).run()
        except Crash:
            continue
        assert killed > 0
        return made
    raise AssertionError("it never comes to its end")


def steps(tmp_path: Path) -> list[int]:
    return open_store(tmp_path / "state").steps()


def proven(
    broker: Broker, tmp_path: Path, first: int = 0, last: int | None = None, settings: Settings = SETTINGS
) -> Verdict:
    process = Process(broker, tmp_path / "state", settings=settings)
    bench = Bench(process.store, process.source, decode, process.world.maker, settings, 1.0)
    chain = read_chain(broker.progress, "n")
    generation = find_start(process.store, chain, first)
    return prove(bench, chain, generation, chain.last_step if last is None else last)


def test_a_run_that_was_killed_is_proven_to_the_last_state(broker, tmp_path):
    verdict = proven(broker, tmp_path)
    last = read_chain(broker.progress, "n").last_step
    assert verdict.holds
    assert (verdict.start, verdict.last) == (0, last)
    assert verdict.steps == verdict.compared == last
    assert verdict.messages == verdict.records == RECORDS
    assert verdict.states == steps(tmp_path)[1:]


def test_it_writes_nothing_and_needs_no_lock(broker, tmp_path):
    before, chain, published = digest_directory(tmp_path / "state"), list(broker.progress), list(broker.published)
    running = open_store(tmp_path / "state").open()
    at_start = digest_directory(tmp_path / "state")
    proven(broker, tmp_path)
    assert digest_directory(tmp_path / "state") == at_start
    running.close()
    assert (before != "", broker.progress, broker.published) == (True, chain, published)


def test_another_value_in_the_input_is_found_at_its_step(broker, tmp_path):
    at = RECORDS // 2
    broker.inputs["in"][0][at] = message("s0", 99.0)
    verdict = proven(broker, tmp_path)
    assert verdict.first is not None
    assert verdict.first.what == "outputs"
    (cut,) = verdict.first.cut
    assert cut.start <= at < cut.end
    assert verdict.differing_steps > 1
    assert proven(broker, tmp_path, last=verdict.first.step - 1).holds


def test_a_stored_weight_that_nobody_learnt_is_found_though_no_hash_tells(broker, tmp_path):
    step = steps(tmp_path)[1]
    store = open_store(tmp_path / "state").open()
    loaded = store.load(step)
    loaded.state.weights["weight"] += 1e-9
    store.write(loaded.state, loaded.generation.provenance)
    store.close()

    verdict = proven(broker, tmp_path)

    assert verdict.first is not None
    assert (verdict.first.step, verdict.first.what) == (step, "weights")
    assert (verdict.differing_steps, verdict.differing_states) == (0, 1)


def test_a_damaged_state_on_the_way_is_said_and_the_chain_proven_all_the_same(broker, tmp_path):
    step = steps(tmp_path)[1]
    (tmp_path / "state" / f"{step:020d}" / "optim.pt").write_bytes(b"")
    verdict = proven(broker, tmp_path)
    assert verdict.holds
    assert [passed.step for passed in verdict.passed] == [step]
    assert step not in verdict.states


def test_between_two_checkpoints_it_starts_from_the_older_one(broker, tmp_path):
    one, two = steps(tmp_path)[1:3]
    verdict = proven(broker, tmp_path, first=two - 1, last=two)
    assert verdict.start == one
    assert verdict.states == [two]


def test_where_no_checkpoint_is_old_enough_it_says_which_there_are(broker, tmp_path):
    store = open_store(tmp_path / "state").open()
    store.put_aside(0)
    store.close()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* of step 1 or before it"):
        proven(broker, tmp_path, first=1)


def test_input_that_is_gone_is_said_and_nobody_is_told_to_begin_anew(broker, tmp_path):
    """What a start would do about it is no business of who only looks."""
    broker.beginning["in", 0] = 10
    with pytest.raises(
        LogGap, match=r"in-0: 0 to 9\), so they cannot be computed again; begin at a later step"
    ) as caught:
        proven(broker, tmp_path)
    assert "--fresh" not in str(caught.value)


def test_a_checkpoint_of_another_run_is_gone_past_like_a_bad_one(broker, tmp_path):
    old, foreign = steps(tmp_path)[1:3]
    store = open_store(tmp_path / "state").open()
    loaded = store.load(foreign)
    store.write(loaded.state, replace(loaded.generation.provenance, lineage="another"))
    store.close()

    assert proven(broker, tmp_path, first=foreign).start == old
    with pytest.raises(ProgressError, match="to run another"):
        find_start(only(tmp_path, foreign), read_chain(broker.progress, "n"), foreign)


def only(tmp_path: Path, step: int) -> CheckpointStore:
    """The store with nothing but this generation."""
    for other in (tmp_path / "state").glob("0*"):
        if int(other.name) != step:
            shutil.rmtree(other)
    return open_store(tmp_path / "state")


def test_a_chain_that_was_trimmed_beyond_the_checkpoint_is_refused(broker, tmp_path):
    broker.progress = broker.progress[-3:]
    with pytest.raises(ProgressError):
        proven(broker, tmp_path)


def test_a_configuration_that_was_changed_is_refused(broker, tmp_path):
    changed = replace(SETTINGS, identity={**SETTINGS.identity, "name": "m"})
    with pytest.raises(ConfigError, match=r'name \(was "n", is "m"\)'):
        proven(broker, tmp_path, settings=changed)


def test_what_was_learnt_after_going_back_is_proven_from_before_it(broker, tmp_path):
    step = steps(tmp_path)[1]
    at = open_store(tmp_path / "state").verify(step).provenance.positions[0].next_offset
    poison = Range("in", 0, at + 4, at + 9)
    process = Process(broker, tmp_path / "state")
    revert(process.store, process.publisher, process.world.progress, "n", step, [poison], process.world.new_id)
    process.store.close()
    Process(broker, tmp_path / "state", pace=KEEP_ALL, keep=9).run()

    verdict = proven(broker, tmp_path)

    assert verdict.holds
    assert verdict.messages == RECORDS
    assert verdict.records == RECORDS - 5
    assert verdict.states == steps(tmp_path)[1:]


def test_other_machines_and_processes_that_went_on_with_other_bits_are_told_of_first(tmp_path):
    broker = Broker({"in": [[message("a", float(i)) for i in range(RECORDS)]]})
    Process(broker, tmp_path / "state", pace=KEEP_ALL, keep=9, cpu="old").run()
    lost = open_store(tmp_path / "state").open()
    lost.put_aside(lost.steps()[-1])
    lost.close()
    Process(broker, tmp_path / "state", pace=KEEP_ALL, keep=9, cpu="new").run()
    broker.inputs["in"][0] += [message("a", float(i)) for i in range(30)]
    Process(broker, tmp_path / "state", pace=KEEP_ALL, keep=9, cpu="new").run()
    chain, store = read_chain(broker.progress, "n"), open_store(tmp_path / "state")
    generation = find_start(store, chain, 0)

    told = expected_differences(chain, generation, chain.last_step, fingerprint("new"))
    assert told[0] == "cpu was old and is new"
    assert "with other bits; what it did can be proven from there" in told[1]
    took_over = next(found for _, found in chain.incarnations if found.rebased)
    later = find_start(store, chain, took_over.checkpoint)
    assert expected_differences(chain, generation, took_over.checkpoint, fingerprint("old")) == []
    assert later.step == took_over.checkpoint > 0
    assert expected_differences(chain, later, chain.last_step, fingerprint("new")) == ["cpu was old and is new"]


def test_a_step_beyond_the_end_of_the_chain_is_refused_with_the_end(broker, tmp_path):
    last = read_chain(broker.progress, "n").last_step
    with pytest.raises(ProgressError, match=f"no step {last + 1} .*: the chain ends with step {last}"):
        proven(broker, tmp_path, first=last + 1)


def test_at_the_end_of_the_chain_it_says_that_nothing_was_compared(broker, tmp_path):
    chain = read_chain(broker.progress, "n")
    verdict = proven(broker, tmp_path, first=chain.last_step)
    assert nothing_compared(verdict, chain) == f"nothing was compared: the chain ends with step {chain.last_step}"


def test_up_to_the_step_of_the_checkpoint_nothing_is_compared(broker, tmp_path):
    step = steps(tmp_path)[1]
    verdict = proven(broker, tmp_path, first=step, last=step)
    told = nothing_compared(verdict, read_chain(broker.progress, "n"))
    assert told == f"nothing was compared: the checkpoint is of step {step} itself"


def test_what_was_compared_is_not_called_nothing(broker, tmp_path):
    assert nothing_compared(proven(broker, tmp_path), read_chain(broker.progress, "n")) == ""
