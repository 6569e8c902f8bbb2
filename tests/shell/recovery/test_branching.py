import contextlib
import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import PACE, Broker, Crash, Fate, Process, TinyEncoder, TinyEngine, decode, digest_directory, message

from streamlstm.errors import CheckpointError, DataError, ProgressError, Superseded
from streamlstm.records.batch import Range
from streamlstm.recovery.branching import Reverted, revert
from streamlstm.recovery.checkpoint import CheckpointStore, open_store
from streamlstm.recovery.exclusions import drop_excluded
from streamlstm.recovery.outlook import look_ahead
from streamlstm.recovery.progress import Branch, decode_record, read_chain
from streamlstm.recovery.standing import why_not_on
from streamlstm.transport.interfaces import Position

KEEP_ALL = replace(PACE, trim=False)


def filled(records: int = 90, partitions: int = 1) -> Broker:
    logs: list[list[bytes | None]] = [[] for _ in range(partitions)]
    for i in range(records):
        logs[i % partitions].append(message(f"s{i % 3}", float(i * 7 % 31)))
    return Broker({"in": logs})


def go_back(broker: Broker, state: Path, step: int, *exclude: Range, fate: Fate | None = None) -> Reverted:
    process = Process(broker, state, fate)
    try:
        return revert(
            process.store, process.publisher, process.world.progress, "n", step, exclude, process.world.new_id
        )
    finally:
        process.store.close()


def offsets(values: list[bytes]) -> list[int]:
    return [int(value.split(b"@")[1].split(b"=")[0]) for value in values]


def published(broker: Broker) -> list[bytes]:
    return [m.value or b"" for m in broker.published]


def ran(tmp_path: Path, keep: int = 9) -> tuple[Broker, Path]:
    broker, state = filled(), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL, keep=keep).run()
    return broker, state


def learnt_without(broker: Broker, step: int, store: CheckpointStore, *excluded: Range) -> tuple[list[bytes], dict]:
    """The oracle: an engine from the generation, fed with all that follows but the excluded ranges."""
    process = Process(broker, store.directory.parent / "oracle")
    loaded = store.load(step)
    engine = TinyEngine.restore(loaded.state)
    process.source.seek(loaded.generation.provenance.positions)
    values: list[bytes] = []
    for recorded in read_chain(broker.progress, "n").after(step):
        used, _ = drop_excluded(process.source.read(recorded.cut, 1.0), excluded)
        report = engine.step(decode(used))
        values += [m.value or b"" for m in TinyEncoder().encode_forecasts(report)]
    return values, engine.state().digests()


def test_going_back_relearns_without_the_poisoned_range_and_says_so_in_every_record(tmp_path):
    broker, state = ran(tmp_path)
    store = open_store(state)
    step = store.steps()[1]
    at = store.verify(step).provenance.positions[0].next_offset
    before = len(broker.published)

    done = go_back(broker, state, step, Range("in", 0, at + 3, at + 8))
    process = Process(broker, state, pace=KEEP_ALL, keep=9)
    engine = process.run()

    again = published(broker)[before:]
    assert offsets(again) == [*range(at, at + 3), *range(at + 8, 90)]
    expected, digests = learnt_without(broker, step, store, Range("in", 0, at + 3, at + 8))
    assert again == expected
    assert engine.state().digests() == digests
    assert done.branch.revision == 1
    assert process.ready is not None
    assert (process.ready.revision, process.ready.lineage) == (1, done.branch.lineage)
    assert process.ready.excluded == (Range("in", 0, at + 3, at + 8),)


def test_what_is_excluded_is_counted_as_skipped(tmp_path):
    broker, state = ran(tmp_path)
    step = open_store(state).steps()[1]
    at = open_store(state).verify(step).provenance.positions[0].next_offset
    go_back(broker, state, step, Range("in", 0, at, at + 8))

    process = Process(broker, state, pace=KEEP_ALL)
    process.run()

    assert sum(committed.excluded for committed in process.watching.commits) == 8
    reported = sum(len(r.batch) for committed in process.watching.commits for r in committed.reports)
    assert reported + 8 == 90 - at


def test_generations_beyond_the_branch_are_put_aside_and_none_is_lost(tmp_path):
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()
    go_back(broker, state, steps[1])
    assert open_store(state).steps() == steps, "only the branch decides"

    process = Process(broker, state, pace=KEEP_ALL)
    process.begin()

    assert process.store.steps() == steps[:2]
    assert len(process.store.bad()) == len(steps) - 2
    process.store.close()


def test_what_the_chain_went_back_from_is_not_bad_and_a_damaged_one_among_it_is(tmp_path):
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()
    went_back = "a checkpoint that the chain went back from was put aside"
    for damaged in ((), (steps[-1],)):
        kept, where = Broker(broker.inputs, progress=list(broker.progress), epoch=broker.epoch), tmp_path / str(damaged)
        kept.next_progress = broker.next_progress
        shutil.copytree(state, where)
        go_back(kept, where, steps[1])
        for step in damaged:
            (where / f"{step:020d}" / "optim.pt").write_bytes(b"")

        process = Process(kept, where, pace=KEEP_ALL)
        ready = process.begin()
        process.store.close()

        assert [refused.step for refused in ready.refused] == [*damaged]
        assert ready.source == ("fallback" if damaged else "checkpoint")
        assert process.journal.events("info").count(went_back) == len(steps) - 2 - len(damaged)
        assert len(process.journal.events("error")) == len(damaged)


def test_exclusions_last_through_later_checkpoints_and_the_chains_trimming(tmp_path):
    broker, state = ran(tmp_path)
    step = open_store(state).steps()[1]
    at = open_store(state).verify(step).provenance.positions[0].next_offset
    go_back(broker, state, step, Range("in", 0, at + 3, 100))
    Process(broker, state, keep=2).run()
    assert not any(isinstance(decode_record(entry), Branch) for entry in broker.progress)
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(30)]

    process = Process(broker, state, keep=2)
    process.run()

    assert process.ready is not None
    assert process.ready.excluded == (Range("in", 0, at + 3, 100),)
    assert process.ready.revision == 1
    assert offsets(published(broker)[-20:]) == list(range(100, 120))


def test_one_may_go_back_again_and_earlier_exclusions_stay(tmp_path):
    broker, state = ran(tmp_path)
    step = open_store(state).steps()[1]
    at = open_store(state).verify(step).provenance.positions[0].next_offset
    go_back(broker, state, step, Range("in", 0, at + 3, at + 5))
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    before = len(broker.published)

    done = go_back(broker, state, step, Range("in", 0, at + 5, at + 9), Range("in", 0, 80, 82))
    process = Process(broker, state, pace=KEEP_ALL)
    process.run()

    assert done.branch.revision == 2
    assert done.branch.excluded == (Range("in", 0, at + 3, at + 9), Range("in", 0, 80, 82))
    assert offsets(published(broker)[before:]) == [*range(at, at + 3), *range(at + 9, 80), *range(82, 90)]


def without_its_last_branch(tmp_path: Path, *, trimmed: bool) -> tuple[Broker, Path]:
    """Gone back twice, forecast under revision 2; then the progress log loses its end, the second branch included."""
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()
    go_back(broker, state, steps[-2])
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    kept = list(broker.progress)
    go_back(broker, state, steps[-2])
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(30)]
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    store = open_store(state)
    if trimmed:
        link = store.verify(steps[-3]).provenance.progress
        assert link is not None
        kept = [entry for entry in kept if entry.offset >= link.offset]
        for step in [step for step in store.steps() if step < steps[-3]]:
            shutil.rmtree(state / f"{step:020d}")
    assert store.verify(store.steps()[-1]).provenance.revision == 2
    broker.progress = kept
    assert read_chain(kept, "n").revision == 1
    return broker, state


def test_a_chain_that_lost_its_last_branch_gives_no_revision_twice(tmp_path):
    broker, state = without_its_last_branch(tmp_path, trimmed=True)

    process = Process(broker, state, pace=KEEP_ALL)
    process.run()

    assert process.ready is not None
    assert process.ready.revision == 3
    assert Process(broker, state, pace=KEEP_ALL).begin().revision == 3


def test_going_back_on_a_chain_that_lost_its_last_branch_gives_no_revision_twice(tmp_path):
    broker, state = without_its_last_branch(tmp_path, trimmed=False)
    with pytest.raises(ProgressError, match=r"brought back from elsewhere, or .* lost the `revert`") as refused:
        Process(broker, state, pace=KEEP_ALL).run()
    steps = open_store(state).steps()
    step = int(re.findall(r"`streamlstm checkpoint revert (\d+)`", str(refused.value))[0])
    later = [s for s in steps if open_store(state).verify(s).provenance.revision == 2]
    outlook = look_ahead(open_store(state), read_chain(broker.progress, "n"), [], step, [])

    done = go_back(broker, state, step)

    assert done.branch.revision == outlook.revision == 3
    process = Process(broker, state, pace=KEEP_ALL, keep=9)
    process.begin()
    process.store.close()
    assert process.ready is not None
    assert (process.ready.revision, process.ready.generation.step) == (3, step)
    assert later
    assert not set(process.store.steps()) & set(later), "put aside"
    assert not process.journal.events("error"), "and not as bad"
    Process(broker, state, pace=KEEP_ALL).run()
    assert Process(broker, state, pace=KEEP_ALL).begin().revision == 3


def test_a_state_of_another_run_is_refused_whatever_its_revision(tmp_path):
    broker, state = ran(tmp_path)
    go_back(broker, state, open_store(state).steps()[1])
    elsewhere = filled()
    Process(elsewhere, tmp_path / "elsewhere").run()
    records, files = list(broker.progress), digest_directory(tmp_path / "elsewhere")

    for fresh in (False, True):
        with pytest.raises(ProgressError, match=r"another host started this deployment first, or one .* elsewhere$"):
            Process(broker, tmp_path / "elsewhere", fresh=fresh).run()
    assert broker.progress == records
    assert digest_directory(tmp_path / "elsewhere") == files


def without_its_exclusion(tmp_path: Path, *, trimmed: bool) -> tuple[Broker, Path, list[int], Range]:
    """Gone back behind a poisoned range and on without it; then the chain loses that branch and all after it."""
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()
    if trimmed:
        go_back(broker, state, steps[-1])
        Process(broker, state, pace=KEEP_ALL, keep=9).run()
    kept = list(broker.progress)
    at = open_store(state).verify(steps[1]).provenance.positions[0].next_offset
    poison = Range("in", 0, at + 3, at + 8)
    shutil.copytree(state, tmp_path / "older")
    go_back(broker, state, steps[1], poison)
    broker.inputs["in"][0] += [message("s0", float(i)) for i in range(30)]
    Process(broker, state, pace=KEEP_ALL, keep=9).run()
    if trimmed:
        link = open_store(state).verify(steps[1]).provenance.progress
        assert link is not None
        kept = [entry for entry in kept if entry.offset >= link.offset]
        shutil.rmtree(state / f"{steps[0]:020d}")
    for step in steps[2:]:  # those from before it were brought back
        shutil.rmtree(state / f"{step:020d}", ignore_errors=True)
        shutil.copytree(tmp_path / "older" / f"{step:020d}", state / f"{step:020d}")
    broker.progress = kept
    assert max(open_store(state).verify(s).provenance.revision for s in open_store(state).steps()) == 1 + trimmed
    return broker, state, steps, poison


@pytest.mark.parametrize("trimmed", [False, True])
def test_what_a_lost_branch_excluded_is_never_learnt_in_silence(tmp_path, trimmed):
    broker, state, steps, poison = without_its_exclusion(tmp_path, trimmed=trimmed)
    chain = read_chain(broker.progress, "n")
    records = list(broker.progress)
    harmed = next(s for s in steps[2:] if why_not_on(chain, open_store(state).verify(s)) is None)
    way = rf"`streamlstm checkpoint revert {steps[1]}`"
    told = (
        rf"in:0:{poison.start}-{poison.end} was excluded by a `revert` that .* has lost, .* has learnt from it: .*{way}"
    )

    with pytest.raises(DataError, match=told if trimmed else way):
        Process(broker, state, pace=KEEP_ALL).run()
    with pytest.raises(DataError, match=told):
        go_back(broker, state, harmed)
    with pytest.raises(DataError, match=told):
        look_ahead(open_store(state), chain, [], harmed, [])
    assert broker.progress == records
    assert look_ahead(open_store(state), chain, [], steps[1], []).excluded == (poison,)
    go_back(broker, state, steps[1])
    process = Process(broker, state, pace=KEEP_ALL, keep=9)
    before = len(broker.published)
    process.run()

    assert process.ready is not None
    assert process.ready.excluded == (poison,)
    assert process.ready.revision == 2 + trimmed
    assert not set(offsets(published(broker)[before:])) & set(range(poison.start, poison.end))


def test_where_all_have_learnt_what_a_lost_branch_excluded_only_a_new_beginning_is_left(tmp_path):
    broker, state, steps, poison = without_its_exclusion(tmp_path, trimmed=True)
    shutil.rmtree(state / f"{steps[1]:020d}")

    with pytest.raises(DataError, match="none is older, so start anew with `run --fresh`"):
        Process(broker, state, pace=KEEP_ALL).run()
    process = Process(broker, state, pace=KEEP_ALL, fresh=True)
    process.begin()

    assert process.ready is not None
    assert process.ready.excluded == (poison,)
    assert process.ready.revision == 3


@pytest.mark.parametrize(
    ("ranged", "told"),
    [
        (lambda at: Range("in", 0, at - 1, at + 5), "has learnt from in-0 up to"),
        (lambda at: Range("in", 0, at + 5, at + 5), "the range is empty"),
        (lambda at: Range("in", 7, at, at + 5), "not among the input"),
        (lambda at: Range("out", 0, at, at + 5), "not among the input"),
    ],
)
def test_a_range_that_cannot_be_excluded_is_refused_and_nothing_is_written(tmp_path, ranged, told):
    broker, state = ran(tmp_path)
    step = open_store(state).steps()[1]
    at = open_store(state).verify(step).provenance.positions[0].next_offset
    records, files = list(broker.progress), digest_directory(state)

    with pytest.raises(DataError, match=told):
        go_back(broker, state, step, ranged(at))
    assert broker.progress == records
    assert digest_directory(state) == files


def test_a_generation_left_behind_by_a_branch_cannot_be_gone_back_to(tmp_path):
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()
    go_back(broker, state, steps[1])

    told = rf"cannot go back to the checkpoint of step {steps[2]}: .*; take one of {steps[0]}, {steps[1]}$"
    with pytest.raises(CheckpointError, match=told):
        go_back(broker, state, steps[2])
    with pytest.raises(CheckpointError, match=told):
        look_ahead(open_store(state), read_chain(broker.progress, "n"), [Position("in", 0, 0)], steps[2], [])


def test_a_service_that_was_gone_back_under_ends_for_good(tmp_path):
    broker, state = filled(), tmp_path / "state"
    process = Process(broker, state, pace=KEEP_ALL, keep=9)
    process.begin()
    assert process.daemon is not None
    for _ in range(12):
        process.daemon.turn()
    process.store.close()  # another host, with a copy of the state
    shutil.copytree(state, tmp_path / "copy")
    go_back(broker, tmp_path / "copy", open_store(tmp_path / "copy").steps()[0])

    with pytest.raises(Superseded, match="revision 1"):
        process.daemon.run()


def test_a_bad_generation_at_the_branch_costs_a_longer_replay(tmp_path):
    broker, state = ran(tmp_path)
    steps = open_store(state).steps()
    at = open_store(state).verify(steps[2]).provenance.positions[0].next_offset
    shutil.copytree(state, tmp_path / "whole")
    whole = Broker(broker.inputs, progress=list(broker.progress), next_progress=broker.next_progress)
    for where, log in ((state, broker), (tmp_path / "whole", whole)):
        go_back(log, where, steps[2], Range("in", 0, at + 3, at + 8))
    (state / f"{steps[2]:020d}" / "model.pt").write_bytes(b"")

    process = Process(broker, state, pace=KEEP_ALL)
    digests = process.run().state().digests()

    assert process.ready is not None
    assert process.ready.generation.step == steps[1]
    assert digests == Process(whole, tmp_path / "whole", pace=KEEP_ALL).run().state().digests()


def test_killed_at_any_call_while_going_back_and_after_it_is_no_different(tmp_path):
    """Three deep: while the branch is written, while the next process starts, and once more."""
    first, kept = ran(tmp_path, keep=9)
    step = open_store(kept).steps()[1]
    at = open_store(kept).verify(step).provenance.positions[0].next_offset
    excluded = Range("in", 0, at + 3, at + 8)

    def copy(name: str) -> tuple[Broker, Path]:
        shutil.copytree(kept, tmp_path / name)
        log = Broker(first.inputs, progress=list(first.progress), next_progress=first.next_progress, epoch=first.epoch)
        return log, tmp_path / name

    plain, where = copy("plain")
    go_back(plain, where, step, excluded)
    digests = Process(plain, where, pace=KEEP_ALL).run().state().digests()

    for kill in itertools.count():
        broker, state = copy("killed")
        try:
            go_back(broker, state, step, excluded, fate=Fate(kill))
            finished = True
        except Crash:
            finished = False
        branched = any(isinstance(decode_record(entry), Branch) for entry in broker.progress)
        for fate in (Fate(3 + 5 * kill), Fate(60 - 5 * kill)):
            with contextlib.suppress(Crash):
                Process(broker, state, fate, pace=KEEP_ALL).run()
        engine = Process(broker, state, pace=KEEP_ALL).run()

        if branched:
            assert engine.state().digests() == digests
            assert published(broker) == published(plain)
        else:
            assert not broker.published, "as if nothing had been asked"
        shutil.rmtree(state)
        if finished:
            assert branched
            break
    assert kill >= 3
