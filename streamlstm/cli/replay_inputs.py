"""Where the cuts of a replay come from: files, topics, or what a live run recorded."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from streamlstm import __version__
from streamlstm.cli.asked import Asked
from streamlstm.cli.delivery import progress_log
from streamlstm.config.keys import identity_values, tell_changes
from streamlstm.config.model import Config
from streamlstm.errors import CheckpointError, ConfigError, LogGap, ProgressError, TopicChanged
from streamlstm.records.batch import Messages, Range, RecordBatch
from streamlstm.records.decode import Decoder, compile_decoder
from streamlstm.recovery.archive import load_outside, open_outside
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.generations import Loaded
from streamlstm.recovery.inspection import LATEST, load_of
from streamlstm.recovery.manifest import MANIFEST
from streamlstm.recovery.progress import Chain, Link, Value, read_chain
from streamlstm.recovery.provenance import Generation
from streamlstm.recovery.resume import why_not_on
from streamlstm.service.keeping import Begun
from streamlstm.service.replay import Fed, Made, Recorded, feed_merged, feed_recorded, feed_source
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.files import FileSource
from streamlstm.transport.interfaces import Frozen, Position, TopicIds
from streamlstm.transport.kafka.preflight import preflight
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.topics import check_readable

_MESSAGES_A_STEP = 500  # a step this long shows progress; how the stream is divided changes no bit
_FILE_SUFFIXES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".gz"}


@dataclass(frozen=True, slots=True)
class Feed:
    """
    Cuts from ``positions`` on, and their decoder.

    ``done`` is how much of ``total`` so many messages are, counted from the replay's first; ``notes`` are told last.
    ``topic_ids`` and ``freeze`` tell a generation what the input must still be when the replay goes on.
    """

    cuts: Iterable[Fed]
    positions: tuple[Position, ...]
    decode: Callable[[Messages], RecordBatch]
    total: int
    unit: str
    done: Callable[[int], int]
    notes: Callable[[], list[str]]
    topic_ids: Callable[[], TopicIds]
    freeze: Callable[[], Frozen]


@contextmanager
def open_feed(
    config: Config, asked: Asked, begun: Begun | None, base: Generation | None
) -> Generator[Feed, None, None]:
    """The cuts that were asked for, from where ``begun`` ended; recorded ones from where ``base`` stands."""
    if asked.recorded:
        unknown = [s for s in asked.sources if s not in config.source.topics]
        if unknown:
            raise click.UsageError(f"--cuts progress: {', '.join(unknown)} is not in source.topics")
        if asked.start or asked.end:
            raise click.UsageError("--cuts progress takes all that is recorded; leave --start and --end away")
        feed = _open_recorded(config, asked, begun, base)
    elif not asked.sources:
        raise click.UsageError("--from: name a file or a topic")
    elif is_of_files(config, asked):
        if asked.start or asked.end:
            raise click.UsageError("--start and --end are for topics; for files take --rows")
        feed = _open_files(config, asked, begun)
    else:
        feed = _open_topics(config, asked, begun)
    with feed as opened:
        yield opened


def is_of_files(config: Config, asked: Asked) -> bool:
    """Whether files are to be read, and not topics."""
    return not asked.recorded and (config.source.type == "files" or any(map(_is_file, asked.sources)))


def _is_file(name: str) -> bool:
    """Whether this names a file and not a topic: it is there, or it looks like one."""
    return "/" in name or Path(name).suffix.lower() in _FILE_SUFFIXES or Path(name).is_file()


def _left(asked: Asked, begun: Begun | None) -> int | None:
    """How many messages are still to be read, where that was limited."""
    return None if asked.rows is None else max(0, asked.rows - (begun.messages if begun else 0))


@contextmanager
def _open_files(config: Config, asked: Asked, begun: Begun | None) -> Generator[Feed, None, None]:
    paths = [Path(s) for s in asked.sources]
    for path in paths:
        if not path.is_file():
            raise click.BadParameter(f"{path}: there is no such file", param_hint="--from")
    topic = config.source.topics[0] if config.source.topics else paths[0].name
    source = FileSource(paths, topic=topic, decode=config.decode)
    positions = begun.provenance.positions if begun else (Position(topic, 0, 0),)
    try:
        if begun:
            _go_on(source, begun)
        decoder = compile_decoder(config.decode, source.columns)
        total, unit, done = asked.rows, "rows", _itself
        if total is None:
            total, unit, done = source.bytes_total, "bytes", lambda _: source.bytes_read
        yield Feed(
            cuts=feed_source(lambda count: source.poll(count, 0.0), _MESSAGES_A_STEP, _left(asked, begun)),
            positions=positions,
            decode=decoder.decode,
            total=total,
            unit=unit,
            done=done,
            notes=lambda: _naive_note(decoder),
            topic_ids=lambda: {topic: source.content_digest()},
            freeze=lambda: Frozen({"files": source.file_digests()}),
        )
    finally:
        source.close()


def _go_on(source: FileSource, begun: Begun) -> None:
    """To where reading ended, over the same rows: they are read again, and a file that was changed is named."""
    try:
        source.seek(begun.provenance.positions)
    except LogGap:
        source.expect(begun.input.values["files"])
        raise
    source.expect(begun.input.values["files"])


@dataclass(frozen=True, slots=True)
class _Cluster:
    """The input topics, open, and what goes with them."""

    source: KafkaSource
    decoder: Decoder
    deadline: Deadline
    warnings: list[str]

    def notes(self) -> list[str]:
        return [*self.warnings, *_naive_note(self.decoder)]


@contextmanager
def _open_cluster(config: Config, topics: tuple[str, ...] = ()) -> Generator[_Cluster, None, None]:
    """The cluster of the configuration; its input topics, or these."""
    decoder = compile_decoder(config.decode)
    warnings = preflight(config.source)
    deadline = Deadline(config.runtime.deadline)
    if topics:
        config = config.model_copy(update={"source": config.source.model_copy(update={"topics": list(topics)})})
    try:
        source = KafkaSource(config, deadline)
        try:
            yield _Cluster(source, decoder, deadline, warnings)
        finally:
            source.close()
    finally:
        deadline.close()


@contextmanager
def _open_topics(config: Config, asked: Asked, begun: Begun | None) -> Generator[Feed, None, None]:
    with _open_cluster(config, asked.sources) as cluster:
        source = cluster.source
        ids = dict(source.topic_ids())
        if begun:
            _check_ids(begun.provenance.topic_ids, ids)
            starts = begun.provenance.positions
            ends = [Position(*end) for end in begun.input.values["ends"]]
        else:
            starts = source.resolve_start(f"timestamp:{asked.start}") if asked.start else source.beginning_offsets()
            ends = source.resolve_start(f"timestamp:{asked.end}") if asked.end else source.end_offsets()
        source.seek(starts)
        left = sum(max(0, e.next_offset - s.next_offset) for s, e in zip(starts, ends, strict=True))
        total = left + (begun.messages if begun else 0)
        yield Feed(
            cuts=feed_merged(source, starts, ends, config.runtime.deadline, _MESSAGES_A_STEP, _left(asked, begun)),
            positions=tuple(starts),
            decode=cluster.decoder.decode,
            total=min(total, asked.rows or total),
            unit="messages",
            done=_itself,
            notes=cluster.notes,
            topic_ids=lambda: ids,
            freeze=lambda: Frozen({"ends": ends}),
        )


def _check_ids(then: TopicIds, now: TopicIds) -> None:
    for topic, ident in sorted(then.items()):
        if now.get(topic) != ident:
            raise TopicChanged(
                f"topic {topic} was re-created since (id {ident}, now {now.get(topic)}): its offsets mean other records"
            )


@contextmanager
def open_named(config: Config, name: str) -> Generator[Loaded, None, None]:
    """
    A checkpoint of the service by its step or ``latest``, or what is at a path: one of its own, an archive, a store.

    Reads only; a running service is not disturbed. Series beyond memory are read while it is open.
    """
    path = Path(name)
    if name.isdigit() or not path.exists():
        yield load_of(open_store(config.checkpoint.url), name)
    elif path.is_dir() and not (path / MANIFEST).exists():
        yield load_of(open_store(path, setting="--from-checkpoint"), LATEST)
    else:
        with open_outside(path) as outside:
            yield load_outside(outside, name)


@dataclass(frozen=True, slots=True)
class _Span:
    """
    Recorded steps: those after ``after`` up to ``last``, from ``positions`` on.

    ``link`` is the record of the chain they follow. ``made`` and ``learning`` are for those whose incarnation was
    trimmed away: the one that wrote the checkpoint. ``known`` is what the chain says of the steps between: if it is
    another when the replay goes on, what was computed already does not count any more.
    """

    link: Link | None
    after: int
    last: int
    positions: tuple[Position, ...]
    topic_ids: TopicIds
    excluded: tuple[Range, ...]
    made: Made | None
    learning: Mapping[str, Value] | None
    known: list[object]

    def freeze(self) -> Frozen:
        """All of it but where it begins."""
        return Frozen({
            "link": self.link,
            "last": self.last,
            "excluded": self.excluded,
            "made": self.made,
            "learning": self.learning,
            "known": self.known,
        })  # fmt: skip

    @classmethod
    def thaw(cls, begun: Begun) -> "_Span":
        """What :meth:`freeze` gave, from where the replay ended."""
        told = begun.input.values
        return cls(
            link=Link(*told["link"]) if told["link"] else None,
            after=begun.state.step,
            last=told["last"],
            positions=begun.provenance.positions,
            topic_ids=begun.provenance.topic_ids,
            excluded=tuple(Range(*r) for r in told["excluded"]),
            made=Made(*told["made"]) if told["made"] else None,
            learning=told["learning"],
            known=told["known"],
        )


def _known(chain: Chain, last: int) -> list[object]:
    """Which run it is, and what was passed over before this step."""
    gaps = [[gap.after, gap.checkpoint, [list(r) for r in gap.ranges]] for gap in chain.gaps if gap.checkpoint < last]
    return [chain.lineage, gaps]


def _read_from(config: Config, deadline: Deadline, link: Link | None) -> Chain:
    """The chain from this record on; all of it where the record is not there."""
    log = progress_log(config, deadline)
    chain = read_chain(log.read(link.offset if link else 0), config.name)
    return chain if link is None or chain.first == link else read_chain(log.read(), config.name)


def _span(config: Config, deadline: Deadline, begun: Begun | None, base: Generation | None) -> tuple[Chain, _Span]:
    """The recorded steps that are to be taken, and the chain that holds them."""
    if begun:
        span = _Span.thaw(begun)
        chain = _read_from(config, deadline, span.link)
        if _known(chain, span.last) != span.known:
            raise ProgressError(
                "progress: the deployment went back, or passed over offsets, since the replay began; "
                "begin again with another --checkpoint-to"
            )
        return chain, span
    if base:
        made = base.provenance
        if told := tell_changes(made.settings.identity, identity_values(config)):
            raise ConfigError(f"since the checkpoint of step {base.step} {told}; set them back to replay what follows")
        chain = _read_from(config, deadline, made.progress)
        if reason := why_not_on(chain, base):
            raise CheckpointError(
                f"no recorded step follows the checkpoint of step {base.step}: {reason}; take another one "
                "(`streamlstm checkpoint list` names those that are there)"
            )
        return chain, _Span(
            link=made.progress,
            after=base.step,
            last=chain.last_step,
            positions=made.positions,
            topic_ids=made.topic_ids,
            excluded=chain.excluded_after(made.excluded),
            made=Made(made.settings.hash, made.fingerprint.get("streamlstm", __version__), made.revision),
            learning=dict(made.settings.learning),
            known=_known(chain, chain.last_step),
        )
    chain = _read_from(config, deadline, None)
    steps = chain.to_replay(0)
    if chain.origin is None or (steps and steps[0].number != 1):
        raise ProgressError(
            "progress does not begin with the first step: it was trimmed, or nothing ran yet; take "
            "--from-checkpoint, and with sink.progress.trim: false all cuts are kept"
        )
    return chain, _Span(
        link=None,
        after=0,
        last=chain.last_step,
        positions=tuple(Position(*position) for position in chain.origin.positions),
        topic_ids=chain.origin.topic_ids,
        excluded=chain.excluded or (),
        made=None,
        learning=None,
        known=_known(chain, chain.last_step),
    )


@contextmanager
def _open_recorded(
    config: Config, asked: Asked, begun: Begun | None, base: Generation | None
) -> Generator[Feed, None, None]:
    check_readable(config)
    with _open_cluster(config) as cluster:
        chain, span = _span(config, cluster.deadline, begun, base)
        steps = [
            Recorded(
                step.cut,
                step.digest,
                _made(chain, step.incarnation) or span.made,
                _learning(chain, step.incarnation) or span.learning,
            )
            for step in chain.to_replay(span.after)
            if step.number <= span.last
        ]
        _check_ids(span.topic_ids, cluster.source.topic_ids())
        cluster.source.pass_over(span.excluded)
        cluster.source.seek(span.positions)
        left = sum(r.end - r.start for step in steps for r in step.cut)
        total = left + (begun.messages if begun else 0)
        yield Feed(
            cuts=_whole_cuts(
                feed_recorded(steps, cluster.source, config.runtime.deadline, span.excluded), _left(asked, begun)
            ),
            positions=span.positions,
            decode=cluster.decoder.decode,
            total=min(total, asked.rows or total),
            unit="cuts",
            done=_itself,
            notes=lambda: [*cluster.notes(), *_nothing_note(steps, span)],
            topic_ids=lambda: span.topic_ids,
            freeze=span.freeze,
        )


def _learning(chain: Chain, incarnation: str) -> Mapping[str, Value] | None:
    maker = chain.incarnation(incarnation)
    return maker and maker.learning


def _made(chain: Chain, incarnation: str) -> Made | None:
    maker = chain.incarnation(incarnation)
    return maker and Made(maker.config, maker.fingerprint.get("streamlstm", __version__), maker.revision)


def _whole_cuts(cuts: Iterable[Fed], rows: int | None) -> Iterator[Fed]:
    """Cuts until that many messages were in them: a recorded cut is not divided."""
    seen = 0
    for fed in cuts if rows != 0 else ():
        yield fed
        seen += len(fed.messages)
        if rows is not None and seen >= rows:
            return


def _itself(messages: int) -> int:
    return messages


def _nothing_note(steps: Sequence[Recorded], span: _Span) -> list[str]:
    return [] if steps else [f"nothing was replayed: no recorded step follows step {span.after}"]


def _naive_note(decoder: Decoder) -> list[str]:
    return ["times without a zone were taken as UTC"] if decoder.naive_times else []
