"""
The chain goes on from another generation: an older one, if wanted without a poisoned range, or a new generation 0.

Only the branch record decides. Until it is committed nothing is changed; from then on every start finds the generations
beyond it left behind, and puts them aside as it does any other that the chain does not know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamlstm.errors import CheckpointError, DataError
from streamlstm.records.batch import Range
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.exclusions import merge_ranges, outside_ranges
from streamlstm.recovery.progress import Branch, Chain, Record, encode_record, read_chain
from streamlstm.recovery.provenance import Generation
from streamlstm.recovery.standing import judge_fenced, steps_on, why_not_back
from streamlstm.transport.interfaces import Fenced, Outputs, Position, ProgressEntry, ProgressLog, Publisher


@dataclass(frozen=True, slots=True)
class Reverted:
    """The branch that was committed, and the last step before it: those in between count no more."""

    branch: Branch
    last_step: int


def revert(
    store: CheckpointStore,
    publisher: Publisher,
    progress: ProgressLog,
    name: str,
    step: int,
    exclude: Sequence[Range],
    new_id: Callable[[], str],
) -> Reverted:
    """
    Have the chain of the deployment ``name`` go on from the generation of ``step``, without the ranges of ``exclude``.

    1. Lock the state directory. 2. Check every byte of the generation. 3. Take over the transactional id. 4. Read the
    chain to its end. 5. Check that it goes on from the generation, and the ranges. 6. Commit the branch.

    Raises :class:`~streamlstm.errors.DataError` for a range that the generation has learnt from, be it one that a lost
    branch excluded, or that is of no partition it knows, and what :func:`~streamlstm.recovery.resume.resume` does for a
    chain or a store that cannot be used. The caller closes the store.
    """
    store.open()  # 1
    generation = store.verify(step)  # 2
    publisher.begin_session()  # 3
    chain = read_chain(progress.read(), name)  # 4
    if chain.tip is None:
        raise DataError(f"the progress log of {name!r} is empty: there is nothing to go back from")
    refused = why_not_back(chain, store, generation)  # 5
    if refused is not None:
        raise CheckpointError(refused)
    check_excluded(exclude, generation.provenance.positions, step)
    revision, known = next_revision(chain, store), excluded_from(chain, store, generation)
    branch = describe_branch(chain, generation, name, new_id(), revision, merge_ranges([*known, *exclude]))
    commit_record(publisher, progress, chain, branch, "")  # 6
    return Reverted(branch, chain.last_step)


class NewestBranch(NamedTuple):
    """The highest revision that was ever given, what was excluded under it, and of which topics."""

    revision: int
    excluded: tuple[Range, ...]
    topic_ids: Mapping[str, str]

    def excluded_of(self, topic_ids: Mapping[str, str]) -> tuple[Range, ...]:
        """What was excluded of topics that still are the same ones."""
        return tuple(r for r in self.excluded if self.topic_ids.get(r.topic) == topic_ids.get(r.topic))


def newest_branch(chain: Chain, store: CheckpointStore) -> NewestBranch:
    """As far as anything tells: states remember a branch that the chain has lost with its end, or trimmed away."""
    newest = NewestBranch(chain.revision, (), {})
    if chain.branches:
        branch = chain.branches[-1][1]
        newest = NewestBranch(chain.revision, branch.excluded, branch.topic_ids)
    for step in filter(None, reversed(store.steps())):
        try:
            made = store.header(step).generation.provenance
        except (CheckpointError, OSError):
            continue
        if made.revision > newest.revision or (made.revision == newest.revision and not newest.topic_ids):
            newest = NewestBranch(made.revision, made.excluded, made.topic_ids)
    return newest


def next_revision(chain: Chain, store: CheckpointStore) -> int:
    """Under which nothing was published yet."""
    return newest_branch(chain, store).revision + 1


def excluded_from(chain: Chain, store: CheckpointStore, generation: Generation) -> tuple[Range, ...]:
    """
    What is passed over when the chain goes on from this generation: what it says, and what a branch that it has lost
    excluded.

    Raises :class:`~streamlstm.errors.DataError` when the generation has learnt from the latter, with one that has not.
    """
    here, lost = _excluded(chain, store, generation)
    if learnt := _learnt(lost, generation):
        told = ", ".join(f"{r.topic}:{r.partition}:{r.start}-{r.end}" for r in learnt)
        way = way_on(chain, store)
        older = f"go back to an older one with `streamlstm checkpoint revert {way}`" if way is not None else None
        raise DataError(
            f"{told} was excluded by a `revert` that the progress log has lost, and the checkpoint of step "
            f"{generation.step} has learnt from it: {older or 'none is older, so start anew with `run --fresh`'}"
        )
    return merge_ranges([*here, *lost])


def way_on(chain: Chain, store: CheckpointStore) -> int | None:
    """The newest generation that stands on the chain and has learnt from nothing that was ever excluded."""
    for step in reversed(steps_on(chain, store)):
        generation = store.header(step).generation
        if not _learnt(_excluded(chain, store, generation)[1], generation):
            return step
    return None


def _excluded(
    chain: Chain, store: CheckpointStore, generation: Generation
) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """What the chain excludes, and what only a branch did that it has lost."""
    here, newest = chain.excluded_after(generation.provenance.excluded), newest_branch(chain, store)
    if newest.revision == chain.revision:
        return here, ()
    return here, outside_ranges(newest.excluded_of(generation.provenance.topic_ids), here)


def _learnt(ranges: Sequence[Range], generation: Generation) -> list[Range]:
    at = {(p.topic, p.partition): p.next_offset for p in generation.provenance.positions}
    return [r for r in ranges if r.start < at.get((r.topic, r.partition), 0)]


def describe_branch(
    chain: Chain, generation: Generation, name: str, lineage: str, revision: int, excluded: tuple[Range, ...]
) -> Branch:
    """The record that has the chain go on from this generation."""
    made = generation.provenance
    return Branch(
        prev=chain.tip.digest if chain.tip else "",
        lineage=lineage,
        revision=revision,
        name=name,
        after=generation.step,
        generation=generation.digest,
        positions=tuple((p.topic, p.partition, p.next_offset) for p in made.positions),
        topic_ids=dict(made.topic_ids),
        excluded=excluded,
    )


def commit_record(
    publisher: Publisher, progress: ProgressLog, chain: Chain, record: Record, incarnation: str
) -> ProgressEntry:
    """Commit it, as the chain's newest record. A :class:`Fenced` publisher is judged as everywhere."""
    value = encode_record(record)
    try:
        offset = publisher.commit(Outputs([], [], value))
    except Fenced as error:
        raise judge_fenced(error, progress, chain.tip, incarnation) from error
    return ProgressEntry(offset, value)


def way_back(store: CheckpointStore, ends: Mapping[tuple[str, int], int]) -> str:
    """What to do about a log that is what it was up to these offsets only: the newest generation that saw no more."""
    for step in reversed(store.steps()):
        try:
            positions = store.header(step).generation.provenance.positions
        except CheckpointError:
            continue
        if all(p.next_offset <= ends.get((p.topic, p.partition), p.next_offset) for p in positions):
            return f"go back to before it with `streamlstm checkpoint revert {step}`, and start again"
    return "no checkpoint is as old as that, so start anew with `run --fresh`"


def check_excluded(ranges: Sequence[Range], positions: Sequence[Position], step: int) -> None:
    """
    Refuse what cannot be excluded from a state at these positions.

    >>> check_excluded([Range("t", 0, 3, 9)], [Position("t", 0, 5)], 7)
    Traceback (most recent call last):
    ...
    streamlstm.errors.DataError: t:0:3-9 cannot be excluded: the checkpoint of step 7 has learnt from t-0 up to 5, ...
    """
    at = {(p.topic, p.partition): p.next_offset for p in positions}
    for r in ranges:
        told = f"{r.topic}:{r.partition}:{r.start}-{r.end} cannot be excluded"
        known = at.get((r.topic, r.partition))
        if known is None:
            raise DataError(f"{told}: {r.topic}-{r.partition} is not among the input of the checkpoint of step {step}")
        if r.start < 0 or r.end <= r.start:
            raise DataError(
                f"{told}: the range is empty; write topic:partition:from-to, without the offset `to` itself"
            )
        if r.start < known:
            raise DataError(
                f"{told}: the checkpoint of step {step} has learnt from {r.topic}-{r.partition} up to {known}, so go "
                "back to an older one"
            )
