"""Without transactions: killed anywhere, every forecast is there, and a second copy is byte for byte the first."""

import contextlib
import itertools
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import PACE, SETTINGS, Broker, Crash, Fate, Process, TinyEncoder, digest_directory, message

from streamlstm.errors import CheckpointError, CheckpointNotWritten, NotAuthorised, ProgressError
from streamlstm.recovery.branching import revert
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.journal import Journal
from streamlstm.recovery.progress import Chain, Incarnation, Steps, decode_record, read_chain
from streamlstm.service.repeat import Repeater
from streamlstm.transport.interfaces import OutMessage

KEEP_ALL = replace(PACE, trim=False)
NO_CHECKPOINTS = replace(KEEP_ALL, checkpoint_every_records=1000)


def filled(records: int = 60, partitions: int = 1) -> Broker:
    """An input with a few bad messages and offsets that hold nothing."""
    logs: list[list[bytes | None]] = [[] for _ in range(partitions)]
    for i in range(records):
        log = logs[i % partitions]
        if i % 17 == 5:
            log.append(None)
        log.append(b"broken" if i % 13 == 4 else message(f"s{i % 3}", float(i * 7 % 31)))
    return Broker({"in": logs})


def life(broker: Broker, directory: Path, fate: Fate | None = None, **options) -> Process:
    return Process(broker, directory, fate, **{"pace": KEEP_ALL, "delivery": "idempotent", **options})


def once(messages: list[OutMessage]) -> dict[bytes, bytes]:
    """Each message by its coordinates; a copy that differs is the end."""
    seen: dict[bytes, bytes] = {}
    for m in messages:
        value = m.value or b""
        assert seen.setdefault(value.split(b"=")[0], value) == value
    return seen


def out(broker: Broker) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    return once(broker.published), once(broker.dead_letters)


def chain_of(directory: Path) -> Chain:
    return read_chain(Journal(directory / "journal").read(), "n")


def never_stopped(tmp_path: Path, **filling) -> tuple[tuple, dict[str, str]]:
    broker = filled(**filling)
    engine = life(broker, tmp_path / "reference").run()
    assert len(broker.published) == len(out(broker)[0])
    return out(broker), engine.state().digests()


def check_against_oracle(broker: Broker, engine, directory: Path) -> None:
    """The journal's cuts, without interruption, give these forecasts and this state."""
    oracle = Process(broker, directory.with_name("oracle"))
    fresh, forecasts = oracle.world.maker.create(SETTINGS.learning), []
    oracle.source.seek(oracle.source.resolve_start("earliest"))
    for step in chain_of(directory).after(0):
        report = fresh.step(oracle.world.decode(oracle.source.read(step.cut, 1.0)))
        assert report.digest().hex() == step.digest
        forecasts += TinyEncoder().encode_forecasts(report)
    assert once(forecasts) == out(broker)[0]
    assert fresh.state().digests() == engine.state().digests()


def test_killed_at_any_call_nothing_is_lost_and_no_copy_differs(tmp_path):
    reference, digests = never_stopped(tmp_path, records=30)
    copies = 0
    for at in itertools.count():
        broker, state = filled(records=30), tmp_path / "state"
        process = life(broker, state, Fate(at))
        try:
            process.run()
            finished = True
        except Crash:
            finished = False
        engine = life(broker, state).run()

        # One partition: the log alone decides, so it is what a process that was never killed publishes.
        assert out(broker) == reference, at
        assert engine.state().digests() == digests, at
        copies += len(broker.published) - len(reference[0])
        shutil.rmtree(state)
        if finished:
            break
    assert at > 120
    assert copies > 50


def test_killed_at_any_call_with_several_partitions_equals_the_journals_cuts(tmp_path):
    rng = random.Random(17)
    for at in range(0, 400, 9):
        broker, state = filled(partitions=3), tmp_path / "state"
        with contextlib.suppress(Crash):
            life(broker, state, Fate(at), sizes=(5, 9, 1)).run()
        sizes = tuple(rng.randrange(1, 12) for _ in range(5))
        engine = life(broker, state, sizes=sizes).run()

        check_against_oracle(broker, engine, state)
        assert sum(map(len, out(broker))) == 60
        shutil.rmtree(state)


def test_kills_during_recovery_and_repetition_are_no_different(tmp_path):
    reference, digests = never_stopped(tmp_path)
    rng = random.Random(17)
    kills = 0
    for _ in range(60):
        broker, state = filled(), tmp_path / "state"
        for _ in range(rng.randrange(2, 5)):
            try:
                life(broker, state, Fate(rng.randrange(110))).run()
            except Crash:
                kills += 1
        engine = life(broker, state).run()

        assert out(broker) == reference
        assert engine.state().digests() == digests
        shutil.rmtree(state)
    assert kills > 100


def test_kills_with_a_trimmed_journal_are_no_different(tmp_path):
    reference, digests = never_stopped(tmp_path, records=200)
    trimmed = 0
    for at in range(40, 900, 41):
        broker, state = filled(records=200), tmp_path / "state"
        with contextlib.suppress(Crash):
            life(broker, state, Fate(at), keep=2, pace=PACE).run()
        engine = life(broker, state, keep=2, pace=PACE).run()

        assert out(broker) == reference
        assert engine.state().digests() == digests
        trimmed += chain_of(state).trimmed
        shutil.rmtree(state)
    assert trimmed > 5


def test_the_incarnation_is_journalled_before_anything_else(tmp_path):
    life(filled(records=9), tmp_path / "state").run()

    first, *rest = [decode_record(entry) for entry in Journal(tmp_path / "state" / "journal").read()]
    assert isinstance(first, Incarnation)
    assert first.origin is not None
    assert all(isinstance(record, Steps) for record in rest)


def repeated(process: Process) -> list[dict[str, object]]:
    """What the start said about publishing again."""
    return [facts for _, event, facts in process.journal.lines if event.startswith("published again")]


def die_at_commit(broker: Broker, state: Path, number: int, when: str) -> list[OutMessage]:
    """A process that dies while it commits for the so-many-th time (1 is the incarnation); what it then had to say."""
    process = life(broker, state, pace=NO_CHECKPOINTS)
    commit, left = process.publisher.commit, [number]
    last: list[OutMessage] = []

    def and_die(outputs):
        left[0] -= 1
        if left[0]:
            return commit(outputs)
        last[:] = outputs.forecasts
        process.publisher.journal.append(outputs.progress)
        if when == "in the middle":
            process.publisher.publish(outputs.forecasts[:3], [])
        elif when == "after":
            process.publisher.publish(outputs.forecasts, outputs.dead_letters)
        raise Crash

    process.publisher.commit = and_die
    with pytest.raises(Crash):
        process.run()
    return last


@pytest.mark.parametrize(("when", "there"), [("before", 0), ("in the middle", 3), ("after", 11)])
def test_the_newest_record_is_published_again_and_no_other(tmp_path, when, there):
    broker, state = filled(records=40), tmp_path / "state"
    newest = die_at_commit(broker, state, 4, when)
    before = list(broker.published)
    assert sum(m in newest for m in before) == there

    process = life(broker, state, pace=NO_CHECKPOINTS)
    process.begin()
    process.publisher.close()
    process.store.close()

    assert sorted(m.value for m in broker.published[len(before) :]) == sorted(m.value for m in newest)
    ((_, _, facts),) = [line for line in process.journal.lines if line[1].startswith("published again")]
    assert facts["same_bytes"]
    assert facts["last"] == chain_of(state).last_step


def test_dead_letters_are_published_again_too(tmp_path):
    broker, state = filled(records=40), tmp_path / "state"
    die_at_commit(broker, state, 2, "before")
    assert broker.dead_letters == []

    life(broker, state).run()

    assert len(out(broker)[1]) == 3


def test_what_a_checkpoint_stands_on_is_out_and_is_not_repeated(tmp_path):
    broker, state = filled(records=40), tmp_path / "state"
    life(broker, state).run()
    published = len(broker.published)

    again = life(broker, state)
    again.run()

    assert repeated(again) == []
    assert len(broker.published) == published


def test_a_start_that_was_killed_before_its_first_step_repeats_what_the_one_before_left(tmp_path):
    broker, state = filled(records=40), tmp_path / "state"
    newest = die_at_commit(broker, state, 4, "before")
    for _ in range(2):
        process = life(broker, state)
        process.publisher.publish = lambda *_: (_ for _ in ()).throw(Crash)
        with pytest.raises(Crash):
            process.begin()
        process.publisher.close()
        process.store.close()
    assert all(m not in broker.published for m in newest)

    life(broker, state).run()

    assert all(m in broker.published for m in newest)


def test_a_record_that_was_cut_off_is_dropped_and_its_input_consumed_again(tmp_path):
    reference, digests = never_stopped(tmp_path)
    broker, state = filled(), tmp_path / "state"
    die_at_commit(broker, state, 3, "before")
    newest = max((state / "journal").iterdir())
    newest.write_bytes(newest.read_bytes()[:-5])

    engine = life(broker, state).run()

    assert out(broker) == reference
    assert engine.state().digests() == digests


def test_a_journal_that_lost_what_a_checkpoint_stands_on_is_refused(tmp_path):
    """It was published; cut otherwise, it would be published with other values under the same revision."""
    broker, state = filled(), tmp_path / "state"
    life(broker, state).run()
    published = len(broker.published)
    newest = max((state / "journal").iterdir())
    newest.write_bytes(newest.read_bytes()[:-5])

    with pytest.raises(ProgressError, match=r"the journal ends with step \d+, .*`checkpoint revert (\d+)`") as caught:
        life(broker, state).run()
    assert len(broker.published) == published
    found = re.search(r"revert (\d+)", str(caught.value))
    assert found is not None
    back = life(broker, state)
    revert(back.store, back.publisher, back.world.progress, "n", int(found[1]), [], lambda: "another")
    back.publisher.close()
    back.store.close()

    process = life(broker, state)
    process.run()

    assert process.ready.revision == 1
    out(broker)


def journal_without_its_end(tmp_path: Path, keep: int = 9) -> tuple[Broker, Path, int]:
    """The journal is an older copy of itself; what the newer one recorded is out, and its checkpoints are there."""
    broker, state = filled(), tmp_path / "state"
    life(broker, state, keep=keep).run()
    last = chain_of(state).last_step
    shutil.copytree(state / "journal", tmp_path / "older")
    broker.inputs["in"][0] += filled().inputs["in"][0]
    life(broker, state, keep=keep).run()
    shutil.rmtree(state / "journal")
    shutil.move(tmp_path / "older", state / "journal")
    assert max(open_store(state).steps()) > last == chain_of(state).last_step
    return broker, state, last


def spoil(state: Path, name: str, beyond: int = -1) -> None:
    for path in state.glob(f"0*/{name}"):
        if int(path.parent.name) > beyond:
            path.write_bytes(b"")


def revision_of_a_start(broker: Broker, state: Path) -> int:
    process = life(broker, state)
    process.run()
    assert process.ready is not None
    return process.ready.revision


def under_each_revision(before: list[OutMessage], broker: Broker) -> None:
    """What was published before, and what was published since, under another revision: each coordinate once in both."""
    for messages in (before, broker.published[len(before) :]):
        assert len(once(messages)) == len(messages)


@pytest.mark.parametrize("damaged", [None, "optim.pt", "MANIFEST.json"])
@pytest.mark.parametrize("rebuild", [False, True])
def test_a_journal_that_lost_its_end_goes_on_only_under_a_revision_that_was_asked_for(tmp_path, damaged, rebuild):
    broker, state, last = journal_without_its_end(tmp_path)
    if damaged:
        spoil(state, damaged, beyond=last)
    before, files = list(broker.published), digest_directory(state)

    told = rf"ends with step {last}, .*`checkpoint revert {last}`, or start anew with `run --fresh`"
    with pytest.raises(ProgressError, match=told):
        life(broker, state, rebuild=rebuild).run()
    assert digest_directory(state) == files
    assert broker.published == before
    back = life(broker, state)
    revert(back.store, back.publisher, back.world.progress, "n", last, [], lambda: "another")
    back.publisher.close()
    back.store.close()
    process = life(broker, state, rebuild=rebuild)
    process.run()

    assert process.ready is not None
    assert (process.ready.revision, process.ready.generation.step) == (1, last)
    under_each_revision(before, broker)
    assert revision_of_a_start(broker, state) == 1


@pytest.mark.parametrize("left", ["some", "none older", "none whole"])
def test_a_journal_that_lost_its_end_may_begin_anew_and_be_killed_anywhere(tmp_path, left):
    for at in itertools.count(step=3):
        where = tmp_path / str(at)
        where.mkdir()
        broker, state, _ = journal_without_its_end(where, keep=2 if left == "none older" else 9)
        if left == "none whole":
            spoil(state, "optim.pt")
        before = list(broker.published)
        if left != "some":
            with pytest.raises(CheckpointError, match="`run --fresh`"):
                life(broker, state).run()
            with pytest.raises(ProgressError, match=r"under the same revision; .*`run --fresh`"):
                life(broker, state, rebuild=True).run()
        killed = life(broker, state, Fate(at), fresh=True)
        with contextlib.suppress(Crash):
            killed.begin()
        killed.publisher.close()
        killed.store.close()

        process = life(broker, state, fresh=True)
        process.run()

        assert process.ready is not None
        assert process.ready.revision == 1, at
        assert process.ready.generation.step == 0
        assert once(broker.published[len(before) :]) == once(before)
        under_each_revision(before, broker)
        assert revision_of_a_start(broker, state) == 1
        shutil.rmtree(where)
        if not killed.fate.dead:
            break
    assert at > 15


def test_everything_computed_again_from_the_journal_publishes_the_newest_record_once_more(tmp_path):
    reference, digests = never_stopped(tmp_path)
    broker, state = filled(), tmp_path / "state"
    life(broker, state).run()
    spoil(state, "optim.pt")

    process = life(broker, state, rebuild=True)
    engine = process.run()

    assert process.ready is not None
    assert process.ready.revision == 0
    (facts,) = repeated(process)
    assert facts["same_bytes"]
    assert out(broker) == reference
    assert engine.state().digests() == digests


def test_a_damaged_journal_is_refused_with_its_file(tmp_path):
    broker, state = filled(), tmp_path / "state"
    die_at_commit(broker, state, 4, "after")
    oldest = min((state / "journal").iterdir())
    data = oldest.read_bytes()
    oldest.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])

    with pytest.raises(ProgressError, match=f"{oldest.name}: record 0, at byte 0, is damaged"):
        life(broker, state).run()


def test_on_another_machine_the_copies_may_differ_and_that_is_said(tmp_path):
    broker, state = filled(records=40), tmp_path / "state"
    die_at_commit(broker, state, 4, "in the middle")

    process = life(broker, state, cpu="other")
    process.run()

    (facts,) = repeated(process)
    assert facts["same_bytes"] is False


def test_what_is_repeated_is_encoded_as_it_was_recorded(tmp_path):
    broker, state = filled(records=40), tmp_path / "state"
    die_at_commit(broker, state, 4, "before")
    asked = []
    process = life(broker, state)
    repeat = Repeater(process.publisher, lambda *told: (asked.append(told), TinyEncoder())[1])
    process.world = replace(process.world, repeat=repeat)
    process.terms = replace(process.terms, settings=replace(process.terms.settings, hash="another"))

    process.begin()
    process.publisher.close()
    process.store.close()

    assert asked == [(SETTINGS.hash, 0)]


def test_going_back_without_transactions_publishes_again_what_comes_after(tmp_path):
    reference, digests = never_stopped(tmp_path)
    broker, state = filled(), tmp_path / "state"
    life(broker, state).run()
    going_back = life(broker, state)
    step = going_back.store.steps()[1]
    revert(going_back.store, going_back.publisher, going_back.world.progress, "n", step, [], lambda: "another")
    going_back.publisher.close()
    going_back.store.close()

    process = life(broker, state)
    engine = process.run()

    assert process.ready.revision == 1
    assert chain_of(state).revision == 1
    assert len(broker.published) > len(reference[0])
    assert out(broker) == reference
    assert engine.state().digests() == digests


def test_what_a_branch_goes_on_from_is_out_and_is_not_repeated_under_its_revision(tmp_path):
    """Also where the generation at the branch is damaged, and what it stands on is computed again."""
    broker, state = filled(), tmp_path / "state"
    life(broker, state).run()
    published = list(broker.published)
    back = life(broker, state)
    step = max(back.store.steps())
    revert(back.store, back.publisher, back.world.progress, "n", step, [], lambda: "another")
    back.publisher.close()
    back.store.close()
    (state / f"{step:020d}" / "optim.pt").write_bytes(b"")

    process = life(broker, state)
    process.run()

    assert process.ready is not None
    assert process.ready.replayed_steps > 0
    assert repeated(process) == []
    assert broker.published == published


def test_with_transactions_nothing_is_published_again(tmp_path):
    broker, state = filled(records=40), tmp_path / "state"
    process = Process(broker, state, Fate(60), pace=NO_CHECKPOINTS)
    with pytest.raises(Crash):
        process.run()
    published = list(broker.published)

    again = Process(broker, state)
    ready = again.begin()
    again.store.close()

    assert ready.replayed_steps > 0
    assert broker.published == published
    assert repeated(again) == []


def test_a_disk_that_fails_ends_it_before_anything_is_published(tmp_path):
    class Full(Disk):
        full = False

        def sync_data(self, file):
            if self.full:
                raise OSError(28, "No space left on device")

    broker, disk = filled(), Full()
    process = life(broker, tmp_path / "state", disk=disk)
    process.begin()
    disk.full = True

    with pytest.raises(CheckpointNotWritten, match="No space left on device") as caught:
        process.daemon.run()
    process.store.close()
    assert caught.value.exit_code == 74
    assert broker.published == []


@pytest.mark.parametrize("refused_by", ["begin_session", "resolve_start", "topic_ids"])
def test_a_first_start_that_is_refused_is_as_if_it_had_never_been(tmp_path, monkeypatch, refused_by):
    """Also when its journal was open: the broker may refuse to be published to, or to tell of its topics."""
    reference, _ = never_stopped(tmp_path)
    broker, directory = filled(), tmp_path / "state"
    process = life(broker, directory)
    process.store.open()
    of = process.publisher if refused_by == "begin_session" else process.source
    ask = getattr(of, refused_by)

    def refuse(*asked):
        ask(*asked)
        raise NotAuthorised("grant it")

    with monkeypatch.context() as patch:
        patch.setattr(of, refused_by, refuse)
        with pytest.raises(NotAuthorised):
            process.begin()
    process.world.progress.close()
    process.store.leave()

    assert not directory.exists()
    life(broker, directory).run()
    assert out(broker) == reference
