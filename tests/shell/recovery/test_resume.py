import contextlib
import errno
import itertools
import os
import random
import shutil
from collections.abc import Iterable
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
    TinyEncoder,
    digest_directory,
    make_settings,
    message,
)

from streamlstm.errors import (
    CheckpointError,
    CheckpointNotWritten,
    ConfigError,
    LogGap,
    ProgressError,
    StreamlstmError,
    Superseded,
    Temporary,
    TopicChanged,
)
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.fingerprint import doubt_rows
from streamlstm.recovery.progress import Incarnation, Steps, decode_record, read_chain
from streamlstm.transport.interfaces import Fenced, ProgressEntry


def filled(records: int = 60, partitions: int = 2, first: int = 0) -> Broker:
    """An input with a few bad messages and offsets that hold nothing."""
    logs: list[list[bytes | None]] = [[] for _ in range(partitions)]
    fill(logs, range(first, first + records))
    return Broker({"in": logs})


def fill(logs: list[list[bytes | None]], numbers: Iterable[int]) -> None:
    for i in numbers:
        log = logs[i % len(logs)]
        if i % 17 == 5:
            log.append(None)
        log.append(b"broken" if i % 13 == 4 else message(f"s{i % 3}", float(i * 7 % 31)))


def values(broker: Broker) -> list[bytes]:
    return [m.value or b"" for m in broker.published]


def without_a_crash(tmp_path: Path, sizes=(7,), **filling) -> tuple[Broker, dict[str, str]]:
    broker = filled(**filling)
    engine = Process(broker, tmp_path / "reference", sizes=sizes).run()
    return broker, engine.state().digests()


def recorded_cuts_fed_to_a_fresh_engine(broker: Broker, tmp_path: Path) -> tuple[list[bytes], dict[str, str]]:
    """The oracle: the cuts of the progress topic, all of which must be retained, without interruption."""
    process = Process(broker, tmp_path / "oracle")
    engine, forecasts = process.world.maker.create(SETTINGS.learning), []
    process.source.seek(process.source.resolve_start("earliest"))
    for step in read_chain(broker.progress, "n").after(0):
        report = engine.step(process.world.decode(process.source.read(step.cut, 1.0)))
        assert report.digest().hex() == step.digest
        forecasts += [m.value for m in TinyEncoder().encode_forecasts(report)]
    return forecasts, engine.state().digests()


KEEP_ALL = replace(PACE, trim=False)


def test_a_first_run_makes_generation_0_then_its_incarnation_then_steps(tmp_path):
    broker = filled(records=10)
    process = Process(broker, tmp_path / "state", pace=KEEP_ALL)
    process.run()

    first, *rest = [decode_record(entry) for entry in broker.progress]
    generation = process.store.verify(0)
    assert isinstance(first, Incarnation)
    assert first.origin is not None
    assert first.origin.generation == generation.digest
    assert first.origin.positions == (("in", 0, 0), ("in", 1, 0))
    assert generation.provenance.progress is None
    assert all(isinstance(record, Steps) for record in rest)
    assert process.watching.resumed[0].source == "fresh"


def test_stopping_and_starting_again_changes_nothing(tmp_path):
    expected, digests = without_a_crash(tmp_path, records=120, partitions=1)
    broker = filled(records=60, partitions=1)
    Process(broker, tmp_path / "state").run()
    fill(broker.inputs["in"], range(60, 120))

    again = Process(broker, tmp_path / "state")
    engine = again.run()

    assert values(broker) == values(expected)
    assert engine.state().digests() == digests
    assert again.ready is not None
    assert again.ready.source == "checkpoint"
    assert again.ready.replayed_steps == 0


def check_against_oracle(broker: Broker, engine, tmp_path: Path) -> None:
    forecasts, digests = recorded_cuts_fed_to_a_fresh_engine(broker, tmp_path)
    assert values(broker) == forecasts
    assert engine.state().digests() == digests
    coordinates = [value.split(b"=")[0] for value in values(broker)]
    assert len(set(coordinates)) == len(coordinates)


def test_killed_at_any_call_and_started_again_is_as_if_never_stopped(tmp_path):
    reference, digests = without_a_crash(tmp_path, partitions=1, records=40)
    for at in itertools.count():
        broker, state = filled(partitions=1, records=40), tmp_path / "state"
        process = Process(broker, state, Fate(at), pace=KEEP_ALL)
        try:
            process.run()
            finished = True
        except Crash:
            finished = False
        engine = Process(broker, state, pace=KEEP_ALL).run()

        # One partition: the log alone decides, so it is what a process that was never killed publishes.
        assert values(broker) == values(reference), at
        assert engine.state().digests() == digests, at
        check_against_oracle(broker, engine, tmp_path)
        shutil.rmtree(state)
        if finished:
            break
    assert at > 100


def test_killed_at_any_call_with_several_partitions_equals_the_recorded_cuts(tmp_path):
    rng = random.Random(17)
    expected = {b"in-%d@%d" % (p, at) for p, log in enumerate(filled(partitions=3).inputs["in"])
                for at, value in enumerate(log) if value and value != b"broken"}  # fmt: skip
    for at in range(0, 260, 7):
        broker, state = filled(partitions=3), tmp_path / "state"
        with contextlib.suppress(Crash):
            Process(broker, state, Fate(at), pace=KEEP_ALL, sizes=(5, 9, 1)).run()
        sizes = tuple(rng.randrange(1, 12) for _ in range(5))
        engine = Process(broker, state, pace=KEEP_ALL, sizes=sizes).run()

        check_against_oracle(broker, engine, tmp_path)
        assert {value.split(b"=")[0] for value in values(broker)} == expected
        shutil.rmtree(state)


def test_kills_during_recovery_are_no_different(tmp_path):
    reference, digests = without_a_crash(tmp_path, partitions=1)
    rng = random.Random(17)
    kills = 0
    for _ in range(60):
        broker, state = filled(partitions=1), tmp_path / "state"
        for _ in range(rng.randrange(2, 5)):
            try:
                Process(broker, state, Fate(rng.randrange(70)), pace=KEEP_ALL).run()
            except Crash:
                kills += 1
        engine = Process(broker, state, pace=KEEP_ALL).run()

        assert values(broker) == values(reference)
        assert engine.state().digests() == digests
        shutil.rmtree(state)
    assert kills > 100


def test_kills_with_a_trimmed_chain_are_no_different(tmp_path):
    reference, digests = without_a_crash(tmp_path, partitions=1, records=200)
    trimmed = 0
    for at in range(40, 700, 29):
        broker, state = filled(partitions=1, records=200), tmp_path / "state"
        with contextlib.suppress(Crash):
            Process(broker, state, Fate(at), keep=2).run()
        engine = Process(broker, state, keep=2).run()

        assert values(broker) == values(reference)
        assert engine.state().digests() == digests
        trimmed += broker.progress[0].offset > 0
        shutil.rmtree(state)
    assert trimmed > 5


def crash_after(broker: Broker, state: Path, commits: int, **options) -> Process:
    """A process that dies right after its so many-th transaction, the incarnation's included."""
    process = Process(broker, state, **options)
    commit, left = process.publisher.commit, [commits]

    def and_die(outputs):
        offset = commit(outputs)
        left[0] -= 1
        if left[0] == 0:
            process.fate.dead = True
            raise Crash
        return offset

    process.publisher.commit = and_die
    with pytest.raises(Crash):
        process.run()
    return process


def test_committed_steps_after_the_checkpoint_are_replayed_and_not_published_again(tmp_path):
    broker = filled(records=40)
    crash_after(broker, tmp_path / "state", 3, pace=replace(KEEP_ALL, checkpoint_every_records=1000))
    published = values(broker)

    process = Process(broker, tmp_path / "state", pace=KEEP_ALL)
    ready = process.begin()

    assert ready.replayed_steps == ready.engine.step_number > 0
    assert values(broker) == published
    assert ready.replayed_records > 0
    process.store.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_bad_newest_generation_costs_a_longer_replay_and_is_said(tmp_path, damage):
    reference, digests = without_a_crash(tmp_path, partitions=1)
    broker, state = filled(partitions=1), tmp_path / "state"
    crash_after(broker, state, 7, pace=KEEP_ALL)
    newest = max(open_store(state).steps())
    assert newest > 0
    target = state / f"{newest:020d}" / "model.pt"
    data = target.read_bytes()
    if damage == "flip":
        target.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
    elif damage == "truncate":
        target.write_bytes(data[:100])
    else:
        target.unlink()

    process = Process(broker, state, pace=KEEP_ALL)
    engine = process.run()

    assert process.ready is not None
    assert process.ready.source == "fallback"
    assert process.ready.refused[0].step == newest
    assert "model.pt" in process.ready.refused[0].reason
    assert "a checkpoint is bad and was put aside; an older one is used" in process.journal.events("error")
    assert (state / f"{newest:020d}.bad-1").is_dir()
    assert values(broker) == values(reference)
    assert engine.state().digests() == digests


def test_all_generations_bad_is_refused_and_touches_nothing(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL).run()
    for path in state.glob("0*/optim.pt"):
        path.write_bytes(b"")
    before = digest_directory(state)

    for _ in range(2):
        process = Process(broker, state, pace=KEEP_ALL)
        with pytest.raises(
            CheckpointError, match=r"optim\.pt has 0 bytes.*; bring a copy back, .*`run --fresh`"
        ) as caught:
            process.run()
        assert caught.value.exit_code == 65
    assert digest_directory(state) == before
    # Nobody was fenced either: a process on a healthy disk goes on.
    assert process.publisher.epoch == -1


def test_progress_without_a_checkpoint_is_refused(tmp_path):
    broker = filled()
    Process(broker, tmp_path / "state", pace=KEEP_ALL).run()

    with pytest.raises(ProgressError, match=r"holds \d+ steps of 'n', but .* has no checkpoint") as caught:
        Process(broker, tmp_path / "other", pace=KEEP_ALL).run()
    assert caught.value.exit_code == 65


def test_a_checkpoint_without_its_progress_is_refused_and_kept(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()
    broker.progress.clear()
    before = open_store(state).steps()

    with pytest.raises(ProgressError, match="the progress log is empty"):
        Process(broker, state).run()
    assert open_store(state).steps() == before


def test_a_progress_topic_that_lost_the_generations_record_is_refused(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 4, pace=KEEP_ALL)
    store = open_store(state)
    link = store.verify(max(store.steps())).provenance.progress
    assert link is not None
    broker.progress = [entry for entry in broker.progress if entry.offset > link.offset]

    with pytest.raises(ProgressError, match=r"what lay between is gone.*`checkpoint restore NAME`.*`run --fresh`"):
        Process(broker, state).run()


def test_a_generation_beyond_the_chain_is_put_aside(tmp_path):
    reference, digests = without_a_crash(tmp_path, partitions=1)
    broker, state = filled(partitions=1), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL).run()
    # The log lost its newest records, as after an unclean election; what they published is gone too.
    steps = open_store(state).steps()
    kept = [e for e in broker.progress if (r := decode_record(e)) and getattr(r, "last", 0) <= steps[-2]]
    lost_steps = {s.number for s in read_chain(broker.progress, "n").after(steps[-2])}
    lost = {(r.partition, at) for s in read_chain(broker.progress, "n").after(steps[-2]) for r in s.cut
            for at in range(r.start, r.end)}  # fmt: skip
    broker.progress = kept
    broker.published = [
        m for m in broker.published if (0, int((m.value or b"").split(b"@")[1].split(b"=")[0])) not in lost
    ]
    assert lost_steps

    process = Process(broker, state, pace=KEEP_ALL)
    engine = process.run()

    assert process.ready is not None
    assert [r.step for r in process.ready.refused] == [steps[-1]]
    assert "not in the progress chain" in process.ready.refused[0].reason
    assert values(broker) == values(reference)
    assert engine.state().digests() == digests


def chain_without_its_end(tmp_path: Path, keep: int = 99) -> tuple[Broker, Path, list[int]]:
    """The progress log lost its newest records; what they published is there all the same, and the generations are."""
    broker, state = filled(partitions=1, records=60), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL, keep=keep).run()
    kept = list(broker.progress)
    fill(broker.inputs["in"], range(60, 120))
    Process(broker, state, pace=KEEP_ALL, keep=keep).run()
    steps = open_store(state).steps()
    assert read_chain(kept, "n").last_step < steps[-1]
    broker.progress = kept
    return broker, state, steps


def test_a_chain_that_lost_its_end_goes_on_under_another_revision(tmp_path):
    reference, digests = without_a_crash(tmp_path, partitions=1, records=120)
    broker, state, steps = chain_without_its_end(tmp_path)
    published = len(broker.published)
    last = read_chain(broker.progress, "n").last_step

    process = Process(broker, state, pace=KEEP_ALL)
    engine = process.run()

    assert process.ready is not None
    assert process.ready.revision == 1
    assert process.ready.generation.step <= last
    assert [r.step for r in process.ready.refused] == [step for step in reversed(steps) if step > last]
    assert any("has lost its end" in event for event in process.journal.events("error"))
    # What was published after the generation that counts is published again: as it was, and as another revision.
    again = values(broker)[published:]
    assert again == values(reference)[-len(again) :]
    assert engine.state().digests() == digests
    assert Process(broker, state, pace=KEEP_ALL).begin().revision == 1


def test_a_damaged_checkpoint_shows_a_lost_end_too(tmp_path):
    broker, state, steps = chain_without_its_end(tmp_path)
    last = read_chain(broker.progress, "n").last_step
    for step in steps:
        if step > last:
            (state / f"{step:020d}" / "MANIFEST.json").write_bytes(b"")

    process = Process(broker, state, pace=KEEP_ALL)
    process.run()

    assert process.ready is not None
    assert process.ready.revision == 1
    assert Process(broker, state, pace=KEEP_ALL).begin().revision == 1


def test_a_start_that_finds_the_chains_end_lost_may_be_killed_anywhere(tmp_path):
    for at in itertools.count():
        where = tmp_path / str(at)
        where.mkdir()
        broker, state, steps = chain_without_its_end(where)
        process = Process(broker, state, Fate(at), pace=KEEP_ALL)
        try:
            process.begin()
            finished = True
        except Crash:
            finished = False
        process.store.close()
        if not finished:
            process = Process(broker, state, pace=KEEP_ALL)
            process.begin()
            process.store.close()
        assert process.ready is not None
        assert process.ready.revision == 1, at
        assert not set(process.store.steps()) & {step for step in steps if step > process.ready.generation.step}
        shutil.rmtree(where)
        if finished:
            break
    assert at > 10


def test_a_lost_end_without_a_checkpoint_before_it_is_no_case_for_a_rebuild(tmp_path):
    broker, state, _ = chain_without_its_end(tmp_path, keep=3)
    with pytest.raises(CheckpointError, match="not in the progress chain"):
        Process(broker, state, pace=KEEP_ALL).run()
    with pytest.raises(ProgressError, match="published again under the same revision"):
        Process(broker, state, pace=KEEP_ALL, rebuild=True).run()

    process = Process(broker, state, pace=KEEP_ALL, fresh=True)
    process.run()

    assert process.ready is not None
    assert process.ready.revision == 1
    assert process.ready.generation.step == 0


def test_a_torn_chain_is_refused(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 4, pace=replace(KEEP_ALL, checkpoint_every_records=1000))
    del broker.progress[2]

    with pytest.raises(ProgressError, match="forked or torn"):
        Process(broker, state).run()


def test_another_hosts_start_is_not_mixed_with_ours(tmp_path):
    broker = filled()
    ours = Process(broker, tmp_path / "ours", Fate())
    ours.begin()
    ours.store.close()
    theirs = filled()
    Process(theirs, tmp_path / "theirs").begin()
    broker.progress = theirs.progress

    with pytest.raises(ProgressError, match="another host started this deployment first"):
        Process(broker, tmp_path / "ours").begin()


def commit_nothing(process: Process) -> None:
    """The process dies when it wants to publish."""

    def die(outputs):
        process.fate.dead = True
        raise Crash

    process.publisher.commit = die


def test_a_generation_0_that_was_overtaken_is_not_used(tmp_path):
    broker = filled()
    ours = Process(broker, tmp_path / "ours", settings=changed_settings(source__start="latest"), start="latest")
    ours.begin()
    ours.store.close()
    # Brought to another host, changed there, and started there before the first step.
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    Process(broker, tmp_path / "theirs").begin()

    with pytest.raises(ProgressError, match="began with another generation 0"):
        Process(broker, tmp_path / "ours").begin()


def test_generation_0_is_kept_while_nothing_changed(tmp_path):
    broker = filled()
    digests = set()
    for _ in range(3):
        process = Process(broker, tmp_path / "state")
        digests.add(process.begin().generation.digest)
        process.store.close()

    assert len(digests) == 1


def test_latest_is_resolved_once(tmp_path):
    broker, state = filled(records=10), tmp_path / "state"
    process = Process(broker, state, start="latest")
    commit_nothing(process)
    with pytest.raises(Crash):
        process.run()
    assert process.store.steps() == [0]
    assert broker.progress == []
    fill(broker.inputs["in"], range(10, 20))

    Process(broker, state, start="latest", pace=KEEP_ALL).run()

    offsets = {int(value.split(b"@")[1].split(b"=")[0]) for value in values(broker)}
    assert offsets == set(range(5, 11)), "those after the first start, though the second came later"


def changed_settings(**keys):
    identity = {**SETTINGS.identity, **{k.replace("__", "."): v for k, v in keys.items() if k != "gain"}}
    learning = {"gain": keys.get("gain", 0.5)}
    return make_settings(identity, learning)


def test_a_changed_start_before_the_first_step_makes_generation_0_anew(tmp_path):
    broker, state = filled(records=10), tmp_path / "state"
    first = Process(broker, state, start="latest", settings=changed_settings(source__start="latest"))
    first.begin()
    first.store.close()

    process = Process(broker, state, pace=KEEP_ALL)
    process.run()

    assert len(values(broker)) + len(broker.dead_letters) == 10
    assert process.store.verify(0).provenance.settings.identity["source.start"] == "earliest"


def test_a_change_that_is_not_about_the_start_does_not_move_it(tmp_path):
    broker, state = filled(records=10), tmp_path / "state"
    latest = changed_settings(source__start="latest")
    first = Process(broker, state, start="latest", settings=latest)
    positions = first.begin().positions
    first.store.close()
    fill(broker.inputs["in"], range(10, 20))

    again = Process(broker, state, start="latest", settings=replace(latest, learning={"gain": 0.1}))

    assert again.begin().positions == positions
    assert again.store.verify(0).provenance.settings.learning == {"gain": 0.1}
    again.store.close()


def test_a_kill_while_generation_0_is_made_anew_is_no_different(tmp_path):
    for at in itertools.count():
        broker, state = filled(records=10), tmp_path / "state"
        first = Process(broker, state, start="latest", settings=changed_settings(source__start="latest"))
        first.begin()
        first.store.close()
        process = Process(broker, state, Fate(at), pace=KEEP_ALL)
        try:
            process.run()
            finished = True
        except Crash:
            finished = False
        Process(broker, state, pace=KEEP_ALL).run()

        assert len(values(broker)) + len(broker.dead_letters) == 10
        shutil.rmtree(state)
        if finished:
            break


def test_an_identity_key_changed_later_is_refused_by_name(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()

    process = Process(broker, state, settings=changed_settings(model__hidden_size=3))
    with pytest.raises(ConfigError, match=r"model\.hidden_size \(was null, is 3\)") as caught:
        process.run()
    assert caught.value.exit_code == 78
    assert process.publisher.epoch == -1, "nobody is fenced by a mistake in the configuration"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_chain_kept_elsewhere_cannot_be_begun_anew_in(tmp_path, fresh):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()

    process = Process(broker, state, settings=changed_settings(sink__delivery="idempotent"), fresh=fresh)
    with pytest.raises(ConfigError, match=r"sink\.delivery .*: set them back, or give") as caught:
        process.run()
    assert "--fresh" not in str(caught.value)
    assert process.publisher.epoch == -1


def test_the_state_of_another_deployment_is_not_to_be_begun_anew_in(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()

    renamed = replace(changed_settings(name="m"), name="m")
    for fresh in (False, True):
        process = Process(broker, state, settings=renamed, fresh=fresh)
        with pytest.raises(ConfigError, match=r"holds the state of 'n', .* 'm': set the name back") as caught:
            process.run()
        assert caught.value.exit_code == 78
        assert process.publisher.epoch == -1


def test_a_learning_key_is_taken_over_from_a_clean_stop(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL).run()
    fill(broker.inputs["in"], range(60, 120))

    Process(broker, state, settings=changed_settings(gain=0.1), pace=KEEP_ALL).run()

    incarnations = [r for e in broker.progress if isinstance(r := decode_record(e), Incarnation)]
    assert [i.learning for i in incarnations] == [{"gain": 0.5}, {"gain": 0.1}]


def test_a_crash_after_a_learning_key_was_taken_over_resumes_with_it(tmp_path):
    def run(state: Path, broker: Broker, *, crash: bool):
        Process(broker, state, pace=KEEP_ALL).run()
        fill(broker.inputs["in"], range(60, 120))
        settings = changed_settings(gain=0.1)
        if crash:
            crash_after(broker, state, 3, settings=settings, pace=KEEP_ALL)
        return Process(broker, state, settings=settings, pace=KEEP_ALL).run().state().digests()

    plain, crashed = filled(partitions=1), filled(partitions=1)
    assert run(tmp_path / "a", plain, crash=False) == run(tmp_path / "b", crashed, crash=True)
    assert values(plain) == values(crashed)


def test_a_learning_key_is_not_taken_over_while_steps_must_be_replayed(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 6, pace=KEEP_ALL)

    with pytest.raises(
        ConfigError, match=r"gain \(was 0\.5, is 0\.\d+\); but the steps .* as they were: set them back"
    ):
        Process(broker, state, settings=changed_settings(gain=0.1)).run()
    Process(broker, state).run()
    Process(broker, state, settings=changed_settings(gain=0.1)).run()


def test_on_another_cpu_the_steps_are_replayed_and_it_is_said(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 6, pace=KEEP_ALL)

    process = Process(broker, state, cpu="other", pace=KEEP_ALL)
    process.run()

    assert process.ready is not None
    assert process.ready.rebased
    assert process.ready.replayed_steps > 0
    ((_, _, facts),) = [line for line in process.journal.lines if line[0] == "warning"]
    assert facts["differences"] == ["cpu was any and is other"]
    incarnations = [r for e in broker.progress if isinstance(r := decode_record(e), Incarnation)]
    assert [i.rebased for i in incarnations] == [False, True]


def test_on_another_cpu_with_nothing_to_replay_all_is_well(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()

    process = Process(broker, state, cpu="other", on_mismatch="fail")
    process.run()

    assert process.ready is not None
    assert not process.ready.rebased


def test_on_another_cpu_it_may_be_told_to_refuse(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 6, pace=KEEP_ALL)

    with pytest.raises(ConfigError, match="cpu was any and is other"):
        Process(broker, state, cpu="other", on_mismatch="fail").run()
    assert not decode_record(broker.progress[-1]).rebased


def doubtful(broker: Broker, state: Path, **options) -> Process:
    """A machine that failed its self-test."""
    process = Process(broker, state, pace=replace(KEEP_ALL, checkpoint_every_records=1000), **options)
    process.terms = replace(process.terms, fingerprint=process.terms.fingerprint | doubt_rows(["head"]))
    return process


def test_a_machine_that_failed_its_self_test_compares_no_digest_and_says_so(tmp_path):
    broker, state = filled(), tmp_path / "state"
    process = doubtful(broker, state)
    process.begin()
    assert process.daemon is not None
    for _ in range(6):
        process.daemon.turn()
    process.store.close()
    broker.inputs["in"][0][0] = message("s0", 99.0)  # as if it had computed something else

    again = doubtful(broker, state)
    again.run()

    assert again.ready is not None
    assert again.ready.replayed_steps > 0
    assert again.ready.rebased
    incarnations = [r for e in broker.progress if isinstance(r := decode_record(e), Incarnation)]
    assert [i.rebased for i in incarnations] == [False, True]
    assert "head" in incarnations[0].fingerprint["rows"]
    assert again.watching.resumed[0].reproducible is False


def test_a_machine_that_failed_its_self_test_may_be_told_not_to_replay(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 6, pace=KEEP_ALL)

    with pytest.raises(ConfigError, match="a row of the head depended on the rows beside it"):
        doubtful(broker, state, on_mismatch="fail").run()


@pytest.mark.parametrize(("cpu", "told"), [("any", "can be expected to match"), ("other", "cpu was any and is other")])
def test_the_ready_line_says_whether_bits_can_be_expected_to_match(tmp_path, cpu, told):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()

    process = Process(broker, state, cpu=cpu)
    process.run()

    ((_, _, facts),) = [line for line in process.journal.lines if line[1] == "ready"]
    assert facts["bits"] == told
    assert facts["rebased"] is False, "nothing was replayed"


def test_a_replay_that_gives_another_output_is_refused(tmp_path):
    broker, state = filled(), tmp_path / "state"
    crash_after(broker, state, 3, pace=replace(KEEP_ALL, checkpoint_every_records=1000))
    broker.inputs["in"][0][0] = message("s0", 99.0)

    with pytest.raises(ProgressError, match="step 1 gives another output now than was committed"):
        Process(broker, state).run()


def test_a_topic_made_anew_is_refused(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()
    broker.topic_ids["in"] = "id-2"

    with pytest.raises(TopicChanged, match="topic in was re-created"):
        Process(broker, state).run()


def test_more_partitions_are_refused(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()
    broker.inputs["in"].append([])

    with pytest.raises(TopicChanged, match="in had 2 and has 3"):
        Process(broker, state).run()


def test_input_that_retention_deleted_is_refused_with_both_offsets(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()
    end = len(broker.inputs["in"][1])
    fill(broker.inputs["in"], range(60, 80))
    broker.beginning["in", 1] = end + 3

    with pytest.raises(LogGap, match=rf"in-1: offset {end} is needed, but retention has deleted all before {end + 3}"):
        Process(broker, state).run()


def test_a_superseded_process_ends_for_good(tmp_path):
    broker = filled(records=200)
    first = Process(broker, tmp_path / "state", pace=KEEP_ALL)
    first.begin()
    assert first.daemon is not None
    first.daemon.turn()
    first.store.close()  # another host, with the same state
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    second = Process(broker, tmp_path / "copy", pace=KEEP_ALL)
    second.begin()

    with pytest.raises(Superseded) as caught:
        first.daemon.run()
    assert caught.value.exit_code == 76
    assert first.watching.failed_commits
    assert second.daemon is not None
    second.daemon.run()


def test_a_zombie_that_slept_while_its_successor_trimmed_the_chain_ends_for_good(tmp_path):
    broker = filled(records=200)
    first = Process(broker, tmp_path / "state")
    first.begin()
    first.store.close()
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    Process(broker, tmp_path / "copy", keep=2).run()
    assert not any(isinstance(decode_record(entry), Incarnation) for entry in broker.progress)

    assert first.daemon is not None
    with pytest.raises(Superseded):
        first.daemon.run()


def test_fenced_by_nobody_newer_is_worth_a_restart(tmp_path):
    broker = filled(records=200)
    process = Process(broker, tmp_path / "state", pace=KEEP_ALL)
    process.begin()
    broker.epoch += 1  # as after a transaction that took too long

    assert process.daemon is not None
    with pytest.raises(Temporary) as caught:
        process.daemon.run()
    assert caught.value.exit_code == 75


def test_superseded_while_starting_ends_for_good(tmp_path):
    broker = filled()
    Process(broker, tmp_path / "state").run()
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    slow, quick = Process(broker, tmp_path / "state"), Process(broker, tmp_path / "copy")
    read = slow.world.progress.read
    slow.world.progress.read = lambda start=0: (read(start), overtake())[0]

    def overtake() -> None:
        slow.world.progress.read = read
        quick.begin()

    with pytest.raises(Superseded):
        slow.begin()


def test_the_first_checkpoint_must_be_written(tmp_path):
    class Full(Disk):
        def create(self, path: Path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    broker = filled()
    with pytest.raises(CheckpointNotWritten, match="No space left on device") as caught:
        Process(broker, tmp_path / "state", disk=Full()).run()
    assert caught.value.exit_code == 74
    assert broker.progress == []


def test_every_refusal_is_one_line(tmp_path):
    broker, state = filled(), tmp_path / "state"
    Process(broker, state).run()
    broker.progress.append(ProgressEntry(1000, b"\x00torn\nrecord"))

    with pytest.raises(StreamlstmError) as caught:
        Process(broker, state).run()
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, Fenced)
