import errno
import itertools
import math
import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
from fakes import PACE, Broker, Fate, FatedDisk, Process, message

from streamlstm.errors import CheckpointNotWritten, DataError, Temporary
from streamlstm.recovery.background import BackgroundWriter, Outcome, in_a_thread
from streamlstm.recovery.checkpoint import Keep
from streamlstm.recovery.progress import Steps, decode_record, read_chain
from streamlstm.service import daemon
from streamlstm.service.daemon import CheckpointSchedule
from streamlstm.transport.interfaces import Outputs


def filled(records: int) -> Broker:
    return Broker({"in": [[message(f"s{i % 3}", float(i)) for i in range(records)]]})


def steps_per_transaction(broker: Broker) -> list[int]:
    records = [decode_record(entry) for entry in broker.progress]
    return [len(record.steps) for record in records if isinstance(record, Steps)]


NO_CHECKPOINTS = replace(PACE, checkpoint_every_records=10**9, trim=False)


def test_steps_share_a_transaction_until_its_time_is_up(tmp_path):
    broker = filled(30)
    # A poll takes 10 ms and at most 3 records of the partition.
    Process(broker, tmp_path / "state", pace=replace(NO_CHECKPOINTS, commit_every_s=0.035)).run()

    assert steps_per_transaction(broker) == [5, 5]


def test_a_full_transaction_is_committed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "MAX_OUTPUT_MESSAGES", 6)
    broker = filled(30)
    Process(broker, tmp_path / "state", pace=replace(NO_CHECKPOINTS, commit_every_s=100.0)).run()

    assert steps_per_transaction(broker) == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("bound", ["MAX_OUTPUT_BYTES", "MAX_RANGES"])
def test_bytes_and_ranges_fill_a_transaction_too(tmp_path, monkeypatch, bound):
    monkeypatch.setattr(daemon, bound, 1)
    broker = filled(9)
    Process(broker, tmp_path / "state", pace=replace(NO_CHECKPOINTS, commit_every_s=100.0)).run()

    assert steps_per_transaction(broker) == [1, 1, 1]


def test_a_cut_without_a_record_is_a_step(tmp_path):
    broker = Broker({"in": [[None, None, None, message("a", 1.0)]]})
    Process(broker, tmp_path / "state", pace=NO_CHECKPOINTS).run()

    chain = read_chain(broker.progress, "n")
    assert [(r.start, r.end) for step in chain.after(0) for r in step.cut] == [(0, 3), (3, 4)]
    assert len(broker.published) == 1


def test_a_snapshot_is_taken_between_transactions_only(tmp_path):
    broker = filled(90)
    process = Process(broker, tmp_path / "state", pace=replace(PACE, commit_every_s=100.0, trim=False), keep=99)
    process.run()

    chain = read_chain(broker.progress, "n")
    ends = {(link, step) for link, step in chain.ends.items()}
    for step in process.store.steps()[1:]:
        progress = process.store.verify(step).provenance.progress
        assert progress is not None
        assert (progress.digest, step) in ends
    assert len(process.store.steps()) > 3


def test_the_chain_is_trimmed_below_the_oldest_generation_and_no_further(tmp_path):
    broker = filled(200)
    process = Process(broker, tmp_path / "state", keep=2)
    process.run()

    oldest = process.store.verify(process.store.steps()[0]).provenance.progress
    assert oldest is not None
    assert broker.progress[0].offset == oldest.offset > 0


def test_positions_are_told_to_lag_tools_after_the_commit(tmp_path):
    broker = filled(9)
    process = Process(broker, tmp_path / "state", pace=NO_CHECKPOINTS)
    process.run()

    assert process.source.group[-1][0].next_offset == 9


def test_a_stop_commits_what_is_open_and_leaves_a_checkpoint(tmp_path):
    broker = filled(9)
    process = Process(broker, tmp_path / "state", pace=replace(NO_CHECKPOINTS, commit_every_s=1e6))
    engine = process.run()

    assert len(broker.published) == 9
    assert process.store.steps()[-1] == engine.step_number
    assert process.watching.phases == ["starting", "running", "stopping"]
    assert process.journal.events("info")[-1] == "stopped"


def test_a_stop_with_nothing_new_writes_no_checkpoint(tmp_path):
    broker = filled(9)
    Process(broker, tmp_path / "state").run()
    process = Process(broker, tmp_path / "state")
    process.run()

    assert process.watching.checkpoints == []


def test_the_heartbeat_is_sent_every_turn(tmp_path):
    process = Process(filled(30), tmp_path / "state")
    process.run()

    assert process.watching.turns >= 10


class FailsWhile(FatedDisk):
    """While ``number`` is set, every file written fails with it, after the first generation."""

    def __init__(self) -> None:
        super().__init__(Fate())
        self.number: int | None = None
        self.attempts = 0

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        if self.number is not None:
            self.attempts += 1
            raise OSError(self.number, os.strerror(self.number))
        super().write(file, data)


def failing(tmp_path: Path, records: int, number: int, **pace: object) -> tuple[Process, FailsWhile]:
    disk = FailsWhile()
    process = Process(filled(records), tmp_path / "state", disk=disk, pace=replace(PACE, **pace))
    process.begin()
    disk.number = number
    return process, disk


def test_a_full_disk_costs_checkpoints_not_forecasts(tmp_path):
    process, disk = failing(tmp_path, 180, errno.ENOSPC)
    assert process.daemon is not None
    while len(process.publisher.broker.published) < 120:
        process.daemon.turn()
    assert disk.attempts >= 3
    assert [c.outcome for c in process.watching.checkpoints] == ["failed"] * disk.attempts
    assert "No space left on device" in process.watching.checkpoints[0].error
    assert process.store.steps() == [0]
    assert not list(process.store.directory.glob(".tmp-*"))

    disk.number = None  # somebody made room
    process.daemon.run()
    process.store.close()

    assert len(process.publisher.broker.published) == 180
    assert process.watching.checkpoints[-1].outcome == "written"
    assert process.journal.events("error") == ["checkpoint failed"] * disk.attempts


def test_a_disk_that_stays_full_ends_it_before_the_replay_grows_without_limit(tmp_path):
    process, _ = failing(tmp_path, 1000, errno.ENOSPC)
    assert process.daemon is not None
    with pytest.raises(CheckpointNotWritten, match="too many to replay") as caught:
        process.daemon.run()
    process.store.close()

    assert caught.value.exit_code == 74
    consumed = len(process.publisher.broker.published)
    assert 10 * PACE.checkpoint_every_records <= consumed < 12 * PACE.checkpoint_every_records
    # Started again it does not run further away: the next failure ends it at once.
    again = Process(process.publisher.broker, tmp_path / "state", disk=(disk := FailsWhile()))
    ready = again.begin()
    assert ready.replayed_records == consumed
    disk.number = errno.ENOSPC
    assert again.daemon is not None
    with pytest.raises(CheckpointNotWritten):
        again.daemon.run()
    assert len(process.publisher.broker.published) - consumed < PACE.checkpoint_every_records
    again.store.close()


class Slow(BackgroundWriter):
    """What is submitted is written when somebody has waited for it so long, in turns that wait."""

    def __init__(self, process: Process, takes_s: float) -> None:
        self._works: list[Callable[[], None]] = []
        super().__init__(process.store, Keep(3), start=self._works.append)
        self._clock, self._takes_s, self._left_s = process.clock, takes_s, takes_s

    def poll(self, timeout_s: float = 0.0) -> Outcome | None:
        if self.busy:
            self._clock.advance(max(timeout_s, 0.001))
            self._left_s -= timeout_s
        if self._works and self._left_s <= 0:
            self._works.pop()()
            self._left_s = self._takes_s
        return super().poll()


def test_a_checkpoint_that_never_ends_ends_it_before_the_replay_grows_without_limit(tmp_path):
    process = Process(filled(1000), tmp_path / "state")
    process.begin()
    assert process.daemon is not None
    process.daemon._writer = Slow(process, math.inf)
    with pytest.raises(CheckpointNotWritten, match=r"does not end: .* too many to replay") as caught:
        process.daemon.run()
    process.store.close()

    assert caught.value.exit_code == 74
    consumed = len(process.publisher.broker.published)
    assert 9 * PACE.checkpoint_every_records <= consumed < 12 * PACE.checkpoint_every_records
    assert process.watching.phases[-1] == "waiting"


def test_a_checkpoint_that_takes_its_time_is_waited_for_and_nothing_is_read_meanwhile(tmp_path):
    process = Process(filled(1000), tmp_path / "state")
    process.begin()
    assert process.daemon is not None
    process.daemon._writer = Slow(process, 0.9 * PACE.trouble_limit_s)
    most = 0
    while len(process.publisher.broker.published) < 1000:
        process.daemon.turn()
        most = max(most, process.daemon._schedule.since_durable)
    process.store.close()

    assert 9 * PACE.checkpoint_every_records <= most < 12 * PACE.checkpoint_every_records
    held = process.journal.events("warning").count("nothing is read until the checkpoint in flight ends")
    assert held >= 3
    assert process.journal.events("info").count("the checkpoint in flight ended") in (held - 1, held)
    assert process.watching.checkpoints


def test_the_first_checkpoint_after_a_long_replay_has_time_to_end():
    schedule = CheckpointSchedule(every_s=10, every_records=100, tried_s=0.0, since_tried=5000, since_durable=5000)
    schedule.tried(now_s=1.0)
    schedule.consumed(99)
    assert schedule.too_far()
    assert not schedule.hangs()
    schedule.consumed(1)
    assert schedule.hangs()


def test_a_disk_that_loses_data_is_not_asked_twice(tmp_path):
    process, disk = failing(tmp_path, 1000, errno.EIO)
    assert process.daemon is not None
    with pytest.raises(CheckpointNotWritten, match="Input/output error"):
        process.daemon.run()
    process.store.close()

    assert disk.attempts == 1
    assert process.store.steps() == [0]


def test_a_stop_whose_last_checkpoint_fails_says_so_with_its_exit_code(tmp_path):
    process, _ = failing(tmp_path, 9, errno.ENOSPC)
    assert process.daemon is not None
    with pytest.raises(CheckpointNotWritten):
        process.daemon.run()
    process.store.close()

    assert len(process.publisher.broker.published) == 9


def test_a_checkpoint_that_hangs_does_not_hold_up_the_end(tmp_path):
    process = Process(filled(9), tmp_path / "state", pace=replace(PACE, shutdown_timeout_s=0.5))
    process.begin()
    assert process.daemon is not None
    process.daemon._writer = BackgroundWriter(process.store, Keep(3), start=lambda _: None)
    process.daemon.run()
    process.store.close()

    assert process.journal.lines[-1] == ("warning", "stopped without a last checkpoint", {"steps_to_replay": 3})


def test_a_defect_in_the_writer_ends_the_process(tmp_path):
    process = Process(filled(60), tmp_path / "state")
    process.begin()

    def broken(state, provenance, beside, *, last):
        raise ZeroDivisionError

    process.store.write = broken
    assert process.daemon is not None
    with pytest.raises(ZeroDivisionError):
        process.daemon.run()
    process.store.close()


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path):
    process = Process(filled(200), tmp_path / "state", keep=9)
    process.begin()
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    assert process.daemon is not None
    process.daemon._writer = BackgroundWriter(process.store, Keep(9), start=waiting.put)
    while waiting.empty():
        process.daemon.turn()
    step = process.daemon._engine.step_number
    for _ in range(5):
        process.daemon.turn()

    assert process.daemon._engine.step_number == step + 5
    assert waiting.qsize() == 1, "at most one in flight"
    in_a_thread(waiting.get())
    while not process.watching.checkpoints:
        process.daemon.turn()
    assert process.watching.checkpoints[0].step == step
    process.store.close()


def test_a_checkpoint_that_ends_while_steps_are_open_does_not_begin_the_next_among_them(tmp_path):
    process = Process(filled(300), tmp_path / "state", pace=replace(PACE, commit_every_s=1e6, trim=False), keep=99)
    process.begin()
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    assert process.daemon is not None
    process.daemon._writer = BackgroundWriter(process.store, Keep(99), start=waiting.put)
    for _ in range(25):
        process.daemon.turn()
    assert process.daemon._open.reports
    waiting.get()()
    process.daemon.turn()
    while waiting.empty():
        process.daemon.turn()
    waiting.get()()

    chain = read_chain(process.publisher.broker.progress, "n")
    for step in process.store.steps()[1:]:
        progress = process.store.verify(step).provenance.progress
        assert progress is not None
        assert chain.ends_at(progress) == step
    process.store.close()


def test_bad_input_may_be_told_to_end_it(tmp_path):
    broker = Broker({"in": [[message("a", 1.0), b"broken"]]})
    process = Process(broker, tmp_path / "state", pace=replace(PACE, fail_on_rejected=True))

    with pytest.raises(DataError, match=r"in-0 offset 1 row 0: decode") as caught:
        process.run()
    assert caught.value.exit_code == 65
    assert "broken" not in str(caught.value)


def test_bad_input_is_published(tmp_path):
    broker = Broker({"in": [[message("a", 1.0), b"broken", message("a", 2.0)]]})
    Process(broker, tmp_path / "state").run()

    assert [m.value for m in broker.dead_letters] == [b"0@1"]
    assert len(broker.published) == 2


def be_away(process: Process, away: Iterator[bool]) -> None:
    """At each of its polls the broker is away for a second, or there."""
    poll = process.source.poll

    def sometimes(max_records, timeout_s):
        if next(away):
            process.clock.advance(1.0)
            raise Temporary("nobody there")
        return poll(max_records, timeout_s)

    process.source.poll = sometimes
    process.stop.wait = lambda _: False


def test_a_broker_that_comes_back_in_time_is_waited_for(tmp_path):
    process = Process(filled(30), tmp_path / "state")
    process.begin()
    be_away(process, itertools.chain([True] * 3, itertools.repeat(False)))
    assert process.daemon is not None
    process.daemon.run()
    process.store.close()

    assert len(process.publisher.broker.published) == 30
    assert process.journal.events("warning") == ["the broker is away; waiting"]
    assert "the broker is back" in process.journal.events("info")
    assert process.watching.phases[-4:] == ["running", "waiting", "running", "stopping"]


def test_each_absence_of_the_broker_is_timed_by_itself(tmp_path):
    process = Process(filled(30), tmp_path / "state")
    process.begin()
    be_away(process, itertools.cycle([True, True, True, False]))
    assert process.daemon is not None
    process.daemon.run()
    process.store.close()

    assert len(process.publisher.broker.published) == 30
    assert process.journal.events("info").count("the broker is back") > 1


def test_a_broker_that_stays_away_ends_it_with_a_restart(tmp_path):
    process = Process(filled(30), tmp_path / "state")
    process.begin()

    def never(max_records, timeout_s):
        process.clock.advance(1.0)
        raise Temporary("nobody there")

    process.source.poll = never
    process.stop.wait = lambda _: False
    assert process.daemon is not None
    with pytest.raises(Temporary, match="away for 5 s: nobody there") as caught:
        process.daemon.run()
    assert caught.value.exit_code == 75
    process.store.close()


def test_a_commit_that_failed_is_told_and_nothing_is_mended_in_place(tmp_path):
    broker = filled(30)
    process = Process(broker, tmp_path / "state")
    process.begin()
    commits = []

    def fails(outputs: Outputs) -> int:
        commits.append(outputs)
        raise Temporary("no answer")

    process.publisher.commit = fails
    assert process.daemon is not None
    with pytest.raises(Temporary):
        process.daemon.run()
    process.store.close()

    assert len(commits) == 1
    assert process.watching.failed_commits == ["no answer"]


def test_a_checkpoint_is_due_by_records_or_by_time_and_never_without_a_step():
    schedule = CheckpointSchedule(every_s=10, every_records=100, tried_s=0.0, durable_step=5)
    assert not schedule.due(step=5, now_s=1000.0)
    assert schedule.due(step=6, now_s=10.0)
    assert not schedule.due(step=6, now_s=9.0)
    schedule.consumed(100)
    assert schedule.due(step=6, now_s=0.0)
    schedule.tried(now_s=3.0)
    assert not schedule.due(step=6, now_s=12.0)
    schedule.consumed(40)
    schedule.kept(step=6)
    assert schedule.since_durable == 40
    assert schedule.due(step=7, now_s=13.0)
