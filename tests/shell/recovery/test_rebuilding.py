"""``run --rebuild-from-log``: where no checkpoint can be used, everything once more from the first record."""

import contextlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import (
    PACE,
    SETTINGS,
    Broker,
    Crash,
    Fate,
    Process,
    digest_directory,
    make_settings,
    message,
    revert_without,
)

from streamlstm.errors import CheckpointError, ConfigError, LogGap, ProgressError, TopicChanged
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.progress import Incarnation, decode_record

KEEP_ALL = replace(PACE, trim=False)


def filled(records: int = 60) -> Broker:
    return Broker({"in": [[message(f"s{i % 3}", float(i * 7 % 31)) for i in range(records)]]})


def values(broker: Broker) -> list[bytes]:
    return [m.value or b"" for m in broker.published]


def spoil(state: Path, name: str = "optim.pt") -> None:
    for path in state.glob(f"0*/{name}"):
        path.write_bytes(b"")


def ran(tmp_path: Path, **options) -> tuple[Broker, Path, dict[str, str]]:
    broker, state = filled(), tmp_path / "state"
    engine = Process(broker, state, pace=KEEP_ALL, **options).run()
    return broker, state, engine.state().digests()


@pytest.mark.parametrize("loss", ["all bad", "all gone"])
def test_everything_is_computed_again_and_nothing_is_published_twice(tmp_path, loss):
    broker, state, digests = ran(tmp_path)
    published = values(broker)
    if loss == "all bad":
        spoil(state)
    else:
        shutil.rmtree(state)
    with pytest.raises((CheckpointError, ProgressError)):
        Process(broker, state, pace=KEEP_ALL).run()

    process = Process(broker, state, pace=KEEP_ALL, rebuild=True)
    engine = process.run()

    assert engine.state().digests() == digests
    assert values(broker) == published
    assert process.ready is not None
    assert process.ready.replayed_steps == process.ready.engine.step_number > 0
    assert process.ready.revision == 0
    assert "everything is computed again from the log" in process.journal.events("warning")


def test_what_was_bad_is_put_aside_and_later_starts_need_no_option(tmp_path):
    broker, state, _ = ran(tmp_path)
    spoil(state)
    process = Process(broker, state, pace=KEEP_ALL, rebuild=True)
    process.begin()
    process.store.close()
    assert process.store.steps() == [0]
    assert process.store.bad()
    broker.inputs["in"][0] += [message("s1", float(i)) for i in range(20)]

    later = Process(broker, state, pace=KEEP_ALL)
    engine = later.run()

    assert engine.state().digests() == Process(Broker(broker.inputs), tmp_path / "plain").run().state().digests()
    assert len(broker.published) == 80


def test_the_chain_says_which_generation_0_took_the_place_of_the_first(tmp_path):
    broker, state, _ = ran(tmp_path)
    spoil(state)
    process = Process(broker, state, pace=KEEP_ALL, rebuild=True)
    process.begin()
    process.store.close()

    incarnation = decode_record(broker.progress[-1])
    assert isinstance(incarnation, Incarnation)
    assert incarnation.rebuilt == process.store.verify(0).digest


def test_with_a_checkpoint_that_can_be_used_it_does_nothing(tmp_path):
    broker, state, digests = ran(tmp_path)

    process = Process(broker, state, pace=KEEP_ALL, rebuild=True)

    assert process.run().state().digests() == digests
    assert process.ready is not None
    assert process.ready.replayed_steps == 0


@pytest.mark.parametrize("loss", ["all bad", "all gone"])
def test_a_trimmed_chain_is_refused_and_the_way_out_is_named(tmp_path, loss):
    broker, state = filled(200), tmp_path / "state"
    Process(broker, state, keep=2).run()
    if loss == "all bad":
        spoil(state)
    else:
        shutil.rmtree(state)

    with pytest.raises(ProgressError, match=r"its front was trimmed .* `run --fresh`") as refused:
        Process(broker, state, rebuild=True).run()
    assert str(refused.value).count("--rebuild-from-log") == str(refused.value).count("--fresh") == 1


@pytest.mark.parametrize("trim", [False, True])
def test_it_is_offered_only_where_the_chain_reaches_back_to_its_first_record(tmp_path, trim):
    broker, state = filled(200), tmp_path / "state"
    Process(broker, state, pace=replace(PACE, trim=trim), keep=2).run()
    shutil.rmtree(state)

    with pytest.raises(ProgressError, match=r"has no checkpoint: .* `run --fresh`") as refused:
        Process(broker, state).run()
    assert ("--rebuild-from-log" in str(refused.value)) is not trim


def all_bad_and_the_chains_end_lost(tmp_path: Path, name: str) -> tuple[Broker, Path]:
    broker, state, _ = ran(tmp_path, keep=9)
    kept = list(broker.progress)
    broker.inputs["in"][0] += [message(f"s{i % 3}", float(i)) for i in range(60)]
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    assert len(kept) < len(broker.progress)
    broker.progress = kept
    spoil(state, name)
    return broker, state


@pytest.mark.parametrize("name", ["optim.pt", "MANIFEST.json"])
def test_a_chain_that_lost_its_end_is_not_rebuilt_and_begins_anew_under_another_revision(tmp_path, name):
    """What it published since is out: computed from here on, it would be published again under the same revision."""
    broker, state = all_bad_and_the_chains_end_lost(tmp_path, name)
    records, files = list(broker.progress), digest_directory(state)
    published = values(broker)

    with pytest.raises(ProgressError, match=r"lost its end, .* under the same revision; .*`run --fresh`"):
        Process(broker, state, pace=KEEP_ALL, rebuild=True).run()
    assert broker.progress == records
    assert digest_directory(state) == files
    fresh = Process(broker, state, pace=KEEP_ALL, fresh=True)
    fresh.run()

    assert fresh.ready is not None
    assert fresh.ready.revision == 1
    assert values(broker) == published * 2, "each once under either revision"
    assert Process(broker, state, pace=KEEP_ALL).begin().revision == 1


def test_a_new_beginning_that_was_cut_short_hides_no_lost_end(tmp_path):
    """Killed anywhere in ``--fresh``, a start that is to rebuild publishes nothing twice under one revision."""
    refused = 0
    for at in itertools.count():
        where = tmp_path / str(at)
        where.mkdir()
        broker, state = all_bad_and_the_chains_end_lost(where, "optim.pt")
        published = len(broker.published)
        killed = Process(broker, state, Fate(at), pace=KEEP_ALL, fresh=True)
        with contextlib.suppress(Crash):
            killed.begin()
        killed.store.close()

        process = Process(broker, state, pace=KEEP_ALL, rebuild=True)
        try:
            process.run()
        except ProgressError:
            refused += 1
            assert len(broker.published) == published
        else:
            assert process.ready is not None
            assert process.ready.revision == 1, at
        shutil.rmtree(where)
        if not killed.fate.dead:
            break
    assert 10 < refused < at


def test_a_new_beginning_that_was_cut_short_before_it_counted_prevents_no_rebuilding(tmp_path):
    rebuilt = 0
    for at in itertools.count(step=2):
        where = tmp_path / str(at)
        where.mkdir()
        broker, state, digests = ran(where)
        spoil(state)
        published = values(broker)
        killed = Process(broker, state, Fate(at), pace=KEEP_ALL, fresh=True)
        with contextlib.suppress(Crash):
            killed.begin()
        killed.store.close()

        process = Process(broker, state, pace=KEEP_ALL, rebuild=True)
        engine = process.run()

        assert process.ready is not None
        if process.ready.revision == 0:
            rebuilt += 1
            assert values(broker) == published
            assert engine.state().digests() == digests
        shutil.rmtree(where)
        if not killed.fate.dead:
            break
    assert 5 < rebuilt < at / 2


def test_a_branch_that_the_chain_lost_is_known_from_a_damaged_checkpoint(tmp_path):
    """Its steps are no later than the chain's; but what was excluded would be learnt, and nobody told."""
    broker, state, _ = ran(tmp_path, keep=9)
    kept = list(broker.progress)
    poison = revert_without(broker, state, 8)
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    broker.progress = kept
    spoil(state)

    with pytest.raises(ProgressError, match="lost its end"):
        Process(broker, state, pace=KEEP_ALL, rebuild=True).run()
    ready = Process(broker, state, pace=KEEP_ALL, fresh=True).begin()
    assert ready.revision == 2
    assert ready.excluded == (poison,)


@pytest.mark.parametrize("way", ["rebuild", "fresh"])
def test_with_an_empty_chain_and_damaged_checkpoints_nobody_knows_what_was_published(tmp_path, way):
    broker, state, _ = ran(tmp_path)
    spoil(state, "MANIFEST.json")
    files = digest_directory(state)
    broker.progress = []

    with pytest.raises(ProgressError, match=r"the progress log is empty, but .* under another name"):
        Process(broker, state, pace=KEEP_ALL, **{way: True}).run()
    assert digest_directory(state) == files
    assert not broker.progress


@pytest.mark.parametrize("on_gap", ["fail", "skip"])
def test_input_that_is_gone_is_refused_with_both_offsets(tmp_path, on_gap):
    broker, state, _ = ran(tmp_path)
    shutil.rmtree(state)
    broker.beginning["in", 0] = 5

    with pytest.raises(LogGap, match="in-0: offset 0 is needed, but retention has deleted all before 5"):
        Process(broker, state, rebuild=True, on_gap=on_gap).run()
    assert not open_store(state).steps()


def test_a_topic_made_anew_is_refused(tmp_path):
    broker, state, _ = ran(tmp_path)
    shutil.rmtree(state)
    broker.topic_ids["in"] = "id-2"

    with pytest.raises(TopicChanged):
        Process(broker, state, rebuild=True).run()


def test_other_identity_keys_are_refused_before_anything_is_written(tmp_path):
    broker, state, _ = ran(tmp_path)
    shutil.rmtree(state)
    records = list(broker.progress)
    changed = make_settings({**SETTINGS.identity, "model.hidden_size": 3}, dict(SETTINGS.learning))

    with pytest.raises(ConfigError, match="not those that the chain began with"):
        Process(broker, state, rebuild=True, settings=changed).run()
    assert broker.progress == records
    assert not open_store(state).steps()


def test_each_step_is_computed_under_the_learning_values_of_its_time(tmp_path):
    broker, state, _ = ran(tmp_path)
    later = make_settings(dict(SETTINGS.identity), {"gain": 0.1})
    broker.inputs["in"][0] += [message("s1", float(i)) for i in range(30)]
    digests = Process(broker, state, settings=later, pace=KEEP_ALL).run().state().digests()
    spoil(state)

    engine = Process(broker, state, settings=later, pace=KEEP_ALL, rebuild=True).run()

    assert engine.state().digests() == digests
    assert engine.gain == 0.1


def test_what_a_branch_excluded_stays_out_of_it(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    revert_without(broker, state, 8)
    digests = Process(broker, state, pace=KEEP_ALL).run().state().digests()
    shutil.rmtree(state)

    process = Process(broker, state, pace=KEEP_ALL, rebuild=True)

    assert process.run().state().digests() == digests
    assert process.ready is not None
    assert process.ready.revision == 1


def test_after_a_new_beginning_it_is_that_one_which_is_rebuilt(tmp_path):
    broker, state, _ = ran(tmp_path)
    changed = make_settings({**SETTINGS.identity, "model.hidden_size": 3}, dict(SETTINGS.learning))
    digests = Process(broker, state, settings=changed, pace=KEEP_ALL, fresh=True).run().state().digests()
    shutil.rmtree(state)

    engine = Process(broker, state, settings=changed, pace=KEEP_ALL, rebuild=True).run()

    assert engine.state().digests() == digests


@pytest.mark.parametrize("loss", ["all bad", "all gone"])
def test_killed_at_any_call_and_started_again_it_is_rebuilt_once(tmp_path, loss):
    """Nested: the start that rebuilds is killed, the next one too, and the third goes through."""
    kept, before = tmp_path / "kept", filled(30)
    digests = Process(before, kept, pace=KEEP_ALL).run().state().digests()
    published = values(before)
    if loss == "all bad":
        spoil(kept)
    for at in itertools.count(step=2):
        state = tmp_path / "killed"
        shutil.rmtree(state, ignore_errors=True)
        if loss == "all bad":
            shutil.copytree(kept, state)
        broker = Broker(before.inputs, progress=list(before.progress), epoch=before.epoch)
        broker.next_progress = before.next_progress
        fates = (Fate(at), Fate(50 - at if at < 50 else at // 3))
        for fate in fates:
            with contextlib.suppress(Crash):
                Process(broker, state, fate, pace=KEEP_ALL, rebuild=True).run()
        process = Process(broker, state, pace=KEEP_ALL, rebuild=True)
        engine = process.run()

        assert engine.state().digests() == digests, at
        assert not broker.published, "all of it had been published before"
        if not fates[0].dead:
            break
    assert published
    assert at > 40
