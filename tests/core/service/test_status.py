import json

import msgspec
import numpy as np
import pytest
from reports import SECOND_NS, START_NS, make_report, make_update

from streamlstm.engine.report import EXPERTS
from streamlstm.records.batch import Range
from streamlstm.recovery.making import Census
from streamlstm.service.observer import Checkpointed, Committed, Resumed, StepTimings
from streamlstm.service.scores import WindowedScores
from streamlstm.service.status import About, Status
from streamlstm.transport.interfaces import Position


class Clocks:
    now_s = START_NS / SECOND_NS + 50
    monotonic_s = 1000.0


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def status(clocks: Clocks) -> Status:
    return Status(
        About("forecasts", "0.1.0", "abcd", "cpu"),
        WindowedScores(2, 10, seasonal=False),
        stall_after_s=120,
        clock_s=lambda: clocks.now_s,
        monotonic_s=lambda: clocks.monotonic_s,
    )


def commit(status: Status, records: int = 4) -> None:
    report = make_report(records=records, horizons=2, updates=[make_update(5)], step=3)
    status.observe_step(report, StepTimings(0, 0, 0), {})
    status.observe_commit(Committed([report], records, 0, 0, 0.0, 0.0, [Position("in", 0, records)]))


def resume(status: Status) -> None:
    """At step 2, from the checkpoint of step 1."""
    stands, went_on = Position("in", 0, 1), Position("in", 0, 3)
    status.observe_resume(Resumed("checkpoint", 2, 1, False, 0, {}, 1, 0.0, [went_on], [stands], Census(7, 30, 4, 12)))


def test_after_a_resume_it_says_what_holds_though_nothing_has_come_since(status: Status) -> None:
    resume(status)
    status.observe_lag({("in", 0): 0})
    said = json.loads(msgspec.json.encode(status.snapshot()))
    assert said["positions"] == [{"topic": "in", "partition": 0, "next_offset": 3, "lag_records": 0, "lag_s": 0.0}]
    assert (said["step"], said["update"]) == (2, 7)
    assert said["series"] == {"active": 30, "warming": 4, "stored": 12}
    assert said["checkpoint"]["outcome"] == "found"
    assert said["accuracy"][0]["samples"] == 0


def test_after_a_second_start_up_it_says_what_holds_and_counts_nothing_twice(status: Status) -> None:
    """What the session before computed without committing it, and where that session stood, is gone."""
    resume(status)
    commit(status)
    lost = make_report(horizons=2, error=np.ones((4, len(EXPERTS), 2)), updates=[make_update(8)], step=4)
    status.observe_step(lost, StepTimings(0, 0, 0), {})
    resume(status)
    said = json.loads(msgspec.json.encode(status.snapshot()))
    assert said["positions"] == [{"topic": "in", "partition": 0, "next_offset": 3, "lag_records": None, "lag_s": None}]
    assert (said["step"], said["update"], said["series"]["active"]) == (2, 7, 30)
    assert said["accuracy"][0]["samples"] == 0
    status.observe_commit(Committed([lost], 4, 0, 0, 0.0, 0.0, [Position("in", 0, 7)]))
    assert status.snapshot()["accuracy"][0]["samples"] == 4


def test_what_was_passed_over_lies_behind(status: Status) -> None:
    resume(status)
    status.observe_gap([Range("in", 0, 3, 9), Range("in", 1, 0, 2)])
    assert [(p["partition"], p["next_offset"]) for p in status.snapshot()["positions"]] == [(0, 9), (1, 2)]
    status.observe_gap([Range("in", 0, 3, 5)])
    assert status.snapshot()["positions"][0]["next_offset"] == 9


def test_it_is_healthy_while_the_loop_turns(status: Status, clocks: Clocks) -> None:
    clocks.monotonic_s += 120
    assert status.healthy(), "the first turn may take that long"
    clocks.monotonic_s += 1
    assert not status.healthy()
    status.observe_turn(clocks.monotonic_s)
    assert status.healthy()


def test_it_is_ready_only_while_running(status: Status) -> None:
    assert status.unready() == "starting"
    status.observe_phase("replaying")
    assert status.unready() == "replaying"
    status.observe_phase("running")
    assert status.unready() is None
    status.observe_phase("stopping")
    assert status.unready() == "stopping"


def test_it_is_not_ready_beyond_the_lag_it_is_asked_for(status: Status) -> None:
    status.observe_phase("running")
    assert status.unready(60) == "lag not known yet"
    status.observe_lag({("in", 0): 10})
    assert status.unready(60) == "inf s behind"
    commit(status)
    assert status.unready(60) is None
    assert status.unready(46) == "47 s behind"
    status.observe_lag({("in", 0): 0})
    assert status.unready(0) is None


def test_the_snapshot_is_json_and_holds_the_facts(status: Status) -> None:
    resume(status)
    status.observe_lag({("in", 0): 6, ("in", 1): 3})
    commit(status)
    status.observe_checkpoint(Checkpointed("failed", 3, 0, 0, 0, 0, 9.0, [], "disk full"))
    said = json.loads(msgspec.json.encode(status.snapshot()))
    assert (said["step"], said["update"], said["device"], said["config"]) == (3, 5, "cpu", "abcd")
    assert said["records"]["forecast"] == 4
    assert said["positions"] == [
        {"topic": "in", "partition": 0, "next_offset": 4, "lag_records": 6, "lag_s": 47.0},
        {"topic": "in", "partition": 1, "next_offset": None, "lag_records": 3, "lag_s": None},
    ]
    assert said["checkpoint"]["error"] == "disk full"
    assert said["resumed"]["source"] == "checkpoint"
    assert said["accuracy"][0] == {
        "horizon": "1", "samples": 0, "mae": None, "rmse": None, "mase": None, "skill": None,
    }  # fmt: skip


def test_a_fresh_process_has_a_snapshot_too(status: Status) -> None:
    said = json.loads(msgspec.json.encode(status.snapshot()))
    assert said["phase"] == "starting"
    assert said["checkpoint"] is None
    assert said["positions"] == []
