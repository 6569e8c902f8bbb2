"""
Start-up: from a directory, a progress topic and an input log to an engine that goes on as if it had never stopped.

The order is a law, and is numbered in :func:`resume`. Each part may be cut by a kill anywhere: the next start does the
same again and ends in the same state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from streamlstm.config.keys import changed
from streamlstm.engine.report import StepReport
from streamlstm.engine.state import EngineState
from streamlstm.errors import (
    CheckpointError,
    ConfigError,
    LogGap,
    ProgressError,
    StreamlstmError,
    Superseded,
    TopicChanged,
)
from streamlstm.records.batch import Messages, Range, RecordBatch
from streamlstm.recovery.checkpoint import CheckpointStore, Refused
from streamlstm.recovery.exclusions import drop_excluded
from streamlstm.recovery.fingerprint import Fingerprint, compare_fingerprints
from streamlstm.recovery.generations import Generation, Loaded, Provenance, Settings
from streamlstm.recovery.progress import (
    Branch,
    Chain,
    Incarnation,
    Link,
    Origin,
    RecordedStep,
    decode_record,
    digest_record,
    encode_record,
    read_chain,
)
from streamlstm.recovery.repetition import Repeat, Repeated, Repetition
from streamlstm.transport.interfaces import (
    Fenced,
    LiveSource,
    Outputs,
    Position,
    ProgressLog,
    Publisher,
)

Decode = Callable[[Messages], RecordBatch]


class Steppable(Protocol):
    """What recovery and the daemon ask of an engine."""

    step_number: int

    def step(self, batch: RecordBatch) -> StepReport:
        """Take in one cut."""
        ...

    def state(self) -> EngineState:
        """A snapshot, immutable."""
        ...


@dataclass(frozen=True, slots=True)
class EngineMaker:
    """
    How an engine comes to be under the configuration: fresh, or from a state.

    ``restore`` raises ``ValueError`` naming what in the state does not fit.
    """

    create: Callable[[], Steppable]
    restore: Callable[[EngineState], Steppable]


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
    """What the configuration says about starting. ``read_timeout_s`` bounds the wait for one recorded cut."""

    settings: Settings
    start: str
    fingerprint: Fingerprint
    on_mismatch: Literal["rebase", "fail"]
    read_timeout_s: float


class Witness(Protocol):
    """Told what start-up finds, when it finds it: a replay may take long. Never raises."""

    def found_bad(self, refused: Refused, moved_to: str) -> None:
        """A generation cannot be used and was put aside."""
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

    ``generation`` is the newest that is durable, ``refused`` were newer and bad. ``tip`` is the chain's newest record,
    our own incarnation. ``replayed_records`` were consumed since ``generation``. ``excluded`` ranges are passed over.
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


def resume(world: World, terms: Terms, witness: Witness) -> Ready:
    """
    Bring the deployment back to where its last committed transaction left it.

    1.  Lock the state directory, and sweep up what a killed process left in it.
    2.  Find the newest generation that is whole, and check that its layout is ours and it is of this configuration.
    3.  Take over the transactional id: whoever published under it until now is fenced.
    4.  Read the progress chain to its end; nobody else can extend it any more. A generation that the chain does not
        know is put aside, and the next older one taken.
    5.  Check topic ids, partition count and retention.
    6.  On a first run, or while there is no step and the configuration changed: make generation 0 durable.
    7.  Write the incarnation.
    8.  Compare fingerprints: the checkpoint's, and those of the incarnations whose steps are to be replayed.
    9.  Replay: the recorded cuts once more, nothing published, digests compared. Only without transactions, the newest
        record's outputs are published again, for they may not be out.
    10. Go live: the source stands where the last recorded cut ended.

    Raises the errors of :mod:`streamlstm.errors`, each with one line for the operator.
    """
    laps = _Laps(world.monotonic_s)
    began = world.monotonic_s()
    world.store.open()  # 1
    loaded, refused = world.store.newest()  # 2
    if loaded is not None and loaded.generation.step > 0:
        _check_identity(loaded.generation, terms.settings)
    began = laps.lap("load", began)

    world.publisher.begin_session()  # 3
    loaded, refused, chain = _read_progress(world, terms, loaded, refused)  # 4
    for bad in refused:
        witness.found_bad(bad, world.store.put_aside(bad.step))
    began = laps.lap("progress", began)

    fresh = loaded is None
    if loaded is not None and chain.last_step > 0:
        _check_identity(loaded.generation, terms.settings)
    if loaded is not None and (chain.last_step > 0 or not _starts_elsewhere(loaded.generation, terms.settings)):
        _check_input(world.source, loaded.generation)  # 5
    if chain.last_step == 0:
        loaded = _prepare_first_step(world, terms, loaded, chain)  # 6
    assert loaded is not None  # progress without a checkpoint was refused
    generation = loaded.generation
    excluded = generation.provenance.excluded if chain.excluded is None else chain.excluded
    pending = _steps_to_replay(chain, generation, terms.settings)
    engine = _restore(world.maker, loaded, terms.settings)
    del loaded  # the engine has its own copy
    makers = _fingerprints(chain, generation, pending)
    differences = _differences(makers, terms.fingerprint) if pending else []

    rebases = bool(differences) and terms.on_mismatch == "rebase"
    ident = world.new_id()
    tip = _write_incarnation(world, terms, generation, chain, ident, rebased=rebases)  # 7
    if differences:  # 8
        if terms.on_mismatch == "fail":
            raise ConfigError(
                f"checkpoint.on_mismatch: fail: {len(pending)} steps would be replayed on another machine or other "
                f"libraries: {'; '.join(differences)}; run it there, or set rebase to go on with other bits"
            )
        witness.rebases(differences, len(pending))
    began = laps.lap("load", began)

    records = 0
    world.source.seek(generation.provenance.positions)
    newest = Repetition(world.repeat, chain, generation)
    for step in pending:  # 9
        records += _replay(world, engine, step, excluded, terms.read_timeout_s, newest, compare=not differences)
        witness.replayed(step.number, chain.last_step)
    newest.publish(witness.repeated, rebased=bool(differences))
    positions = chain.positions_after(generation.provenance.positions, generation.step)
    world.source.seek(positions)  # 10
    laps.lap("replay", began)
    return Ready(
        engine=engine,
        generation=generation,
        lineage=chain.lineage or generation.provenance.lineage,
        revision=max(chain.revision, generation.provenance.revision),
        excluded=excluded,
        incarnation=ident,
        tip=tip,
        positions=positions,
        source="fresh" if fresh else "fallback" if refused else "checkpoint",
        refused=tuple(refused),
        replayed_steps=len(pending),
        replayed_records=records,
        rebased=bool(differences),
        phases_s=laps.spent,
    )


def judge_fenced(error: Fenced, progress: ProgressLog, tip: Link | None, incarnation: str) -> StreamlstmError:
    """
    What a refused producer means. If somebody else wrote since: :class:`~streamlstm.errors.Superseded`, not to be
    restarted, or two hosts would fence each other for ever. Otherwise our own transaction took too long, and a restart
    mends it. ``tip`` is the newest record that was ours or that we had read.

    Steps count as well as an incarnation, which may have been trimmed while we slept.
    """
    try:
        entries = progress.read(tip.offset + 1 if tip else 0)
        records = [decode_record(entry) for entry in entries]
    except StreamlstmError:
        return error
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
    return error


def _read_progress(
    world: World, terms: Terms, loaded: Loaded | None, refused: Sequence[Refused]
) -> tuple[Loaded | None, list[Refused], Chain]:
    """The chain, and the newest generation that stands on it."""
    name = terms.settings.name
    if loaded is None:
        chain = read_chain(world.progress.read(), name)
        if chain.tip is not None:
            aside = f" ({', '.join(world.store.bad())} were put aside as bad)" if world.store.bad() else ""
            raise ProgressError(
                f"the progress topic holds {chain.last_step} steps of {name!r}, but {world.store.name} has no "
                f"checkpoint{aside}: bring the state directory back, or start anew under another name with other topics"
            )
        return None, list(refused), chain

    link = loaded.generation.provenance.progress
    chain = read_chain(world.progress.read(link.offset if link else 0), name)
    if link is not None and (chain.first != link or chain.ends_at(link) is None):
        # What the newest generation stands on is gone, or left behind by a branch: an older one may need more of it.
        chain = read_chain(world.progress.read(), name)
    beyond: dict[int, str] = {}
    refused = list(refused)
    while loaded is not None:
        reason = why_not_on(chain, loaded.generation)
        if reason is None:
            break
        beyond[loaded.generation.step] = reason
        loaded, refused = world.store.newest(beyond)
    return loaded, refused, chain


def why_not_on(chain: Chain, generation: Generation) -> str | None:
    """
    Why the chain does not go on from this generation, or ``None`` when it does.

    Raises :class:`~streamlstm.errors.ProgressError` when the chain is not this deployment's, or has lost the record
    that the generation stands on: then the generation is not to blame, and an older one would not help.
    """
    made = generation.provenance
    here = f"the checkpoint of step {generation.step}"
    if chain.tip is None or chain.first is None:
        if made.progress is None:
            return None
        raise ProgressError(
            f"the progress topic is empty, but {here} stands on its offset {made.progress.offset}: is this the right "
            "cluster and topic? If the topic is lost, the deployment can only start anew, in another state directory"
        )
    if generation.step == 0 and generation.digest in chain.zeros:
        return None
    if made.lineage not in chain.lineages and not (chain.trimmed and chain.branches):
        raise ProgressError(
            f"the progress topic belongs to run {chain.lineage} and {here} to run {made.lineage}: another host "
            "started this deployment first, or one of the two was brought back from elsewhere"
        )
    if made.progress is None:
        if chain.trimmed and made.lineage == chain.lineage:
            raise ProgressError(f"the progress topic was trimmed, but {here} needs it from its first record")
    elif made.progress.offset < chain.first.offset and made.lineage == chain.lineage:
        raise ProgressError(
            f"the progress topic begins at offset {chain.first.offset}, but {here} stands on offset "
            f"{made.progress.offset}: it must keep its records (cleanup.policy=delete, retention.ms=-1)"
        )
    elif chain.ends_at(made.progress) != generation.step:
        return f"it is not in the progress chain, which ends with step {chain.last_step}"
    if generation.step == 0 and (chain.last_step or made.progress != chain.tip):
        return _why_not_zero(chain, made)
    return None


def _why_not_zero(chain: Chain, made: Provenance) -> str:
    if made.lineage != chain.lineage:
        return f"the deployment began anew since, with revision {chain.revision}"
    raise ProgressError(
        f"the progress topic began with another generation 0 than the one in this state directory, run "
        f"{made.lineage}: another host started this deployment first"
    )


def _check_identity(generation: Generation, settings: Settings) -> None:
    keys = changed(generation.provenance.settings.identity, settings.identity)
    if keys:
        was = generation.provenance.settings.identity
        told = ", ".join(f"{key} (was {was.get(key)!r}, is {settings.identity.get(key)!r})" for key in keys)
        raise ConfigError(
            f"keys that the state hangs on were changed: {told}; set them back, or give the changed deployment a name, "
            "output topics and a checkpoint.url of its own"
        )


def _starts_elsewhere(generation: Generation, settings: Settings) -> bool:
    """Whether the start positions of this generation 0 are no longer those of the configuration."""
    keys = changed(generation.provenance.settings.identity, settings.identity)
    return not {"source.start", "source.topics"}.isdisjoint(keys)


def _check_input(source: LiveSource, generation: Generation) -> None:
    """Topic ids, partitions and retention against what the state was made from."""
    made = generation.provenance
    now = source.topic_ids()
    for topic, ident in sorted(made.topic_ids.items()):
        if now.get(topic) != ident:
            raise TopicChanged(
                f"topic {topic} was re-created since the checkpoint of step {generation.step} (id {ident}, now "
                f"{now.get(topic)}): its offsets mean other records; start anew with another name and state directory"
            )
    earliest = {(p.topic, p.partition): p.next_offset for p in source.resolve_start("earliest")}
    known = {(p.topic, p.partition): p.next_offset for p in made.positions}
    if set(earliest) != set(known):
        count = {
            topic: (sum(t == topic for t, _ in known), sum(t == topic for t, _ in earliest)) for topic in sorted(now)
        }
        told = ", ".join(f"{topic} had {was} and has {has}" for topic, (was, has) in count.items() if was != has)
        raise TopicChanged(
            f"the partitions changed since the checkpoint of step {generation.step}: {told}; keys may now live "
            "elsewhere, so start anew with another name and state directory"
        )
    for (topic, partition), needed in sorted(known.items()):
        if earliest[topic, partition] > needed:
            raise LogGap(
                f"{topic}-{partition}: offset {needed} is needed, but retention has deleted all before "
                f"{earliest[topic, partition]}; start anew with another name and state directory"
            )


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
    state = world.maker.create().state()
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


def _steps_to_replay(chain: Chain, generation: Generation, settings: Settings) -> list[RecordedStep]:
    """
    The recorded steps after the checkpoint, contiguous with it and computed under these learning values.

    Others can be taken over only from a clean stop, where nothing is left to replay.
    """
    pending = chain.to_replay(generation.step)
    made = generation.provenance
    if pending and pending[0].number != generation.step + 1:
        raise ProgressError(
            f"the progress topic goes on with step {pending[0].number}, but the checkpoint is of step {generation.step}"
        )
    _check_positions(chain, generation)
    for ident in dict.fromkeys(step.incarnation for step in pending):
        maker = chain.incarnation(ident)
        learning = maker.learning if maker else made.settings.learning
        keys = changed(learning, settings.learning)
        if keys:
            told = ", ".join(f"{key}: {learning.get(key)!r}" for key in keys)
            raise ConfigError(
                f"learning keys were changed, but {len(pending)} steps since the last checkpoint must be replayed with "
                f"{told}; start once with these, stop with SIGTERM, and change them then"
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


def _restore(maker: EngineMaker, loaded: Loaded, settings: Settings) -> Steppable:
    try:
        return maker.restore(loaded.state)
    except ValueError as error:
        keys = changed(loaded.generation.provenance.settings.learning, settings.learning)
        if keys:
            raise ConfigError(f"the state cannot take over {', '.join(keys)}, set them back: {error}") from error
        raise CheckpointError(
            f"the state of step {loaded.generation.step} does not fit the configuration: {error}"
        ) from error


def _fingerprints(chain: Chain, generation: Generation, pending: Sequence[RecordedStep]) -> list[Fingerprint]:
    """The fingerprints that the state and the steps to be replayed were made under."""
    makers = [chain.incarnation(ident) for ident in dict.fromkeys(step.incarnation for step in pending)]
    # An incarnation that was trimmed away is the one that wrote the checkpoint too.
    return [generation.provenance.fingerprint, *(maker.fingerprint for maker in makers if maker)]


def _differences(makers: Sequence[Fingerprint], now: Fingerprint) -> list[str]:
    return list(dict.fromkeys(told for then in makers for told in compare_fingerprints(then, now)))


def _write_incarnation(
    world: World, terms: Terms, generation: Generation, chain: Chain, ident: str, *, rebased: bool
) -> Link:
    made = generation.provenance
    origin = Origin(
        generation.digest,
        tuple((p.topic, p.partition, p.next_offset) for p in made.positions),
        dict(made.topic_ids),
    )
    value = encode_record(
        Incarnation(
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
        )
    )
    try:
        offset = world.publisher.commit(Outputs([], [], value))
    except Fenced as error:
        raise judge_fenced(error, world.progress, chain.tip, ident) from error
    return Link(offset, digest_record(value))


def _replay(
    world: World,
    engine: Steppable,
    step: RecordedStep,
    excluded: Sequence[Range],
    timeout_s: float,
    newest: Repetition,
    *,
    compare: bool,
) -> int:
    """Compute one recorded step again; the number of messages it held."""
    messages = world.source.read(step.cut, timeout_s)
    used, _ = drop_excluded(messages, excluded)
    report = engine.step(world.decode(used))
    if report.step != step.number:
        raise ProgressError(f"replaying step {step.number}, the engine counts {report.step}")
    if compare and step.digest is not None and report.digest().hex() != step.digest:
        raise ProgressError(
            f"step {step.number} gives another output now than was committed, on the same machine and libraries: its "
            "input has changed (compacted or re-created topic), or a computation is not deterministic"
        )
    newest.add(step, report, used)
    return len(messages)
