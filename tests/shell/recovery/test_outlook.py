from dataclasses import replace
from pathlib import Path

import pytest
from fakes import PACE, Broker, Process, message

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
