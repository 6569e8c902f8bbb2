"""
The chain of committed steps: what every transaction records beside its forecasts, and how it is read back.

Two kinds of record, each holding the SHA-256 of the record before it:

- *incarnation*: a process took over. Its id, fingerprint and configuration; while the chain has no step also the start
  positions, the topic ids and the digest of generation 0, or two first hosts that start at ``latest`` would mix.
- *steps*: the cuts a transaction consumed, in order, and the digest of what each of them gave.

A torn, forked or foreign chain is detected, never repaired. The front of the chain may have been trimmed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    ``origin`` is there while the chain has no step.
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
    origin: Origin | None = None


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


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Incarnation | Steps)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step as the chain has it."""

    number: int
    cut: Cut
    digest: str
    incarnation: str


def encode_record(record: Incarnation | Steps) -> bytes:
    """The value to publish."""
    return _encoder.encode(record)


def digest_record(value: bytes) -> str:
    """What the next record must hold as ``prev``."""
    return hashlib.sha256(value).hexdigest()


def record_steps(
    prev: Link | None, lineage: str, incarnation: str, first: int, steps: Sequence[tuple[Cut, bytes]]
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
    )


@dataclass(slots=True)
class Chain:
    """
    The chain as far as it was read, verified.

    ``first`` and ``tip`` are its oldest and newest record; ``trimmed`` says that others came before. ``last_step`` is
    0 while there is none. ``positions`` is where the next cut must start, by (topic, partition): all of them when an
    origin was read, else those seen. ``ends`` is the last step up to each record, by its digest. All oldest first.
    """

    lineage: str | None = None
    first: Link | None = None
    tip: Link | None = None
    trimmed: bool = False
    last_step: int = 0
    steps: list[RecordedStep] = field(default_factory=list[RecordedStep])
    ends: dict[str, int] = field(default_factory=dict[str, int])
    incarnations: list[tuple[Link, Incarnation]] = field(default_factory=list[tuple[Link, Incarnation]])
    positions: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])

    def after(self, step: int) -> Iterator[RecordedStep]:
        """The recorded steps ``step + 1`` …, in order."""
        return (recorded for recorded in self.steps if recorded.number > step)

    def ends_at(self, link: Link) -> int | None:
        """The last step up to and including this record, or ``None`` when the chain does not hold it."""
        return self.ends.get(link.digest)

    def incarnation(self, ident: str) -> Incarnation | None:
        """An incarnation by its id, if it is retained."""
        return next((found for _, found in self.incarnations if found.id == ident), None)

    def origins_after(self, link: Link | None) -> list[Origin]:
        """What the incarnations after this record (``None``: all) took for the first step's start."""
        return [
            found.origin
            for at, found in self.incarnations
            if found.origin is not None and (link is None or at.offset > link.offset)
        ]


def read_chain(entries: Sequence[ProgressEntry], name: str) -> Chain:
    """
    Verify what the progress log holds, and return it.

    Step numbers are contiguous, each range starts where the last one of its partition ended, every record names the
    digest of the one before it, and all belong to one run of the deployment ``name``. Raises
    :class:`~streamlstm.errors.ProgressError` with what is wrong and at which offset.
    """
    chain = Chain()
    current: str | None = None  # the incarnation that may write; unknown while its record is trimmed
    for entry in entries:
        record = decode_record(entry)
        link = Link(entry.offset, digest_record(entry.value))
        if chain.tip is None:
            chain.trimmed = record.prev != ""
            chain.lineage = record.lineage
            if not chain.trimmed and (isinstance(record, Steps) or record.after):
                _refuse(entry, "a chain that begins without its first incarnation")
        elif record.prev != chain.tip.digest:
            what = "a second beginning" if record.prev == "" else "a record that does not follow the one before it"
            _refuse(entry, f"{what}: the chain is forked or torn")
        if record.lineage != chain.lineage:
            _refuse(entry, "a record of another run: two deployments share the topic")
        if isinstance(record, Incarnation):
            _admit_incarnation(chain, entry, record, name)
            chain.incarnations.append((link, record))
            current = record.id
        else:
            if current is not None and record.incarnation != current:
                _refuse(entry, "steps of a process that had been superseded")
            current = record.incarnation
            _admit_steps(chain, entry, record)
        chain.first = chain.first or link
        chain.tip = link
        chain.ends[link.digest] = chain.last_step
    return chain


def decode_record(entry: ProgressEntry) -> Incarnation | Steps:
    """One record. Raises :class:`~streamlstm.errors.ProgressError` when it is none of ours."""
    try:
        return _decoder.decode(entry.value)
    except msgspec.MsgspecError as error:
        _refuse(entry, f"a record that is not ours, torn, or of a newer version: {error}", error)


def _admit_incarnation(chain: Chain, entry: ProgressEntry, record: Incarnation, name: str) -> None:
    if record.name != name:
        _refuse(entry, f"the topic belongs to the deployment {record.name!r}, and this one is called {name!r}")
    if chain.tip is not None and record.after != chain.last_step:
        _refuse(entry, f"a process that took over after step {record.after}, but the last one is {chain.last_step}")
    if (record.origin is None) != (record.after > 0):
        _refuse(entry, "an incarnation whose start positions are missing or misplaced")
    if record.origin is not None:
        chain.positions = {(topic, partition): at for topic, partition, at in record.origin.positions}
    chain.last_step = record.after


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
    chain.last_step = record.last


def _range(entry: ProgressEntry, record: Steps, ranged: tuple[int, int, int, int]) -> Range:
    topic, partition, start, end = ranged
    if not 0 <= topic < len(record.topics):
        _refuse(entry, "a range of a topic that is not listed")
    return Range(record.topics[topic], partition, start, end)


def _refuse(entry: ProgressEntry, what: str, cause: Exception | None = None) -> NoReturn:
    raise ProgressError(f"progress topic, offset {entry.offset}: {what}") from cause


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
