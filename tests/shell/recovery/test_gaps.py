"""``source.on_gap: skip``: what retention deleted before it was read, or read again, is passed over, and recorded."""

import contextlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import PACE, Broker, Crash, Fate, Process, message

from streamlstm.errors import LogGap
from streamlstm.records.batch import Range
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.progress import Gap, decode_record, read_chain

KEEP_ALL = replace(PACE, trim=False)


def filled(records: int = 60, partitions: int = 1) -> Broker:
    logs: list[list[bytes | None]] = [[] for _ in range(partitions)]
    fill(logs, range(records))
    return Broker({"in": logs})


def fill(logs: list[list[bytes | None]], numbers) -> None:
    for i in numbers:
        logs[i % len(logs)].append(message(f"s{i % 3}", float(i * 7 % 31)))


def values(broker: Broker) -> list[bytes]:
    return [m.value or b"" for m in broker.published]


def offsets(broker: Broker, partition: int = 0) -> list[int]:
    told = [value.split(b"=")[0].split(b"@") for value in values(broker)]
    return [int(at) for place, at in told if place == b"in-%d" % partition]


def gaps(broker: Broker) -> list[Gap]:
    return [record for entry in broker.progress if isinstance(record := decode_record(entry), Gap)]


def crash_after(broker: Broker, state: Path, commits: int, **options) -> None:
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


def behind(tmp_path: Path, ahead: int = 5, partitions: int = 1) -> tuple[Broker, Path, int]:
    """A process that stopped cleanly; then its input went on, and retention took more than it had read."""
    broker, state = filled(partitions=partitions), tmp_path / "state"
    Process(broker, state, pace=KEEP_ALL).run()
    end = len(broker.inputs["in"][0])
    fill(broker.inputs["in"], range(60, 100))
    broker.beginning["in", 0] = end + ahead
    return broker, state, end


def test_without_the_option_it_is_refused_and_the_ways_out_are_named(tmp_path):
    broker, state, end = behind(tmp_path)

    with pytest.raises(LogGap) as caught:
        Process(broker, state, pace=KEEP_ALL).run()
    told = str(caught.value)
    assert f"offset {end} is needed, but retention has deleted all before {end + 5}" in told
    assert "source.on_gap: skip" in told
    assert "--fresh" in told
    assert caught.value.exit_code == 65
    assert caught.value.gaps == (Range("in", 0, end, end + 5),)


def test_what_was_deleted_unread_is_passed_over_recorded_said_and_counted(tmp_path):
    broker, state, end = behind(tmp_path)

    process = Process(broker, state, pace=KEEP_ALL, on_gap="skip")
    process.run()

    assert offsets(broker) == [*range(end), *range(end + 5, 100)]
    (gap,) = gaps(broker)
    assert gap.ranges == (Range("in", 0, end, end + 5),)
    assert gap.checkpoint == gap.after, "no recorded step lacks anything"
    assert process.watching.gaps == [Range("in", 0, end, end + 5)]
    ((_, _, facts),) = [line for line in process.journal.lines if line[0] == "error"]
    assert (facts["start"], facts["end"]) == (end, end + 5)


def test_only_the_partition_that_lacks_something_is_passed_over(tmp_path):
    broker, state, end = behind(tmp_path, partitions=2)
    Process(broker, state, pace=KEEP_ALL, on_gap="skip").run()

    assert offsets(broker, 0) == [*range(end), *range(end + 5, 50)]
    assert offsets(broker, 1) == list(range(50))


def test_the_same_gap_is_recorded_once(tmp_path):
    broker, state, _ = behind(tmp_path)
    for _ in range(3):
        process = Process(broker, state, pace=KEEP_ALL, on_gap="skip")
        process.begin()
        process.store.close()

    assert len(gaps(broker)) == 1


def test_after_it_a_start_without_the_option_goes_on(tmp_path):
    broker, state, end = behind(tmp_path)
    process = Process(broker, state, pace=KEEP_ALL, on_gap="skip")
    process.begin()
    process.store.close()

    Process(broker, state, pace=KEEP_ALL).run()

    assert offsets(broker)[end:] == list(range(end + 5, 100))


def replaying(tmp_path: Path, name: str = "state") -> tuple[Broker, Path, int]:
    """Steps are to be replayed, and retention took some of their input."""
    broker, state = filled(90), tmp_path / name
    crash_after(broker, state, 6, pace=replace(KEEP_ALL, checkpoint_every_records=20))
    store = open_store(state)
    made = store.verify(max(store.steps())).provenance
    at = made.positions[0].next_offset
    last = read_chain(broker.progress, "n").positions["in", 0]
    assert last > at + 3
    broker.beginning["in", 0] = at + 3
    return broker, state, at


def test_recorded_steps_are_replayed_without_what_is_gone_and_published_no_more(tmp_path):
    broker, state, at = replaying(tmp_path)
    published = values(broker)

    process = Process(broker, state, pace=KEEP_ALL, on_gap="skip")
    ready = process.begin()

    assert values(broker) == published
    (gap,) = gaps(broker)
    assert gap.ranges == (Range("in", 0, at, at + 3),)
    assert gap.checkpoint == ready.generation.step < gap.after
    assert ready.engine.records == read_chain(broker.progress, "n").positions["in", 0] - 3
    process.store.close()


def test_a_chain_trimmed_up_to_a_gap_in_recorded_steps_goes_on(tmp_path):
    """These read on behind the gap, and are gone from the chain: nobody can tell from the gap up to where."""
    broker, state, _ = replaying(tmp_path)
    Process(broker, state, pace=KEEP_ALL, on_gap="skip").run()
    kept = list(broker.progress)
    (first,) = [at for at, entry in enumerate(kept) if isinstance(decode_record(entry), Gap)]

    chain = read_chain(kept[first:], "n")

    assert chain.last_step == read_chain(kept, "n").last_step
    assert chain.positions == read_chain(kept, "n").positions


def test_two_resumes_over_the_same_gap_give_the_same_bits(tmp_path):
    ends = []
    for name, kills in (("a", 0), ("b", 1), ("c", 2)):
        broker, state, _ = replaying(tmp_path, name)
        for _ in range(kills):
            crash_after(broker, state, 3, pace=replace(KEEP_ALL, checkpoint_every_records=1000), on_gap="skip")
        engine = Process(broker, state, pace=KEEP_ALL, on_gap="skip").run()
        ends.append((engine.state().digests(), values(broker)))
        assert len(gaps(broker)) == 1

    assert ends[0] == ends[1] == ends[2]


def test_a_later_bad_generation_falls_back_across_the_gap_to_the_same_bits(tmp_path):
    broker, state, _ = replaying(tmp_path)
    checkpoint = max(open_store(state).steps())
    digests = Process(broker, state, pace=KEEP_ALL, on_gap="skip", keep=9).run().state().digests()
    newer = [step for step in open_store(state).steps() if step > checkpoint]
    assert newer
    for step in newer:
        (state / f"{step:020d}" / "model.pt").write_bytes(b"")

    process = Process(broker, state, pace=KEEP_ALL, keep=9)
    engine = process.run()

    assert process.ready is not None
    assert process.ready.generation.step == checkpoint
    assert engine.state().digests() == digests


def test_from_an_older_generation_more_is_missing_and_that_is_recorded_too(tmp_path):
    broker, state, at = replaying(tmp_path)
    steps = open_store(state).steps()
    process = Process(broker, state, pace=KEEP_ALL, on_gap="skip")
    process.begin()
    process.store.close()
    (state / f"{steps[-1]:020d}" / "model.pt").write_bytes(b"")
    older = open_store(state).verify(steps[-2]).provenance.positions[0].next_offset
    assert older < at

    with pytest.raises(LogGap, match=f"offset {older} is needed"):
        Process(broker, state, pace=KEEP_ALL).run()
    Process(broker, state, pace=KEEP_ALL, on_gap="skip").run()

    assert [gap.ranges for gap in gaps(broker)] == [(Range("in", 0, at, at + 3),), (Range("in", 0, older, at + 3),)]
    assert offsets(broker) == list(range(90))


def test_digests_are_compared_again_behind_the_gap(tmp_path):
    broker, state, _ = replaying(tmp_path)
    crash_after(broker, state, 4, pace=replace(KEEP_ALL, checkpoint_every_records=1000), on_gap="skip")
    broker.inputs["in"][0][read_chain(broker.progress, "n").positions["in", 0] - 1] = message("s0", 99.0)

    with pytest.raises(Exception, match="gives another output now"):
        Process(broker, state, pace=KEEP_ALL, on_gap="skip").run()


def overtaken(broker: Broker, process: Process, at: int, by: int) -> None:
    """Retention deletes under a running process once it stands at ``at``."""
    poll = process.source.poll

    def and_delete(max_records: int, timeout_s: float):
        if process.source.at["in", 0] >= at and ("in", 0) not in broker.beginning:
            broker.beginning["in", 0] = process.source.at["in", 0] + by
        return poll(max_records, timeout_s)

    process.source.poll = and_delete


def test_while_running_what_was_computed_is_committed_and_the_stream_goes_on_behind_the_gap(tmp_path):
    broker = filled()
    process = Process(broker, tmp_path / "state", pace=replace(KEEP_ALL, commit_every_s=0.1), on_gap="skip")
    overtaken(broker, process, at=20, by=7)
    process.run()

    (gap,) = gaps(broker)
    (ranged,) = gap.ranges
    assert ranged.end - ranged.start == 7
    assert offsets(broker) == [*range(ranged.start), *range(ranged.end, 60)]
    assert process.watching.gaps == [ranged]


def test_while_running_it_is_refused_without_the_option(tmp_path):
    broker = filled()
    process = Process(broker, tmp_path / "state", pace=KEEP_ALL)
    overtaken(broker, process, at=20, by=7)

    with pytest.raises(LogGap):
        process.run()
    assert not gaps(broker)


def test_a_log_that_was_cut_back_is_not_passed_over(tmp_path):
    broker = filled()
    process = Process(broker, tmp_path / "state", pace=KEEP_ALL, on_gap="skip")
    process.begin()

    def cut_back(max_records: int, timeout_s: float):
        raise LogGap("the log was cut back")

    process.source.poll = cut_back
    assert process.daemon is not None
    with pytest.raises(LogGap, match="cut back"):
        process.daemon.run()


def test_killed_at_any_call_over_a_gap_is_no_different(tmp_path):
    """Nested: before, in and after the record of the gap; and once more in the next start."""
    kept, before = tmp_path / "kept", filled(75)
    crash_after(before, kept, 6, pace=replace(KEEP_ALL, checkpoint_every_records=20))
    made = open_store(kept).verify(max(open_store(kept).steps())).provenance
    before.beginning["in", 0] = made.positions[0].next_offset + 2

    def copy() -> tuple[Broker, Path]:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(kept, tmp_path / "killed")
        log = Broker(before.inputs, beginning=dict(before.beginning), progress=list(before.progress))
        log.next_progress, log.epoch = before.next_progress, before.epoch
        return log, tmp_path / "killed"

    plain, state = copy()
    digests = Process(plain, state, pace=KEEP_ALL, on_gap="skip").run().state().digests()
    for at in itertools.count(step=2):
        broker, state = copy()
        fates = (Fate(at), Fate(40 - at if at < 40 else at // 3))
        for fate in fates:
            with contextlib.suppress(Crash):
                Process(broker, state, fate, pace=KEEP_ALL, on_gap="skip").run()
        engine = Process(broker, state, pace=KEEP_ALL, on_gap="skip").run()

        assert engine.state().digests() == digests, at
        assert values(broker) == values(plain), at
        assert len(gaps(broker)) == 1
        if not fates[0].dead:
            break
    assert at > 40
