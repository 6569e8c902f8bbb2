"""
What going back would come to, said before anything is done: what is learnt again, what is left behind, what is refused.

Reads only, so it can be asked for beside a running service, whose chain may grow meanwhile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamlstm.errors import CheckpointError, DataError, LogGap
from streamlstm.records.batch import Range
from streamlstm.recovery.branching import check_excluded, excluded_from, next_revision
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.exclusions import merge_ranges
from streamlstm.recovery.progress import Chain
from streamlstm.recovery.provenance import Generation
from streamlstm.recovery.standing import why_not_back
from streamlstm.transport.interfaces import Position

Place = tuple[str, int]
"""Topic and partition."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """
    So many ``steps`` after ``generation`` were learnt and published and would be once more, what earlier branches left
    behind included. The chain goes on to ``last_step`` now.

    ``offsets`` is how much of the input they consumed, ``excluded`` all ranges that are passed over from then on and
    ``passed_over`` how many of these offsets lie in them. ``beyond`` are the checkpoints that the next start puts
    aside. ``done``: the chain has gone back to exactly this already, and nobody has gone on since.
    """

    generation: Generation
    revision: int
    last_step: int
    steps: int
    offsets: int
    excluded: tuple[Range, ...]
    passed_over: int
    beyond: tuple[int, ...]
    done: bool


def look_ahead(
    store: CheckpointStore, chain: Chain, earliest: Sequence[Position], step: int, exclude: Sequence[Range]
) -> Outlook:
    """
    What :func:`~streamlstm.recovery.branching.revert` would come to, with an input that is retained from ``earliest``.

    Raises :class:`~streamlstm.errors.DataError` for what it would refuse, and
    :class:`~streamlstm.errors.LogGap` when the input is no longer retained from where the generation stands.
    """
    generation = store.verify(step)
    made = generation.provenance
    if chain.tip is None:
        raise DataError("the progress log is empty: there is nothing to go back from")
    refused = why_not_back(chain, store, generation)
    if refused is not None:
        raise CheckpointError(refused)
    check_excluded(exclude, made.positions, step)
    _check_retained(earliest, generation)

    excluded = merge_ranges([*excluded_from(chain, store, generation), *exclude])
    start = {(p.topic, p.partition): p.next_offset for p in made.positions}
    steps, end = _read_beyond(chain, start)
    return Outlook(
        generation=generation,
        revision=next_revision(chain, store),
        last_step=chain.last_step,
        steps=steps,
        offsets=sum(end[place] - start[place] for place in start),
        excluded=excluded,
        passed_over=sum(
            max(0, min(r.end, end[place]) - max(r.start, start[place]))
            for r in excluded
            if (place := (r.topic, r.partition)) in start
        ),
        beyond=tuple(other for other in store.steps() if other > step),
        done=_is_done(chain, generation, excluded),
    )


def _read_beyond(chain: Chain, start: Mapping[Place, int]) -> tuple[int, dict[Place, int]]:
    """
    How many of the steps that were ever recorded read beyond these positions, and up to which ones.

    Of offsets that were read under several revisions the newest counts.
    """
    steps, end = 0, dict(start)
    for recorded in chain.steps + [left for branch in reversed(chain.left) for left in branch]:
        further = {place: r.end for r in recorded.cut if r.end > end.get(place := (r.topic, r.partition), r.end)}
        steps += bool(further)
        end |= further
    return steps, {place: max(at, chain.positions.get(place, at)) for place, at in end.items()}


def _is_done(chain: Chain, generation: Generation, excluded: tuple[Range, ...]) -> bool:
    if not chain.branches or chain.branches[-1][0] != chain.tip:
        return False
    branch = chain.branches[-1][1]
    return branch.generation == generation.digest and branch.excluded == excluded


def _check_retained(earliest: Sequence[Position], generation: Generation) -> None:
    held = {(p.topic, p.partition): p.next_offset for p in earliest}
    gone = [
        f"{p.topic}-{p.partition}: offset {p.next_offset} is needed, but the log begins at {first}"
        for p in generation.provenance.positions
        if (first := held.get((p.topic, p.partition), p.next_offset)) > p.next_offset
    ]
    if gone:
        raise LogGap(
            f"the input is no longer retained from the checkpoint of step {generation.step} on: {'; '.join(gone)}; "
            "take a newer one"
        )
