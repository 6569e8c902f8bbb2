from dataclasses import replace

import pytest
from fakes import Broker, MemoryPublisher, Process, message

from streamlstm.errors import StartOver, Temporary, Unavailable
from streamlstm.service import sessions
from streamlstm.service.daemon import Daemon
from streamlstm.service.scores import WindowedScores
from streamlstm.service.sessions import TRIES, run_sessions
from streamlstm.service.status import About, Status
from streamlstm.transport.interfaces import Outputs


class FailingPublisher(MemoryPublisher):
    """The commits in ``lost`` fail and are not visible; those in ``unknown`` are visible and fail all the same."""

    def __init__(self, process: Process, *, lost: set[int] = frozenset(), unknown: set[int] = frozenset()) -> None:
        super().__init__(process.source.broker, process.fate)
        self.lost, self.unknown = lost, unknown
        self.asked = 0

    def commit(self, outputs: Outputs) -> int:
        self.asked += 1
        if self.asked in self.lost:
            raise StartOver("lost")
        offset = super().commit(outputs)
        if self.asked in self.unknown:
            raise StartOver("the answer was lost")
        return offset


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(sessions, "PAUSE_S", 0.0)


def filled() -> Broker:
    return Broker({"in": [[message(f"s{i % 3}", float(i)) for i in range(60)]]})


def live(process: Process) -> None:
    def begin(*, first: bool) -> Daemon:
        process.begin()
        assert process.daemon is not None
        return process.daemon

    try:
        run_sessions(begin, process.stop, process.journal)
    finally:
        process.store.close()


@pytest.mark.parametrize("kind", ["lost", "unknown"])
@pytest.mark.parametrize("at", range(1, 8))
def test_a_failed_transaction_costs_a_start_up_and_nothing_else(tmp_path, kind, at):
    calm, troubled = filled(), filled()
    engine = Process(calm, tmp_path / "calm").run()
    process = Process(troubled, tmp_path / "troubled")
    process.world = replace(process.world, publisher=FailingPublisher(process, **{kind: {at}}))
    live(process)

    assert troubled.published == calm.published
    assert process.ready is not None
    assert process.ready.engine.state().digests() == engine.state().digests()
    assert process.journal.events("warning") == ["a transaction failed; starting over from what was committed"]


def test_after_a_start_up_in_the_same_process_its_status_says_where_that_one_stands(tmp_path):
    """The answer to the last commit is lost, and nothing comes after it."""
    calm = Process(filled(), tmp_path / "calm")
    calm.world = replace(calm.world, publisher=FailingPublisher(calm))
    calm.run()
    last = calm.world.publisher.asked

    process = Process(filled(), tmp_path / "troubled")
    publisher = FailingPublisher(process, unknown={last})
    process.world = replace(process.world, publisher=publisher)
    process.source.at_end = lambda: process.stop.request() if publisher.asked > last else None
    process.watching = status = Status(
        About("n", "0", "", "cpu"),
        WindowedScores(1, 10, seasonal=False),
        stall_after_s=120,
        clock_s=process.clock,
        monotonic_s=process.clock,
    )
    live(process)

    assert publisher.asked == last + 1, "the incarnation, and nothing after it"
    assert [p["next_offset"] for p in status.snapshot()["positions"]] == [60]
    assert status.snapshot()["step"] == process.ready.engine.step_number


def test_failures_in_a_row_end_the_process(tmp_path):
    process = Process(filled(), tmp_path)
    publisher = FailingPublisher(process, lost=set(range(100)))
    process.world = replace(process.world, publisher=publisher)

    with pytest.raises(StartOver):
        live(process)
    assert publisher.asked == TRIES


def test_a_broker_that_is_gone_when_starting_over_is_a_reason_to_be_restarted(tmp_path):
    """It was there before, so nobody has to look at an address."""

    class Gone(FailingPublisher):
        def begin_session(self) -> None:
            if self.asked:
                raise Unavailable("none answers")
            super().begin_session()

    process = Process(filled(), tmp_path)
    process.world = replace(process.world, publisher=Gone(process, lost={3}))
    with pytest.raises(Temporary, match="starting over after a failed transaction: none answers"):
        live(process)


def test_a_broker_that_was_never_there_is_unreachable(tmp_path):
    class Absent(MemoryPublisher):
        def begin_session(self) -> None:
            raise Unavailable("none answers")

    process = Process(filled(), tmp_path)
    process.world = replace(process.world, publisher=Absent(process.source.broker, process.fate))
    with pytest.raises(Unavailable):
        live(process)


def test_failures_with_commits_between_them_do_not_add_up(tmp_path):
    # An incarnation and at least one transaction lie between any two.
    process = Process(filled(), tmp_path)
    process.world = replace(process.world, publisher=FailingPublisher(process, lost={3, 6, 9, 12}))
    live(process)

    assert len(process.journal.events("warning")) == 4


def test_what_was_asked_of_the_start_is_not_asked_again_once_a_session_has_begun(tmp_path):
    process = Process(filled(), tmp_path)
    process.world = replace(process.world, publisher=FailingPublisher(process, lost={1, 4}))
    asked = []

    def begin(*, first: bool) -> Daemon:
        asked.append(first)
        process.begin()
        assert process.daemon is not None
        return process.daemon

    try:
        run_sessions(begin, process.stop, process.journal)
    finally:
        process.store.close()

    # The first start fails at its incarnation, the session of the second one at a transaction.
    assert asked == [True, True, False]
