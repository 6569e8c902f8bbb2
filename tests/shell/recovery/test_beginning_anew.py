"""``run --fresh``: where a start would be refused for good, a new generation 0 and a branch to it."""

import contextlib
import hashlib
import itertools
import json
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

from streamlstm.errors import CheckpointError, ConfigError, LogGap, ProgressError, StreamlstmError, TopicChanged
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.progress import Branch, Incarnation, decode_record, read_chain
from streamlstm.recovery.snapshot import canonical_json

KEEP_ALL = replace(PACE, trim=False)
CHANGED = make_settings({**SETTINGS.identity, "model.hidden_size": 3}, dict(SETTINGS.learning))


def filled(records: int = 60, partitions: int = 1) -> Broker:
    logs: list[list[bytes | None]] = [[] for _ in range(partitions)]
    for i in range(records):
        logs[i % partitions].append(message(f"s{i % 3}", float(i * 7 % 31)))
    return Broker({"in": logs})


def ran(tmp_path: Path, **options) -> tuple[Broker, Path]:
    broker, state = filled(), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL, keep=9, **options).run()
    return broker, state


def values(broker: Broker) -> list[bytes]:
    return [m.value or b"" for m in broker.published]


def branches(broker: Broker) -> list[Branch]:
    return [record for entry in broker.progress if isinstance(record := decode_record(entry), Branch)]


def identity_changed(broker: Broker, state: Path) -> dict:
    return {"settings": CHANGED}


def topic_made_anew(broker: Broker, state: Path) -> dict:
    broker.topic_ids["in"] = "id-2"
    return {}


def more_partitions(broker: Broker, state: Path) -> dict:
    broker.inputs["in"].append([message("s0", 1.0)])
    return {}


def all_bad(broker: Broker, state: Path) -> dict:
    for path in state.glob("0*/optim.pt"):
        path.write_bytes(b"")
    return {}


def all_lost(broker: Broker, state: Path) -> dict:
    shutil.rmtree(state)
    return {}


def records_lost(broker: Broker, state: Path) -> dict:
    store = open_store(state)
    link = store.verify(max(store.steps())).provenance.progress
    assert link is not None
    broker.progress = [entry for entry in broker.progress if entry.offset > link.offset]
    broker.inputs["in"][0] += [message("s0", 1.0)] * 3
    return {}


def input_gone(broker: Broker, state: Path) -> dict:
    end = len(broker.inputs["in"][0])
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(10)]
    broker.beginning["in", 0] = end + 4
    return {}


REASONS = [
    (identity_changed, ConfigError),
    (topic_made_anew, TopicChanged),
    (more_partitions, TopicChanged),
    (all_bad, CheckpointError),
    (all_lost, ProgressError),
    (input_gone, LogGap),
]


@pytest.mark.parametrize(("change", "error"), REASONS)
def test_what_is_refused_for_good_names_the_way_out_and_it_works(tmp_path, change, error):
    broker, state = ran(tmp_path)
    options = change(broker, state)
    before = len(broker.published)
    with pytest.raises(error) as caught:
        Process(broker, state, pace=KEEP_ALL, **options).run()
    if change is not all_bad:
        assert "--fresh" in str(caught.value)
    assert not branches(broker)

    process = Process(broker, state, pace=KEEP_ALL, fresh=True, **options)
    engine = process.run()

    (branch,) = branches(broker)
    assert (branch.after, branch.revision) == (0, 1)
    assert process.ready is not None
    assert (process.ready.revision, process.ready.source) == (1, "fresh")
    # It is as a first run over the input as it is now.
    first = Broker(broker.inputs, topic_ids=broker.topic_ids, beginning=broker.beginning)
    assert engine.state().digests() == Process(first, tmp_path / "first", **options).run().state().digests()
    assert values(broker)[before:] == values(first)
    assert "begins anew; the old checkpoints were put aside" in process.journal.events("warning")


def test_old_checkpoints_are_put_aside_and_none_is_deleted(tmp_path):
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()

    process = Process(broker, state, settings=CHANGED, pace=KEEP_ALL, fresh=True)
    process.begin()
    process.store.close()

    assert process.store.steps() == [0]
    assert len(process.store.bad()) == len(steps) - 1, "all but generation 0, which the new one replaced"


def test_where_an_ordinary_start_works_nothing_begins_anew(tmp_path):
    broker, state = ran(tmp_path)
    broker.inputs["in"][0] += [message("s0", 1.0)] * 9

    process = Process(broker, state, pace=KEEP_ALL, fresh=True)
    process.run()

    assert not branches(broker)
    assert process.ready is not None
    assert process.ready.source == "checkpoint"


def test_started_again_with_the_option_it_goes_on(tmp_path):
    broker, state = ran(tmp_path)
    for _ in range(2):
        Process(broker, state, settings=CHANGED, pace=KEEP_ALL, fresh=True).run()

    assert len(branches(broker)) == 1


def test_a_later_start_without_the_option_goes_on_too(tmp_path):
    broker, state = ran(tmp_path)
    Process(broker, state, settings=CHANGED, fresh=True, keep=2).run()
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(20)]

    process = Process(broker, state, settings=CHANGED, keep=2)
    engine = process.run()

    first = Broker(broker.inputs)
    assert engine.state().digests() == Process(first, tmp_path / "first", settings=CHANGED).run().state().digests()
    assert values(broker)[60:] == values(first)


@pytest.mark.parametrize("fresh", [False, True])
def test_another_deployments_topic_is_refused_all_the_same(tmp_path, fresh):
    broker, state = ran(tmp_path)
    other = replace(CHANGED, name="other")
    records, files = list(broker.progress), digest_directory(state)

    with pytest.raises(StreamlstmError):
        Process(broker, state, settings=other, fresh=fresh).run()
    with pytest.raises(ProgressError, match="belongs to the deployment 'n'"):
        Process(broker, tmp_path / "elsewhere", settings=other, fresh=fresh).run()
    assert broker.progress == records
    assert digest_directory(state) == files


def test_another_hosts_run_is_refused_all_the_same(tmp_path):
    broker, _ = ran(tmp_path)
    _, theirs = ran(tmp_path / "theirs") if (tmp_path / "theirs").mkdir() is None else ran(tmp_path)
    records = list(broker.progress)

    with pytest.raises(ProgressError, match="another host started this deployment first"):
        Process(broker, theirs, fresh=True).run()
    assert broker.progress == records


@pytest.mark.parametrize("option", ["fresh", "rebuild"])
def test_a_checkpoint_of_a_newer_version_is_refused_all_the_same(tmp_path, option):
    broker, state = ran(tmp_path)
    manifest = state / f"{max(open_store(state).steps()):020d}" / "MANIFEST.json"
    sealed = json.loads(manifest.read_bytes()) | {"schema": 99}
    del sealed["sha256"]
    sealed["sha256"] = hashlib.sha256(canonical_json(sealed)).hexdigest()
    manifest.write_bytes(canonical_json(sealed))
    records = list(broker.progress)

    with pytest.raises(CheckpointError, match="has layout 99"):
        Process(broker, state, **{option: True}).run()
    assert broker.progress == records


def test_latest_is_resolved_once_for_the_new_beginning(tmp_path):
    broker, state = ran(tmp_path)
    latest = make_settings({**SETTINGS.identity, "source.start": "latest"}, dict(SETTINGS.learning))
    process = Process(broker, state, settings=latest, start="latest", fresh=True)
    process.begin()
    process.store.close()
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(5)]

    Process(broker, state, settings=latest, start="latest", fresh=True).run()

    assert len(broker.published) == 65


def test_the_first_run_is_no_different_with_it(tmp_path):
    broker = filled()
    Process(broker, tmp_path / "state", pace=KEEP_ALL, fresh=True).run()

    assert not branches(broker)
    assert len(broker.published) == 60


def test_a_chain_that_lost_the_generations_record_may_begin_anew(tmp_path):
    broker, state = filled(), tmp_path / "state"
    with contextlib.suppress(Crash):
        Process(broker, state, Fate(130), pace=KEEP_ALL).run()
    records_lost(broker, state)
    with pytest.raises(ProgressError, match="what lay between is gone"):
        Process(broker, state, pace=KEEP_ALL).run()

    process = Process(broker, state, pace=KEEP_ALL, fresh=True)
    process.run()

    assert process.ready is not None
    assert process.ready.revision == 1


def test_before_the_first_step_a_topic_made_anew_may_be_begun_with(tmp_path):
    broker, state = filled(), tmp_path / "state"
    process = Process(broker, state)
    process.begin()
    process.store.close()
    broker.topic_ids["in"] = "id-2"

    Process(broker, state, pace=KEEP_ALL, fresh=True).run()

    assert len(branches(broker)) == 1
    assert len(broker.published) == 60


@pytest.mark.parametrize("change", [identity_changed, topic_made_anew, all_bad, all_lost, input_gone])
def test_killed_at_any_call_and_started_again_it_has_begun_anew_once(tmp_path, change):
    """Nested: the start that begins anew is killed, the next one too, and the third goes through."""
    kept, before = tmp_path / "kept", filled(30)
    Process(before, kept, pace=KEEP_ALL, keep=9).run()

    def copy(name: str) -> tuple[Broker, Path, dict]:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(kept, tmp_path / name)
        log = Broker({"in": [list(before.inputs["in"][0])]}, progress=list(before.progress), epoch=before.epoch)
        log.next_progress = before.next_progress
        return log, tmp_path / name, change(log, tmp_path / name)

    plain, where, options = copy("plain")
    digests = Process(plain, where, pace=KEEP_ALL, fresh=True, **options).run().state().digests()
    for at in itertools.count(step=3):
        broker, state, options = copy("killed")
        for fate in (Fate(at), Fate(70 - at if at < 60 else at // 3)):
            with contextlib.suppress(Crash):
                Process(broker, state, fate, pace=KEEP_ALL, fresh=True, **options).run()
            if not branches(broker) and change in (identity_changed, topic_made_anew):
                # Cut short, it is as if it had not been asked: what was there stays, and can be gone on with.
                assert max(open_store(state).steps()) > 0
        engine = Process(broker, state, pace=KEEP_ALL, fresh=True, **options).run()

        assert len(branches(broker)) == 1, at
        assert engine.state().digests() == digests, at
        assert values(broker) == values(plain), at
        if not fate.dead and at > 60:
            break
        assert at < 400


def test_cut_short_it_can_still_be_gone_on_with_as_it_was(tmp_path):
    """A change that was taken back: whatever the cut start wrote, the old deployment goes on from a checkpoint."""
    for at in range(40):
        broker, state = filled(), tmp_path / f"state-{at}"
        Process(broker, state, pace=KEEP_ALL).run()
        with contextlib.suppress(Crash):
            Process(broker, state, Fate(at), settings=CHANGED, fresh=True).run()
        if branches(broker):
            break
        broker.inputs["in"][0] += [message("s0", 1.0)] * 7

        process = Process(broker, state, pace=KEEP_ALL)
        process.run()

        assert len(broker.published) == 67
        shutil.rmtree(state)
    assert at > 5


def test_what_was_excluded_stays_so_while_the_topic_is_the_same(tmp_path):

    for name, made_anew in (("same", False), ("anew", True)):
        broker, state = filled(), tmp_path / name
        Process(broker, state, pace=KEEP_ALL, keep=9).run()
        poisoned = revert_without(broker, state, 2)
        if made_anew:
            broker.topic_ids["in"] = "id-2"

        process = Process(broker, state, settings=CHANGED, pace=KEEP_ALL, fresh=True)
        ready = process.begin()
        process.store.close()

        assert ready.excluded == (() if made_anew else (poisoned,))
        assert ready.revision == 2


@pytest.mark.parametrize("trim", [False, True])
def test_what_was_excluded_stays_so_long_after_it_was(tmp_path, trim):
    """The checkpoints know it where the chain was trimmed since, or need not be read so far back."""
    pace = replace(PACE, trim=trim)
    broker, state = filled(), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    poisoned = revert_without(broker, state, 2)
    Process(broker, state, pace=pace, keep=2).run()
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(60)]
    Process(broker, state, pace=pace, keep=2).run()
    assert (not read_chain(broker.progress, "n").branches) is trim

    process = Process(broker, state, settings=CHANGED, pace=pace, fresh=True)
    ready = process.begin()
    process.store.close()

    assert ready.excluded == (poisoned,)
    assert ready.revision == 2


def test_the_chain_of_both_runs_is_read_as_one(tmp_path):
    broker, state = ran(tmp_path)
    Process(broker, state, settings=CHANGED, pace=KEEP_ALL, fresh=True).run()

    chain = read_chain(broker.progress, "n")
    incarnations = [record for entry in broker.progress if isinstance(record := decode_record(entry), Incarnation)]

    assert [i.revision for i in incarnations] == [0, 1]
    assert chain.steps[0].number == 1
    assert chain.last_step == chain.steps[-1].number
