"""
The chain of committed steps: what every transaction records beside its forecasts, and how it is read back.

Four kinds of record, each holding the SHA-256 of the record before it:

- *incarnation*: a process took over. Its id, fingerprint and configuration; while the chain has no step also the start
  positions, the topic ids and the digest of generation 0, or two first hosts that start at ``latest`` would mix.
- *steps*: the cuts a transaction consumed, in order, and the digest of what each of them gave.
- *branch*: the chain goes on from an older generation, or from a new generation 0, under a new lineage and the next
  revision. What it recorded beyond that point stays readable and counts no more.
- *gap*: offsets that retention had deleted were passed over. The steps between the checkpoint it went on from and this
  record are computed again without them, and their digests say nothing any more.

A torn, forked or foreign chain is detected, never repaired. The front of the chain may have been trimmed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, NoReturn

import msgspec

from streamlstm.errors import ProgressError
from streamlstm.records.batch import Cut, Range
from streamlstm.transport.interfaces import Position, ProgressEntry

Value = Any
"""What a configuration key may hold: JSON."""


class Link(NamedTuple):
    """One record of the chain: where it stands, and the SHA-256 (hex) of its value."""

    offset: int
    digest: str


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the first step starts from: generation 0 and the positions it resolved."""

    generation: str
    positions: tuple[tuple[str, int, int], ...]
    topic_ids: dict[str, str]


class Incarnation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="incarnation"):
    """
    A process took over after step ``after``, having loaded the generation ``checkpoint``.

    ``rebased``: the steps between the two were recomputed with other bits than they were recorded with.
    ``origin`` is there while the chain has no step. ``rebuilt`` is the digest of a generation 0 that was made again
    from the log, and may stand in for the first one from here on.
    """

    schema: Literal[1] = 1
    prev: str
    lineage: str
    name: str
    id: str
    after: int
    checkpoint: int
    rebased: bool
    config: str
    learning: dict[str, Value]
    fingerprint: dict[str, str]
    revision: int = 0
    origin: Origin | None = None
    rebuilt: str | None = None


class StepEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step: ranges as (index into ``topics``, partition, start, end), and the digest of its outputs."""

    ranges: tuple[tuple[int, int, int, int], ...]
    digest: str


class Steps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="steps"):
    """The steps ``first`` … ``last`` of one transaction."""

    schema: Literal[1] = 1
    prev: str
    lineage: str
    incarnation: str
    first: int
    last: int
    topics: tuple[str, ...]
    steps: tuple[StepEntry, ...]
    revision: int = 0


class Branch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="branch"):
    """
    From here the chain goes on after step ``after``, from the generation with the manifest digest ``generation``.

    ``lineage`` is new and ``revision`` a higher one: of two forecasts with the same coordinates the higher revision
    counts. ``positions`` are those of the generation, all of them. ``excluded`` are all ranges whose messages are
    passed over from here on, those of earlier branches included.
    """

    schema: Literal[1] = 1
    prev: str
    lineage: str
    revision: int
    name: str
    after: int
    generation: str
    positions: tuple[tuple[str, int, int], ...]
    topic_ids: dict[str, str]
    excluded: tuple[Range, ...]


class Gap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gap"):
    """
    After step ``after``, ``ranges`` were passed over, because retention had deleted them.

    The state it was written from is that of step ``checkpoint`` and the steps after it, computed without these offsets.
    """

    schema: Literal[1] = 1
    prev: str
    lineage: str
    revision: int
    incarnation: str
    after: int
    checkpoint: int
    ranges: tuple[Range, ...]


Record = Incarnation | Steps | Branch | Gap

_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Record)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step as the chain has it; ``digest`` is ``None`` where it says nothing about the step computed again."""

    number: int
    cut: Cut
    digest: str | None
    incarnation: str


def encode_record(record: Record) -> bytes:
    """The value to publish."""
    return _encoder.encode(record)


def digest_record(value: bytes) -> str:
    """What the next record must hold as ``prev``."""
    return hashlib.sha256(value).hexdigest()


def record_steps(
    prev: Link | None,
    lineage: str,
    incarnation: str,
    first: int,
    steps: Sequence[tuple[Cut, bytes]],
    revision: int = 0,
) -> Steps:
    """The record of consecutive steps from number ``first``, each with its cut and the digest of its outputs."""
    topics = tuple(sorted({r.topic for cut, _ in steps for r in cut}))
    index = {topic: i for i, topic in enumerate(topics)}
    return Steps(
        prev=prev.digest if prev else "",
        lineage=lineage,
        incarnation=incarnation,
        first=first,
        last=first + len(steps) - 1,
        topics=topics,
        steps=tuple(
            StepEntry(tuple((index[r.topic], r.partition, r.start, r.end) for r in cut), digest.hex())
            for cut, digest in steps
        ),
        revision=revision,
    )


@dataclass(slots=True)
class Chain:
    """
    The chain as far as it was read, verified: what counts at its end.

    ``first`` and ``tip`` are its oldest and newest record; ``trimmed`` says that others came before. ``last_step`` is 0
    while there is none, and ``reached`` the highest that ever was. ``positions`` is where the next cut must start, by
    (topic, partition): all of them when an origin or a branch was read, else those seen. ``ends`` is the last step up
    to each record, by its digest, of those that a state may stand on: what a branch or a gap left behind is not among
    them, nor among ``steps``.

    ``lineage`` and ``revision`` are the newest, ``lineages`` all that were met. ``excluded`` are the newest branch's
    ranges, ``None`` where no branch was read. ``origin`` is what the first of ``steps`` started from, if it was read;
    ``zeros`` are the digests that a generation 0 may have. ``newest`` is the first step of the newest steps record,
    or right behind a branch of the next one: what a generation stands on is out.
    ``left`` are the steps that each branch left behind, as far as their topics are still the same ones. All lists are
    oldest first.
    """

    lineage: str | None = None
    revision: int = 0
    excluded: tuple[Range, ...] | None = None
    first: Link | None = None
    tip: Link | None = None
    trimmed: bool = False
    last_step: int = 0
    reached: int = 0
    newest: int = 0
    steps: list[RecordedStep] = field(default_factory=list[RecordedStep])
    left: list[list[RecordedStep]] = field(default_factory=list[list[RecordedStep]])
    ends: dict[str, int] = field(default_factory=dict[str, int])
    incarnations: list[tuple[Link, Incarnation]] = field(default_factory=list[tuple[Link, Incarnation]])
    branches: list[tuple[Link, Branch]] = field(default_factory=list[tuple[Link, Branch]])
    gaps: list[Gap] = field(default_factory=list[Gap])
    positions: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    lineages: set[str] = field(default_factory=set[str])
    origin: Origin | None = None
    zeros: set[str] = field(default_factory=set[str])
    writer: str | None = None
    """The incarnation that may write; ``None`` while its record is trimmed, empty after a branch."""

    def excluded_after(self, before: tuple[Range, ...]) -> tuple[Range, ...]:
        """The ranges that count at its end; ``before`` are those of the generation beside it, if no branch tells."""
        return before if self.excluded is None else self.excluded

    def after(self, step: int) -> Iterator[RecordedStep]:
        """The recorded steps ``step + 1`` …, in order."""
        return (recorded for recorded in self.steps if recorded.number > step)

    def ends_at(self, link: Link) -> int | None:
        """The last step up to and including this record, or ``None`` when no state of the chain stands on it."""
        return self.ends.get(link.digest)

    def incarnation(self, ident: str) -> Incarnation | None:
        """An incarnation by its id, if it is retained."""
        return next((found for _, found in self.incarnations if found.id == ident), None)

    def admit(self, entry: ProgressEntry, name: str) -> None:
        """The next record, verified; see :func:`read_chain`."""
        record = decode_record(entry)
        link = Link(entry.offset, digest_record(entry.value))
        if self.tip is None:
            self.trimmed = record.prev != ""
            self.lineage = record.lineage
            if not self.trimmed and (not isinstance(record, Incarnation) or record.after):
                _refuse(entry, "a chain that begins without its first incarnation")
        elif record.prev != self.tip.digest:
            what = "a second beginning" if record.prev == "" else "a record that does not follow the one before it"
            _refuse(entry, f"{what}: the chain is forked or torn")
        match record:
            case Branch():
                _admit_branch(self, entry, record, name)
                self.branches.append((link, record))
            case Incarnation():
                _check_run(self, entry, record)
                _admit_incarnation(self, entry, record, name)
                self.incarnations.append((link, record))
            case Gap():
                _check_run(self, entry, record)
                _admit_gap(self, entry, record)
            case Steps():
                _check_run(self, entry, record)
                _admit_steps(self, entry, record)
        self.lineages.add(record.lineage)
        self.revision = record.revision
        self.first = self.first or link
        self.tip = link
        self.reached = max(self.reached, self.last_step)
        self.ends[link.digest] = self.last_step

    def to_replay(self, step: int) -> list[RecordedStep]:
        """
        The recorded steps after ``step`` as they are computed again from a state of that step: their cuts without what
        was passed over, and without a digest where it was computed with it.
        """
        return [_without_gaps(recorded, self.gaps) for recorded in self.after(step)]

    def positions_after(self, positions: Sequence[Position], step: int) -> tuple[Position, ...]:
        """Where reading goes on after all of :meth:`to_replay`, from a state of ``step`` at these positions."""
        ends = {(r.topic, r.partition): r.end for recorded in self.after(step) for r in recorded.cut}
        for gap in self.gaps:
            for r in gap.ranges if gap.after >= step else ():
                place = (r.topic, r.partition)
                ends[place] = max(ends.get(place, 0), r.end)
        return tuple(p._replace(next_offset=max(p.next_offset, ends.get((p.topic, p.partition), 0))) for p in positions)

    def drop_after(self, step: int) -> None:
        """What was recorded beyond this step counts no more."""
        self.left.append(list(self.after(step)))
        self.steps = [recorded for recorded in self.steps if recorded.number <= step]
        # A gap right after this step that no recorded step lacks is met again when reading goes on from before it.
        self.gaps = [gap for gap in self.gaps if gap.after <= step and gap.checkpoint < step]
        self.drop_ends(step)

    def drop_ends(self, step: int) -> None:
        """No state beyond this step stands on what was recorded so far."""
        self.ends = {digest: last for digest, last in self.ends.items() if last <= step}


def read_chain(entries: Sequence[ProgressEntry], name: str) -> Chain:
    """
    Verify what the progress log holds, and return it.

    Step numbers are contiguous, each range starts where the last one of its partition ended, every record names the
    digest of the one before it, and all belong to one run of the deployment ``name``, whose lineage changes at a branch
    only. Raises :class:`~streamlstm.errors.ProgressError` with what is wrong and at which offset.
    """
    chain = Chain()
    for entry in entries:
        chain.admit(entry, name)
    return chain


def decode_record(entry: ProgressEntry) -> Record:
    """One record. Raises :class:`~streamlstm.errors.ProgressError` when it is none of ours."""
    try:
        return _decoder.decode(entry.value)
    except msgspec.MsgspecError as error:
        _refuse(entry, f"a record that is not ours, torn, or of a newer version: {error}", error)


def _check_run(chain: Chain, entry: ProgressEntry, record: Incarnation | Steps | Gap) -> None:
    if record.lineage != chain.lineage or (chain.tip is not None and record.revision != chain.revision):
        _refuse(entry, "a record of another run: two deployments share the topic")
    if not isinstance(record, Incarnation) and chain.writer not in (None, record.incarnation):
        _refuse(entry, "a record of a process that had been superseded")
    chain.writer = record.id if isinstance(record, Incarnation) else record.incarnation


def _check_name(entry: ProgressEntry, record: Incarnation | Branch, name: str) -> None:
    if record.name != name:
        _refuse(entry, f"the topic belongs to the deployment {record.name!r}, and this one is called {name!r}")


def _admit_incarnation(chain: Chain, entry: ProgressEntry, record: Incarnation, name: str) -> None:
    _check_name(entry, record, name)
    if chain.tip is not None and record.after != chain.last_step:
        _refuse(entry, f"a process that took over after step {record.after}, but the last one is {chain.last_step}")
    if (record.origin is None) != (record.after > 0):
        _refuse(entry, "an incarnation whose start positions are missing or misplaced")
    if record.origin is not None:
        _begin_from(chain, record.origin)
    if record.rebuilt is not None:
        chain.zeros.add(record.rebuilt)
    chain.last_step = record.after


def _admit_branch(chain: Chain, entry: ProgressEntry, record: Branch, name: str) -> None:
    _check_name(entry, record, name)
    if chain.tip is not None and (
        record.after > chain.last_step or record.revision <= chain.revision or record.lineage in chain.lineages
    ):
        _refuse(entry, f"a branch after step {record.after} that does not follow from the chain before it")
    chain.lineage, chain.excluded, chain.writer = record.lineage, record.excluded, ""
    chain.drop_after(record.after)
    _forget_other_topics(chain, record)
    chain.last_step, chain.newest = record.after, record.after + 1
    chain.positions = {(topic, partition): at for topic, partition, at in record.positions}
    if record.after == 0:
        _begin_from(chain, Origin(record.generation, record.positions, record.topic_ids))


def _forget_other_topics(chain: Chain, branch: Branch) -> None:
    """Offsets of a topic that was re-created mean other records. Only a new beginning goes on with other topics."""
    if chain.branches:
        before = chain.branches[-1][1].topic_ids
    elif chain.origin is not None:
        before = chain.origin.topic_ids
    else:
        before = branch.topic_ids if branch.after else {}
    gone = {r.topic for steps in chain.left for recorded in steps for r in recorded.cut}
    gone -= {topic for topic, ident in branch.topic_ids.items() if before.get(topic) == ident}
    if gone:
        chain.left = [
            [replace(recorded, cut=tuple(r for r in recorded.cut if r.topic not in gone)) for recorded in steps]
            for steps in chain.left
        ]


def _begin_from(chain: Chain, origin: Origin) -> None:
    chain.origin, chain.zeros = origin, {origin.generation}
    chain.positions = {(topic, partition): at for topic, partition, at in origin.positions}
    for r in (r for gap in chain.gaps for r in gap.ranges):
        chain.positions[r.topic, r.partition] = max(r.end, chain.positions.get((r.topic, r.partition), 0))


def _admit_gap(chain: Chain, entry: ProgressEntry, record: Gap) -> None:
    if (chain.tip is not None and record.after != chain.last_step) or record.checkpoint > record.after:
        _refuse(entry, f"a gap after step {record.after}, but the last one is {chain.last_step}")
    chain.last_step = record.after
    for r in record.ranges:
        at = chain.positions.get((r.topic, r.partition), None if chain.trimmed else -1)
        if r.end <= r.start or (at is not None and at < r.start):
            _refuse(entry, f"a gap from {r.start} to {r.end} of {r.topic}-{r.partition}, which was read up to {at}")
        # Recorded steps that lack something may have read on behind it, and be trimmed away.
        if at is not None or record.checkpoint == record.after:
            chain.positions[r.topic, r.partition] = max(at or 0, r.end)
    chain.drop_ends(record.checkpoint)
    chain.gaps.append(record)


def _admit_steps(chain: Chain, entry: ProgressEntry, record: Steps) -> None:
    known_start = chain.tip is not None
    if known_start and record.first != chain.last_step + 1:
        _refuse(entry, f"step {record.first} follows step {chain.last_step}: steps are missing or repeated")
    if not record.steps or record.last - record.first + 1 != len(record.steps):
        _refuse(entry, f"{len(record.steps)} steps that are called {record.first} to {record.last}")
    for number, step in enumerate(record.steps, record.first):
        cut = tuple(_range(entry, record, ranged) for ranged in step.ranges)
        for ranged in cut:
            place = (ranged.topic, ranged.partition)
            expected = chain.positions.get(place, None if chain.trimmed else -1)
            if expected not in (None, ranged.start) or ranged.end <= ranged.start:
                _refuse(
                    entry,
                    f"step {number} reads {ranged.topic}-{ranged.partition} from {ranged.start} to {ranged.end}, "
                    f"but it was read up to {expected}",
                )
            chain.positions[place] = ranged.end
        chain.steps.append(RecordedStep(number, cut, step.digest, record.incarnation))
    chain.newest, chain.last_step = record.first, record.last


def _without_gaps(recorded: RecordedStep, gaps: Sequence[Gap]) -> RecordedStep:
    here = [gap for gap in gaps if gap.checkpoint < recorded.number <= gap.after]
    if not here:
        return recorded
    ends = {(r.topic, r.partition): r.end for gap in here for r in gap.ranges}
    cut = tuple(
        r._replace(start=start)
        for r in recorded.cut
        if (start := max(r.start, ends.get((r.topic, r.partition), 0))) < r.end
    )
    return RecordedStep(recorded.number, cut, None, recorded.incarnation)


def _range(entry: ProgressEntry, record: Steps, ranged: tuple[int, int, int, int]) -> Range:
    topic, partition, start, end = ranged
    if not 0 <= topic < len(record.topics):
        _refuse(entry, "a range of a topic that is not listed")
    return Range(record.topics[topic], partition, start, end)


def _refuse(entry: ProgressEntry, what: str, cause: Exception | None = None) -> NoReturn:
    raise ProgressError(f"progress log, offset {entry.offset}: {what}") from cause


def positions_after(positions: Sequence[Position], cuts: Sequence[Cut]) -> tuple[Position, ...]:
    """
    Where reading goes on after these cuts.

    >>> positions_after([Position("t", 0, 5)], [(Range("t", 0, 5, 9),)])
    (Position(topic='t', partition=0, next_offset=9),)
    """
    ends = {(r.topic, r.partition): r.end for cut in cuts for r in cut}
    return tuple(p._replace(next_offset=ends.get((p.topic, p.partition), p.next_offset)) for p in positions)


def positions_of(ends: Mapping[tuple[str, int], int]) -> tuple[Position, ...]:
    """Positions, sorted."""
    return tuple(Position(topic, partition, at) for (topic, partition), at in sorted(ends.items()))
