"""
Start-up: from a directory, a progress log and an input log to an engine that goes on as if it had never stopped.

The order is a law, and is numbered in :func:`resume`. Each part may be cut by a kill anywhere: the next start does the
same again and ends in the same state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from streamlstm.config.keys import changed, hash_values, tell_changes
from streamlstm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LogGap,
    ProgressError,
    StreamlstmError,
    Temporary,
    TopicChanged,
)
from streamlstm.records.batch import Cut, Messages, Range, RecordBatch
from streamlstm.recovery.branching import (
    commit_record,
    describe_branch,
    excluded_from,
    newest_branch,
    next_revision,
    way_on,
)
from streamlstm.recovery.checkpoint import CheckpointStore, Refused
from streamlstm.recovery.fingerprint import Fingerprint, compare_fingerprints
from streamlstm.recovery.generations import Loaded
from streamlstm.recovery.joining import Computed, compute_together, join_steps
from streamlstm.recovery.making import EngineMaker, Steppable
from streamlstm.recovery.manifest import NewerSchema
from streamlstm.recovery.progress import (
    Chain,
    Gap,
    Incarnation,
    Link,
    Origin,
    Record,
    RecordedStep,
    read_chain,
)
from streamlstm.recovery.provenance import Generation, Provenance, Settings
from streamlstm.recovery.repetition import Repeat, Repeated, Repetition
from streamlstm.recovery.segments import Segments
from streamlstm.recovery.standing import Unusable, judge_refused, log_is_empty, steps_on, why_not_on
from streamlstm.transport.interfaces import LiveSource, Position, ProgressLog, Publisher

Decode = Callable[[Messages], RecordBatch]

_PLACE_OF_THE_CHAIN = frozenset({"sink.delivery", "sink.progress.topic"})

_WAYS_OUT = (
    "bring a copy back, take one that was put aside (`checkpoint list` names them, and `checkpoint restore NAME` takes "
    "one), have everything computed again by `run --rebuild-from-log` if the progress log was never trimmed, or start "
    "anew with `run --fresh`"
)
_WAYS_OUT_OF_A_LOST_END = (
    "the progress log has lost its end: bring that or an older checkpoint back, or start anew with `run --fresh`"
)


@dataclass(frozen=True, slots=True)
class World:
    """
    Whom start-up works with: the store, the input, the commit, the chain, and the process's clock and dice.

    ``repeat`` is there for a publisher whose commits are not all or nothing.
    """

    store: CheckpointStore
    source: LiveSource
    publisher: Publisher
    progress: ProgressLog
    decode: Decode
    maker: EngineMaker
    monotonic_s: Callable[[], float]
    wall_s: Callable[[], float]
    new_id: Callable[[], str]
    repeat: Repeat | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """
    What the configuration and the operator say about starting. ``read_timeout_s`` bounds the wait for one recorded cut.

    ``fresh``: where a start would be refused for good, begin anew instead. ``rebuild``: where no generation can be
    used, compute everything again from the log.
    """

    settings: Settings
    start: str
    fingerprint: Fingerprint
    on_mismatch: Literal["rebase", "fail"]
    read_timeout_s: float
    on_gap: Literal["fail", "skip"] = "fail"
    fresh: bool = False
    rebuild: bool = False


class Witness(Protocol):
    """Told what start-up finds, when it finds it: a replay may take long. Never raises."""

    def found_bad(self, refused: Refused, moved_to: str) -> None:
        """A generation cannot be used and was put aside."""
        ...

    def left_behind(self, refused: Refused, moved_to: str) -> None:
        """The chain went back from a generation, which was put aside."""
        ...

    def goes_back(self, last_step: int, step: int, revision: int) -> None:
        """The chain ends with ``last_step``, and had more; it goes on from ``step`` under this revision."""
        ...

    def begins_anew(self, why: str, revision: int, moved_to: Sequence[str]) -> None:
        """A new generation 0 counts from here on, and the old ones were put aside."""
        ...

    def rebuilds(self, why: str, steps: int) -> None:
        """Generation 0 was made again, and all recorded steps are to be computed again."""
        ...

    def passes_over(self, ranges: Sequence[Range]) -> None:
        """Offsets that retention deleted are passed over."""
        ...

    def rebases(self, differences: Sequence[str], steps: int) -> None:
        """Recorded steps are replayed with other bits than they were made with."""
        ...

    def replayed(self, step: int, last: int) -> None:
        """One recorded step was computed again."""
        ...

    def repeated(self, repeated: Repeated) -> None:
        """The outputs of the newest transaction were published again."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """
    Everything is as it was: the engine is after step ``last_step`` and the source at ``positions``.

    ``generation`` is the newest that is durable, ``refused`` were newer and bad, not what the chain went back from.
    ``tip`` is the chain's newest record, our own incarnation. ``replayed_records`` were consumed since ``generation``.
    ``excluded`` ranges are passed over.
    ``differences`` is why bits are not those of the processes before, in words, whether or not anything was replayed.
    """

    engine: Steppable
    generation: Generation
    lineage: str
    revision: int
    excluded: tuple[Range, ...]
    incarnation: str
    tip: Link
    positions: tuple[Position, ...]
    source: Literal["fresh", "checkpoint", "fallback"]
    refused: tuple[Refused, ...]
    replayed_steps: int
    replayed_records: int
    rebased: bool
    differences: tuple[str, ...]
    phases_s: Mapping[str, float]


@dataclass(slots=True)
class _Laps:
    """Seconds by phase."""

    monotonic_s: Callable[[], float]
    spent: dict[str, float] = field(default_factory=dict[str, float])

    def lap(self, phase: str, began: float) -> float:
        now = self.monotonic_s()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - began
        return now


class _Found(NamedTuple):
    """
    The newest generation to go on from, and the newer ones that are bad; or why there is none. ``lost``: one of those
    was made from more of the chain than there is.
    """

    loaded: Loaded | None
    refused: Sequence[Refused] = ()
    refusal: StreamlstmError | None = None
    lost: bool = False


def resume(world: World, terms: Terms, witness: Witness) -> Ready:
    """
    Bring the deployment back to where its last committed transaction left it.

    1.  Lock the state directory, and sweep up what a killed process left in it.
    2.  Find the newest generation that is whole, and check that its layout is ours and it is of this configuration.
    3.  Take over the transactional id: whoever published under it until now is fenced.
    4.  Read the progress chain to its end; nobody else can extend it any more. A generation that the chain does not
        know is put aside, and the next older one taken. If it shows that the chain has lost its end, a branch from that
        one says so first: what the lost transactions published is published again under the next revision. Without
        transactions that is refused. So is that there is none, unless it is the doing of another process in the same
        object store.
    5.  Check topic ids, partition count and retention.
    6.  On a first run, or while there is no step and the configuration changed: make generation 0 durable. Likewise
        where a refused start is to begin anew, which a branch then records, or to be rebuilt from the log.
    7.  Write the incarnation.
    8.  Compare fingerprints: the checkpoint's, and those of the incarnations whose steps are to be replayed. Record
        what retention has deleted, if it is to be passed over.
    9.  Replay: the recorded cuts once more, each under the learning values it was recorded with, nothing published,
        digests compared. Only without transactions, the newest record's outputs are published again, for they may not
        be out.
    10. Go live: the source stands where the last recorded cut ended.

    Raises the errors of :mod:`streamlstm.errors`, each with one line for the operator.
    """
    laps = _Laps(world.monotonic_s)
    began = world.monotonic_s()
    world.store.open()  # 1
    seen = world.store.steps()
    found = _find(world, terms, seen, {})  # 2
    if found.loaded is not None:
        _check_name(found.loaded.generation, world.store.name, terms.settings.name)
        if found.loaded.generation.step > 0:
            _check_identity(found.loaded.generation, terms.settings, fresh=terms.fresh)
    began = laps.lap("load", began)

    world.publisher.begin_session()  # 3
    found, chain = _read_progress(world, terms, seen, found)  # 4
    if found.loaded is not None:
        _leave_behind(world, terms, seen, found, chain, witness)
    began = laps.lap("progress", began)

    found = _check(world, terms, found, chain)  # 5
    begins = found.loaded is None and not terms.rebuild
    loaded, rebuilt = _prepare(world, terms, found, chain, witness)  # 6
    generation, segments = loaded.generation, Segments(world.maker, chain, loaded)
    refused, refusal = tuple(bad for bad in found.refused if not bad.left), found.refusal
    del loaded, found  # the engine will have its own copy
    excluded = chain.excluded_after(generation.provenance.excluded)
    pending = _steps_to_replay(chain, generation, terms.settings)
    lost = _lost(world.source, chain, generation)
    if lost and (rebuilt or terms.on_gap == "fail"):
        raise _gone(lost)
    makers = _fingerprints(chain, generation, pending)
    unlike = _differences(makers, terms.fingerprint)
    differences = unlike if pending else []

    rebases = bool(differences) and terms.on_mismatch == "rebase"
    ident = world.new_id()
    _write_incarnation(world, terms, generation, chain, ident, rebased=rebases, rebuilt=rebuilt)  # 7
    if rebuilt:
        _put_aside_all_but_zero(world.store)
        witness.rebuilds(str(refusal), len(pending))
    if differences:  # 8
        if terms.on_mismatch == "fail":
            raise ConfigError(
                f"checkpoint.on_mismatch: fail: {len(pending)} steps would be replayed on another machine or other "
                f"libraries: {'; '.join(differences)}; run it there, or set rebase to go on with other bits"
            )
        witness.rebases(differences, len(pending))
    if lost:
        _pass_over(world, terms, generation, chain, ident, lost)
        witness.passes_over(lost)
    began = laps.lap("load", began)

    engine, records = _replay(
        world, terms, witness, segments, chain, generation, excluded, compare=not differences
    )  # 9
    positions = chain.positions_after(generation.provenance.positions, generation.step)
    world.source.seek(positions)  # 10
    laps.lap("replay", began)
    assert chain.tip is not None
    return Ready(
        engine=engine,
        generation=generation,
        lineage=chain.lineage or generation.provenance.lineage,
        revision=chain.revision,
        excluded=excluded,
        incarnation=ident,
        tip=chain.tip,
        positions=positions,
        source="fresh" if begins else "fallback" if refused or rebuilt else "checkpoint",
        refused=refused,
        replayed_steps=len(pending),
        replayed_records=records,
        rebased=bool(differences),
        differences=tuple(unlike),
        phases_s=laps.spent,
    )


def _find(
    world: World,
    terms: Terms,
    seen: Sequence[int],
    beyond: Mapping[int, Refused],
    chain: Chain | None = None,
    *,
    lost: bool = False,
) -> _Found:
    """The newest generation that is whole and not ``beyond``. None being good is refused, if it cannot be mended."""
    try:
        return _Found(*world.store.newest(beyond, seen))
    except CheckpointError as error:
        if isinstance(error.__cause__, NewerSchema):
            raise
        mended = terms.fresh or terms.rebuild
        told = error if mended else CheckpointError(f"{error}; {_WAYS_OUT_OF_A_LOST_END if lost else _WAYS_OUT}")
        return _Found(None, (), _refuse(world, seen, chain, told, mended=mended))


def _refuse(
    world: World, seen: Sequence[int], chain: Chain | None, error: StreamlstmError, *, mended: bool
) -> StreamlstmError:
    """Raise what there being nothing to go on from means; return it where it is for good, and to be ``mended``."""
    judged = judge_refused(error, world.store, seen, world.progress, chain)
    if judged is not error:
        raise judged from error
    if not mended:
        raise error
    return error


def _read_progress(world: World, terms: Terms, seen: Sequence[int], found: _Found) -> tuple[_Found, Chain]:
    """The chain, and the newest generation that stands on it. Where there is none, the chain from its first record."""
    if found.loaded is None:
        return _read_without_generation(world, terms, seen, found)
    name = terms.settings.name
    link = found.loaded.generation.provenance.progress
    chain = read_chain(world.progress.read(link.offset if link else 0), name)
    if link is not None and (chain.first != link or chain.ends_at(link) is None):
        # What the newest generation stands on is gone, or left behind by a branch: an older one may need more of it.
        chain = read_chain(world.progress.read(), name)
    beyond: dict[int, Refused] = {}
    lost = False
    while found.loaded is not None:
        unused = _judge(world, terms, seen, chain, found.loaded.generation)
        if unused is None:
            break
        lost = lost or _shows_more(world.store, chain, [unused.step])
        beyond[unused.step] = unused
        found = _find(world, terms, seen, beyond, chain, lost=lost)
    newer = (step for step in seen if found.loaded is None or step > found.loaded.generation.step)
    lost = lost or _shows_more(world.store, chain, [step for step in newer if step not in beyond])
    if lost and found.loaded is not None:
        try:
            _check_lost_end(world, chain, seen, found.loaded.generation)
        except DataError as error:
            found = _Found(None, (), _refuse(world, seen, chain, error, mended=terms.fresh))
    if found.loaded is None and chain.trimmed:  # perhaps it was only not read from its first record
        chain = read_chain(world.progress.read(), name)
    return found._replace(lost=lost), chain


def _read_without_generation(world: World, terms: Terms, seen: Sequence[int], found: _Found) -> tuple[_Found, Chain]:
    """Raises what it means that there is none, or that none is whole, if it is not to be mended."""
    chain = read_chain(world.progress.read(), terms.settings.name)
    if chain.tip is None and any(seen):
        raise _refuse(world, seen, chain, log_is_empty(f"{world.store.name} has checkpoints"), mended=False)
    if chain.tip is None or found.refusal is not None:
        return found._replace(lost=_shows_more(world.store, chain, seen)), chain
    mended = terms.fresh or terms.rebuild
    aside = f" ({', '.join(world.store.bad())} were put aside)" if world.store.bad() else ""
    told = (
        f"the progress log holds {chain.last_step} steps of {terms.settings.name!r}, but {world.store.name} has no "
        f"checkpoint{aside}"
    )
    if not mended:
        again = "have everything computed again by `run --rebuild-from-log`, " if _from_its_first(chain) else ""
        told += f": is checkpoint.url right? If it is, bring one back, {again}or start anew with `run --fresh`"
    return _Found(None, (), _refuse(world, seen, chain, ProgressError(told), mended=mended)), chain


def _judge(world: World, terms: Terms, seen: Sequence[int], chain: Chain, generation: Generation) -> Refused | None:
    """
    Why the chain does not go on from this generation. Raises where that is refused for good.

    One of an unknown run was left behind by a branch, if others beside it do stand on the chain.
    """
    left = generation.provenance.revision < chain.revision
    try:
        reason = why_not_on(chain, generation)
    except Unusable as error:
        _refuse(world, seen, chain, error, mended=terms.fresh or terms.rebuild)
        reason, left = str(error), False
    except ProgressError as error:
        if not left or not steps_on(chain, world.store):
            _refuse(world, seen, chain, _tell_lost_revert(world.store, chain, generation, error), mended=False)
        reason = str(error)
    return None if reason is None else Refused(generation.step, reason, left)


def _check_lost_end(world: World, chain: Chain, seen: Sequence[int], generation: Generation) -> None:
    """Whether a chain that has lost its end may go on from this generation by itself."""
    if world.repeat is not None:
        raise _journal_is_behind(chain, max(seen), generation.step)
    excluded_from(chain, world.store, generation)


def _tell_lost_revert(
    store: CheckpointStore, chain: Chain, generation: Generation, error: ProgressError
) -> ProgressError:
    """What else it may mean that a generation of a later revision is of an unknown run, and what to do then."""
    if generation.provenance.revision <= chain.revision or (way := way_on(chain, store)) is None:
        return error
    return ProgressError(
        f"{error}, or the progress log has lost the `revert` that began that run: if so, go back with `streamlstm "
        f"checkpoint revert {way}`, and start again"
    )


def _shows_more(store: CheckpointStore, chain: Chain, steps: Sequence[int]) -> bool:
    """
    Whether a generation of one of these steps, which may be damaged, was made from more of the chain than there is:
    later steps, or behind a later branch. So the chain has lost its end.

    Where nothing of it can be read its step tells: later than any that was ever recorded. Right behind a branch that is
    of no matter, for it may have been made because of this one.
    """
    for step in filter(None, steps):
        try:
            revision = store.header(step).generation.provenance.revision
        except (CheckpointError, OSError):
            more = chain.writer != "" and step > chain.reached
        else:
            more = revision > chain.revision or (revision == chain.revision and step > chain.last_step)
        if more:
            return True
    return False


def _check(world: World, terms: Terms, found: _Found, chain: Chain) -> _Found:
    """Configuration and input against the generation; what is found is why to begin anew, where that was asked for."""
    if found.loaded is None:
        return found
    generation = found.loaded.generation
    try:
        if chain.last_step > 0:
            _check_identity(generation, terms.settings)
        if chain.last_step > 0 or not _starts_elsewhere(generation, terms.settings):
            _check_topics(world.source, generation)
            if terms.fresh and terms.on_gap == "fail" and (lost := _lost(world.source, chain, generation)):
                raise _gone(lost)
    except (ConfigError, TopicChanged, LogGap) as error:
        if not terms.fresh:
            raise
        return _Found(None, (), error)
    return found


def _prepare(world: World, terms: Terms, found: _Found, chain: Chain, witness: Witness) -> tuple[Loaded, str | None]:
    """The generation to go on from; with the digest of one that was made again from the log."""
    loaded = found.loaded
    if loaded is None and terms.rebuild and found.refusal is not None:
        if found.lost:
            raise ProgressError(
                "the progress log has lost its end, so that what it published since would be published again under the "
                "same revision; start anew with `run --fresh`"
            )
        loaded = _rebuild(world, terms, chain, found.refusal)
        return loaded, loaded.generation.digest
    if loaded is None and chain.tip is not None:
        loaded = _begin_anew(world, terms, chain, witness, str(found.refusal))
    if chain.last_step == 0:
        loaded = _prepare_first_step(world, terms, loaded, chain)
    assert loaded is not None  # progress without a checkpoint was refused
    return loaded, None


def _check_name(generation: Generation, where: str, name: str) -> None:
    was = generation.provenance.settings.name
    if was != name:
        raise ConfigError(
            f"name: {where} holds the state of {was!r}, and this deployment is called {name!r}: set the name back, or "
            "give this one a checkpoint.url of its own"
        )


def _check_identity(generation: Generation, settings: Settings, *, fresh: bool = False) -> None:
    """A new beginning follows the chain, so it can follow no change of where that is."""
    then = generation.provenance.settings.identity
    moved = not _PLACE_OF_THE_CHAIN.isdisjoint(changed(then, settings.identity))
    told = tell_changes(then, settings.identity)
    if told and (moved or not fresh):
        anew = "" if moved else "start anew with `run --fresh`, "
        raise ConfigError(
            f"{told}; the state hangs on them: set them back, {anew}or give the changed deployment a name, output "
            "topics and a checkpoint.url of its own"
        )


def _starts_elsewhere(generation: Generation, settings: Settings) -> bool:
    """Whether the start positions of this generation 0 are no longer those of the configuration."""
    keys = changed(generation.provenance.settings.identity, settings.identity)
    return not {"source.start", "source.topics"}.isdisjoint(keys)


def _journal_is_behind(chain: Chain, step: int, last: int) -> ProgressError:
    """
    A checkpoint proves that the journal held more, and all of that is out. Going on behind it would publish it again
    with input cut otherwise, under a revision that has it already.
    """
    return ProgressError(
        f"the journal ends with step {chain.last_step}, but the checkpoint of step {step} was made from more of it, "
        "which was published and is gone: bring journal and checkpoints of one copy back, go on from what is left by "
        f"`checkpoint revert {last}`, or start anew with `run --fresh`: readers can tell"
    )


def _check_topics(source: LiveSource, generation: Generation) -> None:
    """Topic ids and partitions against what the state was made from."""
    made = generation.provenance
    now = source.topic_ids()
    for topic, ident in sorted(made.topic_ids.items()):
        if now.get(topic) != ident:
            raise TopicChanged(
                f"topic {topic} was re-created since the checkpoint of step {generation.step} (id {ident}, now "
                f"{now.get(topic)}): its offsets mean other records; `run --fresh` starts anew on it"
            )
    there = {(p.topic, p.partition) for p in source.resolve_start("earliest")}
    known = {(p.topic, p.partition) for p in made.positions}
    if there != known:
        count = {topic: (sum(t == topic for t, _ in known), sum(t == topic for t, _ in there)) for topic in sorted(now)}
        told = ", ".join(f"{topic} had {was} and has {has}" for topic, (was, has) in count.items() if was != has)
        raise TopicChanged(
            f"the partitions changed since the checkpoint of step {generation.step}: {told}; keys may now live "
            "elsewhere: `run --fresh` starts anew on them"
        )


def _lost(source: LiveSource, chain: Chain, generation: Generation) -> tuple[Range, ...]:
    """What a replay and the stream after it need, and retention has deleted."""
    needed = _needed(chain, generation)
    return tuple(
        Range(p.topic, p.partition, at, p.next_offset)
        for p in sorted(source.resolve_start("earliest"))
        if (at := needed[p.topic, p.partition]) < p.next_offset
    )


def _needed(chain: Chain, generation: Generation) -> dict[tuple[str, int], int]:
    """The first offset of each partition that a replay and the stream after it need."""
    needed: dict[tuple[str, int], int] = {}
    for step in chain.to_replay(generation.step):
        for r in step.cut:
            needed.setdefault((r.topic, r.partition), r.start)
    for p in chain.positions_after(generation.provenance.positions, generation.step):
        needed.setdefault((p.topic, p.partition), p.next_offset)
    return needed


def _gone(lost: Sequence[Range]) -> LogGap:
    told = "; ".join(
        f"{r.topic}-{r.partition}: offset {r.start} is needed, but retention has deleted all before {r.end}"
        for r in lost
    )
    return LogGap(
        f"{told}; set source.on_gap: skip to go on without them, start anew with `run --fresh`, or bring the records "
        "back",
        lost,
    )


def _pass_over(
    world: World, terms: Terms, generation: Generation, chain: Chain, ident: str, lost: tuple[Range, ...]
) -> None:
    """Record what is passed over: from the checkpoint on where recorded steps lack something, else from here on."""
    missed = any(
        r.start < gone.end and (r.topic, r.partition) == (gone.topic, gone.partition)
        for step in chain.to_replay(generation.step)
        for r in step.cut
        for gone in lost
    )
    assert chain.tip is not None
    assert chain.lineage is not None
    gap = Gap(
        prev=chain.tip.digest,
        lineage=chain.lineage,
        revision=chain.revision,
        incarnation=ident,
        after=chain.last_step,
        checkpoint=generation.step if missed else chain.last_step,
        ranges=lost,
    )
    _append(world, terms, chain, gap, ident)


def _append(world: World, terms: Terms, chain: Chain, record: Record, ident: str) -> None:
    """Commit a record, and have it in the chain that we hold."""
    chain.admit(commit_record(world.publisher, world.progress, chain, record, ident), terms.settings.name)


def _prepare_first_step(world: World, terms: Terms, loaded: Loaded | None, chain: Chain) -> Loaded:
    """
    Generation 0, durable. It is kept as it is while nothing changed, so that ``latest`` is resolved once.

    A changed identity or learning key makes it anew, for no step has used it; positions are resolved again only when
    it is about them.
    """
    before = loaded.generation.provenance if loaded else None
    if loaded is not None and before is not None:
        then, now = before.settings, terms.settings
        if not changed(then.identity, now.identity) and not changed(then.learning, now.learning):
            return loaded
    keep = before if loaded is not None and not _starts_elsewhere(loaded.generation, terms.settings) else None
    state = world.maker.create(terms.settings.learning).state()
    provenance = Provenance(
        lineage=chain.lineage or (before.lineage if before else world.new_id()),
        incarnation="",
        positions=keep.positions if keep else tuple(world.source.resolve_start(terms.start)),
        topic_ids=keep.topic_ids if keep else dict(world.source.topic_ids()),
        progress=chain.tip,
        settings=terms.settings,
        fingerprint=terms.fingerprint,
        created_ms=int(world.wall_s() * 1000),
        revision=chain.revision,
        excluded=chain.excluded or (),
    )
    return Loaded(world.store.write(state, provenance).generation, state)


def _leave_behind(
    world: World, terms: Terms, seen: Sequence[int], found: _Found, chain: Chain, witness: Witness
) -> None:
    """Put aside what is not gone on from; what shows that the chain has lost its end, not before that is recorded."""
    assert found.loaded is not None
    if found.lost:
        _go_back(world, terms, found.loaded.generation, chain, witness)
    for unused in found.refused:
        tell = witness.left_behind if unused.left else witness.found_bad
        tell(unused, _put_aside(world, seen, chain, unused.step))


def _go_back(world: World, terms: Terms, generation: Generation, chain: Chain, witness: Witness) -> None:
    """
    Have the chain go on from the newest generation that stands on it, because transactions after it were lost.

    What they published may be lost with them, or not: only another revision lets readers tell.
    """
    last_step, revision = chain.last_step, next_revision(chain, world.store)
    excluded = excluded_from(chain, world.store, generation)
    branch = describe_branch(chain, generation, terms.settings.name, world.new_id(), revision, excluded)
    _append(world, terms, chain, branch, "")
    witness.goes_back(last_step, generation.step, revision)


def _begin_anew(world: World, terms: Terms, chain: Chain, witness: Witness, why: str) -> Loaded:
    """
    A new generation 0, durable; then the branch that makes it count; then the old generations are put aside.

    A kill before the branch leaves the chain as it was: the next start is refused like this one would have been, or
    begins anew. What was excluded stays so where a topic is still the same.
    """
    topic_ids, newest = dict(world.source.topic_ids()), newest_branch(chain, world.store)
    provenance = Provenance(
        lineage=world.new_id(),
        incarnation="",
        positions=tuple(world.source.resolve_start(terms.start)),
        topic_ids=topic_ids,
        progress=chain.tip,
        settings=terms.settings,
        fingerprint=terms.fingerprint,
        created_ms=int(world.wall_s() * 1000),
        revision=newest.revision + 1,
        excluded=newest.excluded_of(topic_ids),
    )
    state = world.maker.create(terms.settings.learning).state()
    generation = world.store.write(state, provenance).generation
    branch = describe_branch(
        chain, generation, terms.settings.name, provenance.lineage, provenance.revision, provenance.excluded
    )
    _append(world, terms, chain, branch, "")
    witness.begins_anew(why, provenance.revision, _put_aside_all_but_zero(world.store))
    return Loaded(generation, state)


def _rebuild(world: World, terms: Terms, chain: Chain, refusal: StreamlstmError) -> Loaded:
    """
    Generation 0 as the chain says it was, durable. It counts once the incarnation names its digest.

    Raises :class:`~streamlstm.errors.ProgressError` when the chain's front was trimmed.
    """
    if chain.tip is None:
        raise refusal
    if chain.origin is None or not _from_its_first(chain):
        raise ProgressError(
            f"{refusal}; --rebuild-from-log needs the progress log from its first record, and its front was trimmed "
            "(sink.progress.trim): bring a checkpoint back, or start anew with `run --fresh`"
        )
    first = next(chain.after(0), None)
    settings, maker = terms.settings, chain.incarnation(first.incarnation) if first else None
    if maker is not None:
        settings = replace(settings, learning=maker.learning, hash=maker.config)
        if hash_values({**settings.identity, **maker.learning}) != maker.config:
            raise ConfigError(
                "--rebuild-from-log: keys that the state hangs on are not those that the chain began with: set them "
                "back, or start anew with `run --fresh`"
            )
    state = world.maker.create(settings.learning).state()
    provenance = Provenance(
        lineage=chain.lineage or world.new_id(),
        incarnation="",
        positions=tuple(Position(*position) for position in chain.origin.positions),
        topic_ids=dict(chain.origin.topic_ids),
        progress=None,
        settings=settings,
        fingerprint=terms.fingerprint,
        created_ms=int(world.wall_s() * 1000),
        revision=chain.revision,
        excluded=chain.excluded or (),
    )
    described = Generation(0, "", 0, 0, 0, provenance)
    _check_topics(world.source, described)
    if lost := _lost(world.source, chain, described):
        raise _gone(lost)
    return Loaded(world.store.write(state, provenance).generation, state)


def _from_its_first(chain: Chain) -> bool:
    """Whether everything can be computed again: no recorded step was trimmed, nor where the first began."""
    first = next(chain.after(0), None)
    return chain.origin is not None and (first is None or first.number == 1)


def _put_aside(world: World, seen: Sequence[int], chain: Chain, step: int) -> str:
    try:
        return world.store.put_aside(step)
    except Temporary as error:
        judged = judge_refused(error, world.store, seen, world.progress, chain)
        if judged is error:
            raise
        raise judged from error


def _put_aside_all_but_zero(store: CheckpointStore) -> list[str]:
    return [store.put_aside(step) for step in store.steps() if step]


def _steps_to_replay(chain: Chain, generation: Generation, settings: Settings) -> list[RecordedStep]:
    """
    The recorded steps after the checkpoint, contiguous with it.

    Other learning values than those of the chain's newest process can be taken over only from a clean stop, where
    nothing is left to replay.
    """
    pending = chain.to_replay(generation.step)
    if pending and pending[0].number != generation.step + 1:
        raise ProgressError(
            f"the progress log goes on with step {pending[0].number}, but the checkpoint is of step {generation.step}"
        )
    _check_positions(chain, generation)
    if pending:
        # One that was trimmed away, or lies before the checkpoint, is the one that wrote it.
        newest = chain.incarnations[-1][1].learning if chain.incarnations else generation.provenance.settings.learning
        if told := tell_changes(newest, settings.learning):
            raise ConfigError(
                f"{told}; but the steps since the last checkpoint, {len(pending)}, must be replayed with them as they "
                "were: set them back, start, stop with SIGTERM, and change them then"
            )
    return pending


def _check_positions(chain: Chain, generation: Generation) -> None:
    """Every step reads on where the state, or the step before it, stands."""
    at = {(p.topic, p.partition): p.next_offset for p in generation.provenance.positions}
    gaps = iter(chain.gaps)
    gap = next(gaps, None)
    for step in chain.after(generation.step):
        while gap is not None and gap.after < step.number:
            at |= {
                (r.topic, r.partition): max(r.end, at.get((r.topic, r.partition), 0))
                for r in gap.ranges
                if gap.after >= generation.step
            }
            gap = next(gaps, None)
        for r in step.cut:
            if at.get((r.topic, r.partition)) != r.start:
                raise ProgressError(
                    f"step {step.number} reads {r.topic}-{r.partition} from offset {r.start}, but the state stands at "
                    f"{at.get((r.topic, r.partition))}"
                )
            at[r.topic, r.partition] = r.end


def _replay(
    world: World,
    terms: Terms,
    witness: Witness,
    segments: Segments,
    chain: Chain,
    generation: Generation,
    excluded: Sequence[Range],
    *,
    compare: bool,
) -> tuple[Steppable, int]:
    """The engine after the last recorded step, and how many messages were read for that."""
    newest, records = Repetition(world.repeat, chain, generation), 0
    seek_to_replay(world.source, chain, generation, excluded)
    for joined in join_steps(chain.to_replay(generation.step), alone=newest.wants):
        done = compute_together(
            segments.engine_for(joined[0]), joined, lambda cut: _read(world, terms, cut), world.decode, excluded
        )
        if compare:
            _compare(done, generation)
        newest.add(joined[-1], done.report, done.used)
        records += done.read
        witness.replayed(joined[-1].number, chain.last_step)
    newest.publish(witness.repeated, rebased=not compare)
    return segments.engine_under(terms.settings.learning), records


def seek_to_replay(source: LiveSource, chain: Chain, generation: Generation, excluded: Sequence[Range]) -> None:
    """
    Make ready to read what was recorded after the generation.

    Not from its positions where these were passed over: nothing could be read of any partition then.
    """
    source.pass_over(excluded)
    needed, made = _needed(chain, generation), generation.provenance
    source.seek(
        [p._replace(next_offset=needed[p.topic, p.partition]) for p in made.positions],
        {
            (p.topic, p.partition): epoch
            for p in made.positions
            if needed[p.topic, p.partition] == p.next_offset
            and (epoch := made.leader_epochs.get((p.topic, p.partition))) is not None
        },
    )


def _fingerprints(chain: Chain, generation: Generation, pending: Sequence[RecordedStep]) -> list[Fingerprint]:
    """The fingerprints that the state and the steps to be replayed were made under."""
    makers = [chain.incarnation(ident) for ident in dict.fromkeys(step.incarnation for step in pending)]
    # An incarnation that was trimmed away is the one that wrote the checkpoint too.
    return [generation.provenance.fingerprint, *(maker.fingerprint for maker in makers if maker)]


def _differences(makers: Sequence[Fingerprint], now: Fingerprint) -> list[str]:
    return list(dict.fromkeys(told for then in makers for told in compare_fingerprints(then, now)))


def _write_incarnation(
    world: World,
    terms: Terms,
    generation: Generation,
    chain: Chain,
    ident: str,
    *,
    rebased: bool,
    rebuilt: str | None,
) -> None:
    made = generation.provenance
    origin = Origin(
        generation.digest,
        tuple((p.topic, p.partition, p.next_offset) for p in made.positions),
        dict(made.topic_ids),
    )
    record = Incarnation(
        prev=chain.tip.digest if chain.tip else "",
        lineage=chain.lineage or made.lineage,
        revision=max(chain.revision, made.revision),
        name=terms.settings.name,
        id=ident,
        after=chain.last_step,
        checkpoint=generation.step,
        rebased=rebased,
        config=terms.settings.hash,
        learning=dict(terms.settings.learning),
        fingerprint=dict(terms.fingerprint),
        origin=origin if chain.last_step == 0 else None,
        rebuilt=rebuilt,
    )
    _append(world, terms, chain, record, ident)


def _read(world: World, terms: Terms, cut: Cut) -> Messages:
    try:
        return world.source.read(cut, terms.read_timeout_s)
    except LogGap as error:
        if terms.on_gap == "skip" and error.gaps:
            raise Temporary(f"retention overtook the replay; the next start passes over more: {error}") from error
        raise


def _compare(done: Computed, generation: Generation) -> None:
    for step, digest in zip(done.steps, done.digests, strict=True):
        if step.digest not in (None, digest):
            raise ProgressError(
                f"step {step.number} gives another output now than was committed, on the same machine and libraries: "
                "its input has changed since (compacted, cut back or re-created topic), or a computation is not "
                "deterministic; learn what is there now with `streamlstm checkpoint revert "
                f"{generation.step}`, or start anew with `run --fresh`"
            )
