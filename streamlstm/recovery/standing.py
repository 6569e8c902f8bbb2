"""Whether a generation stands on the chain, and what it means when our producer, or our start, is refused."""

from collections.abc import Sequence

from streamlstm.errors import CheckpointError, ProgressError, StreamlstmError, Superseded, Temporary
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.progress import Branch, Chain, Incarnation, Link, decode_record
from streamlstm.recovery.provenance import Generation, Provenance
from streamlstm.transport.interfaces import Fenced, ProgressLog


class Unusable(ProgressError):
    """The chain is ours, and cannot go on from this generation; a new beginning could."""


def why_not_on(chain: Chain, generation: Generation) -> str | None:
    """
    Why the chain does not go on from this generation, or ``None`` when it does.

    Raises :class:`~streamlstm.errors.ProgressError` when the chain is not this deployment's, and :class:`Unusable` when
    it has lost the record that the generation stands on: then an older one would not help.
    """
    made = generation.provenance
    here = f"the checkpoint of step {generation.step}"
    if chain.tip is None or chain.first is None:
        if made.progress is None:
            return None
        raise log_is_empty(f"{here} stands on its offset {made.progress.offset}")
    if generation.step == 0 and generation.digest in chain.zeros:
        return None
    _check_lineage(chain, generation)
    if made.progress is None:
        if chain.trimmed and made.lineage == chain.lineage:
            raise Unusable(f"the progress log was trimmed, but {here} needs it from its first record")
    elif made.progress.offset < chain.first.offset and made.lineage == chain.lineage:
        raise Unusable(
            f"the progress log begins at offset {chain.first.offset}, but {here} stands on offset "
            f"{made.progress.offset}, and what lay between is gone, trimmed by a process that had newer checkpoints or "
            "deleted by retention: bring a newer one back (`checkpoint list` names those that were put aside, and "
            "`checkpoint restore NAME` takes one), or start anew with `run --fresh`"
        )
    elif chain.ends_at(made.progress) != generation.step:
        return f"it is not in the progress chain, which ends with step {chain.last_step}"
    if generation.step == 0 and (chain.last_step or made.progress != chain.tip):
        return _why_not_zero(chain, made)
    return None


def log_is_empty(shown: str) -> ProgressError:
    """Nobody knows what was published under which revision; ``shown`` is what says that something was."""
    return ProgressError(
        f"the progress log is empty, but {shown}: is this the right cluster and topic, and with sink.delivery: "
        "idempotent, is the journal in checkpoint.url? Bring it back; if it is lost, start anew under another name "
        "with topics and a checkpoint.url of its own"
    )


def steps_on(chain: Chain, store: CheckpointStore) -> list[int]:
    """The generations in a store that the chain goes on from, as far as their JSON files tell."""
    found: list[int] = []
    for step in store.steps():
        try:
            if why_not_on(chain, store.header(step).generation) is None:
                found.append(step)
        except (CheckpointError, OSError, ProgressError):
            continue
    return found


def why_not_back(chain: Chain, store: CheckpointStore, generation: Generation) -> str | None:
    """Why the chain cannot go back to this generation, and to which ones it can; ``None`` when it can."""
    reason = why_not_on(chain, generation)
    if reason is None:
        return None
    others = ", ".join(map(str, steps_on(chain, store)))
    allowed = f"take one of {others}" if others else f"nor to any other in {store.name}"
    return f"the chain cannot go back to the checkpoint of step {generation.step}: {reason}; {allowed}"


def _check_lineage(chain: Chain, generation: Generation) -> None:
    made = generation.provenance
    if made.lineage in chain.lineages or (chain.trimmed and chain.branches):
        return
    if generation.step == 0 and made.revision > chain.revision:
        raise Unusable("`run --fresh` was cut short before the new beginning counted: run it again")
    raise ProgressError(
        f"the progress log belongs to run {chain.lineage} and the checkpoint of step {generation.step} to run "
        f"{made.lineage}: another host started this deployment first, or one of the two was brought back from elsewhere"
    )


def _why_not_zero(chain: Chain, made: Provenance) -> str:
    if made.lineage != chain.lineage:
        return f"the deployment began anew since, with revision {chain.revision}"
    raise Unusable(
        f"the progress log began with another generation 0 than the one in this state directory, run "
        f"{made.lineage}: another host started this deployment first"
    )


def judge_fenced(error: Fenced, progress: ProgressLog, tip: Link | None, incarnation: str) -> StreamlstmError:
    """
    What a refused producer means. If somebody else wrote since: :class:`~streamlstm.errors.Superseded`, not to be
    restarted, or two hosts would fence each other for ever. Otherwise our own transaction took too long, and a restart
    mends it. ``tip`` is the newest record that was ours or that we had read.
    """
    return _taken_over(progress, tip, incarnation) or error


def judge_refused(
    error: StreamlstmError, store: CheckpointStore, seen: Sequence[int], progress: ProgressLog, chain: Chain | None
) -> StreamlstmError:
    """
    What it means that a start has nothing to go on from, or misses what it found. An object store knows no lock: who is
    in it beside us may have written and pruned since we had ``seen`` its generations, and then it says nothing about
    what is there now.

    If somebody else wrote to the chain since we read it: :class:`~streamlstm.errors.Superseded`. If only the
    generations are others, or we have read no ``chain`` yet, a restart finds out. Otherwise it stays what it was.
    """
    if chain is not None and (superseded := _taken_over(progress, chain.tip, "")):
        return superseded
    if store.steps() != seen:
        return Temporary(f"another process has written or pruned in {store.name} since this one started: {error}")
    return error


def _taken_over(progress: ProgressLog, tip: Link | None, incarnation: str) -> Superseded | None:
    """
    Whether somebody else wrote after ``tip``, as far as the chain can be read.

    Steps count as well as an incarnation, which may have been trimmed while we slept.
    """
    try:
        entries = progress.read(tip.offset + 1 if tip else 0)
        records = [decode_record(entry) for entry in entries]
    except StreamlstmError:
        return None
    for record in records:
        if isinstance(record, Branch):
            return Superseded(
                f"meanwhile the deployment was made to go on from step {record.after} (revision {record.revision}); "
                "this process ends and must not be restarted by itself"
            )
        writer = record.id if isinstance(record, Incarnation) else record.incarnation
        if writer != incarnation:
            return Superseded(
                f"another process took this deployment over (incarnation {writer}); this one ends and must not be "
                "restarted"
            )
    return None
