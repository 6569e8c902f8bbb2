import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlstm.errors import ProgressError
from streamlstm.records.batch import Range
from streamlstm.recovery.progress import (
    Branch,
    Gap,
    Incarnation,
    Link,
    Origin,
    digest_record,
    encode_record,
    read_chain,
    record_steps,
)
from streamlstm.transport.interfaces import Position, ProgressEntry


class Writer:
    """Appends records to a chain, as a daemon would, with a gap after each."""

    def __init__(self) -> None:
        self.entries: list[ProgressEntry] = []
        self.tip: Link | None = None
        self.step = 0
        self.at = [0, 0]

    def put(self, value: bytes) -> None:
        offset = 2 * len(self.entries)
        self.entries.append(ProgressEntry(offset, value))
        self.tip = Link(offset, digest_record(value))

    def incarnation(self, ident: str, **changes) -> None:
        origin = Origin("gen0", (("in", 0, 0), ("in", 1, 0)), {"in": "id"}) if self.step == 0 else None
        facts = {
            "prev": self.tip.digest if self.tip else "",
            "lineage": "L",
            "name": "n",
            "id": ident,
            "after": self.step,
            "checkpoint": 0,
            "rebased": False,
            "config": "c",
            "learning": {},
            "fingerprint": {},
            "origin": origin,
        }
        self.put(encode_record(Incarnation(**{**facts, **changes})))

    def cut(self, partition: int, size: int) -> tuple[Range, ...]:
        start = self.at[partition]
        self.at[partition] += size
        return (Range("in", partition, start, start + size),)

    def steps(self, ident: str, *cuts: tuple[Range, ...], lineage: str = "L", revision: int = 0) -> None:
        record = record_steps(self.tip, lineage, ident, self.step + 1, [(cut, bytes(32)) for cut in cuts], revision)
        self.step += len(cuts)
        self.put(encode_record(record))


@pytest.fixture
def written() -> Writer:
    writer = Writer()
    writer.incarnation("a")
    writer.steps("a", writer.cut(0, 3), writer.cut(1, 2))
    writer.incarnation("b")
    writer.steps("b", writer.cut(1, 4))
    writer.steps("b", writer.cut(0, 1))
    return writer


def test_what_was_written_is_read_back(written):
    chain = read_chain(written.entries, "n")

    assert chain.tip == written.tip
    assert chain.last_step == 4
    assert chain.positions == {("in", 0): 4, ("in", 1): 6}
    assert [step.cut for step in chain.after(2)] == [(Range("in", 1, 2, 6),), (Range("in", 0, 3, 4),)]
    assert [step.incarnation for step in chain.after(0)] == ["a", "a", "b", "b"]
    assert chain.ends_at(Link(2, digest_record(written.entries[1].value))) == 2


@given(st.integers(1, 4))
def test_a_chain_whose_front_was_trimmed_is_still_verified(first):
    writer = Writer()
    writer.incarnation("a")
    writer.steps("a", writer.cut(0, 3))
    writer.steps("a", writer.cut(1, 3))
    writer.steps("a", writer.cut(0, 3))
    writer.incarnation("b")
    chain = read_chain(writer.entries[first:], "n")

    assert chain.trimmed
    assert chain.last_step == 3
    assert chain.tip == writer.tip


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_missing_record_is_detected(written, lost):
    del written.entries[lost]

    with pytest.raises(ProgressError, match="forked or torn"):
        read_chain(written.entries, "n")


@pytest.mark.parametrize("at", range(5))
def test_any_changed_byte_is_detected_by_the_next_record_or_by_its_own(written, at):
    value = written.entries[at].value
    found = 0
    for i in range(len(value)):
        damaged = list(written.entries)
        damaged[at] = damaged[at]._replace(value=value[:i] + bytes([value[i] ^ 1]) + value[i + 1 :])
        try:
            chain = read_chain(damaged, "n")
            # The newest record has none after it: its digest is what a checkpoint or the next record holds.
            found += chain.tip != written.tip
        except ProgressError:
            found += 1
    assert found == len(value)


@pytest.mark.parametrize("at", range(5))
def test_a_torn_record_is_detected(written, at):
    value = written.entries[at].value
    written.entries[at] = written.entries[at]._replace(value=value[: len(value) // 2])

    with pytest.raises(ProgressError, match=f"offset {2 * at}: a record that is not ours, torn"):
        read_chain(written.entries, "n")


def test_a_second_beginning_is_a_fork(written):
    written.incarnation("c", prev="")

    with pytest.raises(ProgressError, match="a second beginning"):
        read_chain(written.entries, "n")


def test_steps_of_a_superseded_process_are_refused(written):
    written.steps("a", written.cut(0, 1))

    with pytest.raises(ProgressError, match="superseded"):
        read_chain(written.entries, "n")


def test_a_range_must_start_where_the_last_one_ended(written):
    written.at[0] += 1
    written.steps("b", written.cut(0, 1))

    with pytest.raises(ProgressError, match="step 5 reads in-0 from 5 to 6, but it was read up to 4"):
        read_chain(written.entries, "n")


def test_step_numbers_have_no_gap(written):
    written.step += 1
    written.steps("b", written.cut(0, 1))

    with pytest.raises(ProgressError, match="step 6 follows step 4"):
        read_chain(written.entries, "n")


def test_another_deployments_topic_is_refused(written):
    with pytest.raises(ProgressError, match="belongs to the deployment 'n'"):
        read_chain(written.entries, "other")


def test_two_runs_in_one_topic_are_refused(written):
    written.incarnation("c", lineage="M")

    with pytest.raises(ProgressError, match="another run"):
        read_chain(written.entries, "n")


def test_a_newer_version_is_not_guessed_at(written):
    value = written.entries[-1].value.replace(b'"schema":1', b'"schema":2')
    written.entries[-1] = written.entries[-1]._replace(value=value)

    with pytest.raises(ProgressError, match="newer version"):
        read_chain(written.entries, "n")


def test_a_chain_begins_with_an_incarnation():
    writer = Writer()
    writer.steps("a", writer.cut(0, 1))

    with pytest.raises(ProgressError, match="begins without its first incarnation"):
        read_chain(writer.entries, "n")


def test_a_record_names_each_topic_once():
    cuts = [((Range("in", 0, at, at + 1),), bytes(32)) for at in range(1000)]

    value = encode_record(record_steps(None, "L", "a", 1, cuts))

    assert value.count(b'"in"') == 1
    assert len(value) < 100 * len(cuts)


def branch(written: Writer, after: int, positions: tuple[int, int], **changes) -> None:
    facts = {
        "prev": written.tip.digest if written.tip else "",
        "lineage": "M",
        "revision": 1,
        "name": "n",
        "after": after,
        "generation": "gen",
        "positions": tuple(("in", p, at) for p, at in enumerate(positions)),
        "topic_ids": {"in": "id"},
        "excluded": (),
    }
    written.put(encode_record(Branch(**{**facts, **changes})))
    written.step, written.at = after, list(positions)


def test_after_a_branch_the_chain_goes_on_from_an_older_step(written):
    left = written.tip
    branch(written, 2, (3, 2), excluded=(Range("in", 1, 3, 5),))
    written.incarnation("c", lineage="M", revision=1)
    written.steps("c", written.cut(1, 7), lineage="M", revision=1)

    chain = read_chain(written.entries, "n")

    assert (chain.lineage, chain.revision, chain.excluded) == ("M", 1, (Range("in", 1, 3, 5),))
    assert [(step.number, step.cut) for step in chain.after(1)] == [
        (2, (Range("in", 1, 0, 2),)),
        (3, (Range("in", 1, 2, 9),)),
    ]
    assert chain.positions == {("in", 0): 3, ("in", 1): 9}
    assert chain.ends_at(left) is None, "a state that stands on what was left behind is beyond the chain"
    assert chain.ends_at(Link(2, digest_record(written.entries[1].value))) == 2
    assert chain.lineages == {"L", "M"}


def test_a_branch_from_a_new_generation_0_begins_the_steps_anew(written):
    branch(written, 0, (7, 7), generation="new gen0")

    chain = read_chain(written.entries, "n")

    assert chain.last_step == 0
    assert not chain.steps
    assert chain.zeros == {"new gen0"}
    assert chain.origin is not None
    assert chain.origin.positions == (("in", 0, 7), ("in", 1, 7))


@pytest.mark.parametrize(
    "changes", [{"after": 5}, {"revision": -1}, {"revision": 0}, {"lineage": "L"}, {"name": "other"}, {"prev": "x"}]
)
def test_a_branch_that_does_not_follow_is_refused(written, changes):
    branch(written, **{"after": 2, **{k: v for k, v in changes.items() if k == "after"}}, positions=(3, 2),
           **{k: v for k, v in changes.items() if k != "after"})  # fmt: skip

    with pytest.raises(ProgressError):
        read_chain(written.entries, "n")


def test_a_branch_may_leave_revisions_out_that_the_chain_has_lost(written):
    branch(written, 2, (3, 2), revision=4)
    written.incarnation("c", lineage="M", revision=4)

    assert read_chain(written.entries, "n").revision == 4


@pytest.mark.parametrize("lineage", ["L", "M"])
def test_after_a_branch_nobody_writes_before_an_incarnation(written, lineage):
    branch(written, 2, (3, 2))
    written.steps("b", written.cut(0, 1), lineage=lineage, revision=int(lineage == "M"))

    with pytest.raises(ProgressError, match="superseded" if lineage == "M" else "another run"):
        read_chain(written.entries, "n")


def test_the_revision_is_known_though_the_branch_was_trimmed(written):
    branch(written, 2, (3, 2))
    written.incarnation("c", lineage="M", revision=1)
    written.steps("c", written.cut(1, 7), lineage="M", revision=1)

    chain = read_chain(written.entries[-1:], "n")

    assert (chain.lineage, chain.revision, chain.excluded) == ("M", 1, None)


def gap(written: Writer, checkpoint: int, *ranges: Range, **changes) -> None:
    facts = {
        "prev": written.tip.digest if written.tip else "",
        "lineage": "L",
        "revision": 0,
        "incarnation": "b",
        "after": written.step,
        "checkpoint": checkpoint,
        "ranges": ranges,
    }
    written.put(encode_record(Gap(**{**facts, **changes})))
    for r in ranges:
        written.at[r.partition] = max(written.at[r.partition], r.end)


def test_a_gap_is_passed_over_in_the_steps_before_it_and_by_those_after_it(written):
    gap(written, 2, Range("in", 1, 2, 4), Range("in", 0, 3, 9))
    written.steps("b", written.cut(0, 2), written.cut(1, 1))

    chain = read_chain(written.entries, "n")

    again = chain.to_replay(2)
    assert [(step.cut, step.digest is None) for step in again] == [
        ((Range("in", 1, 4, 6),), True),
        ((), True),
        ((Range("in", 0, 9, 11),), False),
        ((Range("in", 1, 6, 7),), False),
    ]
    assert chain.positions_after([Position("in", 0, 3), Position("in", 1, 2)], 2) == (
        Position("in", 0, 11),
        Position("in", 1, 7),
    )
    assert [step.digest is None for step in chain.to_replay(0)] == [False, False, True, True, False, False]


def test_a_state_computed_with_what_was_passed_over_is_beyond_the_chain(written):
    gap(written, 2, Range("in", 1, 2, 4))
    chain = read_chain(written.entries, "n")

    assert chain.ends_at(Link(6, digest_record(written.entries[3].value))) is None
    assert written.tip is not None
    assert chain.ends_at(written.tip) == 4
    assert chain.ends_at(Link(2, digest_record(written.entries[1].value))) == 2


@pytest.mark.parametrize(
    ("checkpoint", "ranged", "changes"),
    [
        (5, Range("in", 0, 4, 6), {}),
        (2, Range("in", 0, 5, 6), {}),
        (2, Range("in", 0, 4, 4), {}),
        (2, Range("in", 7, 4, 5), {}),
        (2, Range("in", 0, 4, 6), {"after": 3}),
        (2, Range("in", 0, 4, 6), {"incarnation": "a"}),
    ],
)
def test_a_gap_that_does_not_follow_is_refused(written, checkpoint, ranged, changes):
    assert written.step == 4
    assert written.at == [4, 6]
    written.at += [0] * 6
    gap(written, checkpoint, ranged, **changes)

    with pytest.raises(ProgressError):
        read_chain(written.entries, "n")
