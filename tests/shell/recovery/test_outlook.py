from dataclasses import replace
from pathlib import Path

import pytest
from fakes import PACE, SETTINGS, Broker, Process, make_settings, message

from streamlstm.errors import DataError, LogGap, ProgressError
from streamlstm.records.batch import Range
from streamlstm.recovery.branching import revert
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.outlook import Outlook, look_ahead
from streamlstm.recovery.progress import read_chain
from streamlstm.transport.interfaces import Position

RECORDS = 90


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    """What a run over some records left, and its checkpoints in ``state``."""
    made = Broker({"in": [[message(f"s{i % 3}", float(i * 7 % 31)) for i in range(RECORDS)]]})
    Process(made, tmp_path / "state", pace=replace(PACE, trim=False), keep=9).run()
    return made


def outlook(broker: Broker, tmp_path: Path, step: int, *exclude: Range, earliest: int = 0) -> Outlook:
    chain = read_chain(broker.progress, "n")
    return look_ahead(open_store(tmp_path / "state"), chain, [Position("in", 0, earliest)], step, exclude)


def stands_at(tmp_path: Path, step: int) -> int:
    return open_store(tmp_path / "state").verify(step).provenance.positions[0].next_offset


def second(tmp_path: Path) -> int:
    return open_store(tmp_path / "state").steps()[1]


def test_it_says_what_is_learnt_again_and_what_is_left_behind(broker, tmp_path):
    step = second(tmp_path)
    at = stands_at(tmp_path, step)
    seen = outlook(broker, tmp_path, step, Range("in", 0, at + 2, at + 5))
    assert (seen.offsets, seen.passed_over, seen.revision) == (RECORDS - at, 3, 1)
    assert seen.beyond == tuple(s for s in open_store(tmp_path / "state").steps() if s > step)
    assert not seen.done


def test_what_lies_ahead_of_the_chain_may_be_excluded_and_is_not_counted(broker, tmp_path):
    seen = outlook(broker, tmp_path, second(tmp_path), Range("in", 0, RECORDS - 1, RECORDS + 50))
    assert seen.passed_over == 1


def test_it_changes_nothing(broker, tmp_path):
    chain, steps = list(broker.progress), open_store(tmp_path / "state").steps()
    outlook(broker, tmp_path, second(tmp_path))
    assert broker.progress == chain
    assert open_store(tmp_path / "state").steps() == steps


def test_a_range_that_is_learnt_already_is_refused(broker, tmp_path):
    step = second(tmp_path)
    with pytest.raises(DataError, match="has learnt from in-0 up to"):
        outlook(broker, tmp_path, step, Range("in", 0, stands_at(tmp_path, step) - 1, 80))


def test_an_input_that_is_no_longer_retained_is_refused_with_both_offsets(broker, tmp_path):
    step = second(tmp_path)
    at = stands_at(tmp_path, step)
    with pytest.raises(LogGap, match=f"offset {at} is needed, but the log begins at {at + 1}"):
        outlook(broker, tmp_path, step, earliest=at + 1)
    outlook(broker, tmp_path, step, earliest=at)


def test_a_chain_that_was_trimmed_beyond_it_is_refused(broker, tmp_path):
    broker.progress = broker.progress[-2:]
    with pytest.raises(ProgressError, match="begins at offset"):
        outlook(broker, tmp_path, second(tmp_path))


def test_said_twice_it_is_done_already_until_somebody_went_on(broker, tmp_path):
    step = second(tmp_path)
    poison = Range("in", 0, stands_at(tmp_path, step) + 1, RECORDS - 3)
    process = Process(broker, tmp_path / "state")
    revert(process.store, process.publisher, process.world.progress, "n", step, [poison], process.world.new_id)
    process.store.close()

    assert outlook(broker, tmp_path, step, poison).done
    assert not outlook(broker, tmp_path, step, poison, Range("in", 0, RECORDS - 2, RECORDS)).done
    Process(broker, tmp_path / "state", keep=9).run()
    assert not outlook(broker, tmp_path, step, poison).done


def go_back(broker: Broker, tmp_path: Path, step: int, *exclude: Range) -> None:
    process = Process(broker, tmp_path / "state")
    revert(process.store, process.publisher, process.world.progress, "n", step, exclude, process.world.new_id)
    process.store.close()


def told(seen: Outlook) -> tuple[int, int]:
    return seen.steps, seen.offsets


def test_going_back_twice_tells_what_is_learnt_again_of_all_that_was_published(broker, tmp_path):
    first, step = open_store(tmp_path / "state").steps()[1:3]
    at = stands_at(tmp_path, step)
    further, same = outlook(broker, tmp_path, first), outlook(broker, tmp_path, step)
    go_back(broker, tmp_path, step)

    assert (
        told(outlook(broker, tmp_path, first))
        == told(further)
        == (further.last_step - first, RECORDS - stands_at(tmp_path, first))
    )
    again = outlook(broker, tmp_path, step, Range("in", 0, at + 2, at + 5))
    assert told(again) == told(same)
    assert (again.passed_over, again.revision, again.last_step) == (3, 2, step)
    assert told(outlook(broker, tmp_path, step)) == told(same), "also where it is done already"


def test_what_was_published_under_several_revisions_is_counted_once(broker, tmp_path):
    first, step = open_store(tmp_path / "state").steps()[1:3]
    further = outlook(broker, tmp_path, first)
    go_back(broker, tmp_path, step)
    process = Process(broker, tmp_path / "state", pace=replace(PACE, trim=False), keep=9)
    process.begin()
    assert process.daemon is not None
    for _ in range(9):
        process.daemon.turn()
    process.store.close()
    chain = read_chain(broker.progress, "n")
    assert step < chain.last_step < further.last_step, "some of it was learnt again"

    assert told(outlook(broker, tmp_path, first)) == told(further)


@pytest.mark.parametrize("made_anew", [False, True])
def test_offsets_of_a_topic_that_was_made_anew_are_not_those_of_before(broker, tmp_path, made_anew):
    """On the same topic a new beginning publishes again what came before it."""
    published = read_chain(broker.progress, "n").last_step
    if made_anew:
        broker.topic_ids["in"] = "id-2"
        broker.inputs["in"][0] = broker.inputs["in"][0][:20]
    identity = {**SETTINGS.identity, "model.hidden_size": 3}
    process = Process(broker, tmp_path / "state", settings=make_settings(identity, dict(SETTINGS.learning)), fresh=True)
    process.begin()
    process.store.close()

    assert told(outlook(broker, tmp_path, 0)) == ((0, 0) if made_anew else (published, RECORDS))
