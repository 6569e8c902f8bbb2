"""
What ``streamlstm replay`` does: open what is asked for, drive it through the engine, and tell.

Apart from :mod:`streamlstm.cli.replay`, because it loads torch, Kafka and Arrow, and a help text must not wait.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from streamlstm.cli.device import prepare_device
from streamlstm.cli.result import Result, as_json_text, as_lines
from streamlstm.config.keys import config_hash
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.report import StepReport
from streamlstm.errors import DataError, ProgressError, StreamlstmError
from streamlstm.records.batch import Messages, RecordBatch
from streamlstm.records.decode import Decoder, compile_decoder, refuse_rejected
from streamlstm.recovery.progress import read_chain
from streamlstm.service.encode import ForecastEncoder
from streamlstm.service.logging import configure_logging
from streamlstm.service.replay import Fed, feed_merged, feed_recorded, feed_source, replay
from streamlstm.service.scores import StreamScores
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.files import FileSource, ForecastWriter
from streamlstm.transport.interfaces import OutMessage, Position
from streamlstm.transport.kafka.preflight import preflight
from streamlstm.transport.kafka.progress import KafkaProgressLog
from streamlstm.transport.kafka.source import KafkaSource

_MESSAGES_A_STEP = 500  # a step this long shows progress; how the stream is divided changes no bit
_FILE_SUFFIXES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".gz"}

Each = Callable[[StepReport, Messages], None]
"""Told of every step."""


class Asked(NamedTuple):
    """The options of the command, by their names there."""

    sources: tuple[str, ...]
    start: str | None
    end: str | None
    rows: int | None
    score_from: int
    standardise: int | None
    recorded: bool
    out: Path | None
    dead_letters: Path | None
    strict: bool


def replay_history(config: Config, asked: Asked, *, as_json: bool) -> Iterator[str]:
    """
    Replay, then give the lines to print.

    With ``strict``, raises :class:`~streamlstm.errors.DataError` after the last line when a record could not be used or
    a recorded digest differs.
    """
    configure_logging(config.logging.level, config.logging.format)
    with ExitStack() as stack:
        feed = stack.enter_context(_open(config, asked))
        engine = Engine.create(config, prepare_device(config))
        scores = StreamScores(config.model.horizons, score_from=asked.score_from, standardise=asked.standardise or 0)
        listeners: list[Each] = []
        if config.decode.on_error == "fail":
            listeners.append(lambda report, _: refuse_rejected(report.batch))
        if asked.out:
            listeners.append(stack.enter_context(_forecast_file(asked.out)))
        if asked.dead_letters:
            encoder = ForecastEncoder(config_hash(config), config.model.horizons)
            listeners.append(stack.enter_context(_dead_letter_file(asked.dead_letters, encoder)))
        listeners.append(stack.enter_context(_progress(feed)))

        def each(report: StepReport, messages: Messages) -> None:
            for listener in listeners:
                listener(report, messages)

        began = time.monotonic()
        summary = replay(feed.cuts, feed.decode, engine, scores, each)
        elapsed_s = time.monotonic() - began
    score, digests = scores.score(), engine.state().digests()
    result = Result(config, score, summary, elapsed_s, asked.standardise, asked.score_from, digests)
    if as_json:
        yield as_json_text(result)
    else:
        yield from as_lines(result, recorded=asked.recorded)
    for note in feed.notes():
        click.echo(f"note: {note}", err=True)
    if asked.strict and (summary.rejected or summary.differing):
        digests = f", {summary.differing:,} of {summary.compared:,} recorded digests differ" if asked.recorded else ""
        raise DataError(f"--strict: records that could not be used: {sum(summary.rejected.values()):,}{digests}")


class _Feed(NamedTuple):
    """Cuts and their decoder. ``done`` is how much of ``total`` so many messages are; ``notes`` are told last."""

    cuts: Iterable[Fed]
    decode: Callable[[Messages], RecordBatch]
    total: int | None
    unit: str
    done: Callable[[int], int]
    notes: Callable[[], list[str]]


# Where the cuts come from.


@contextmanager
def _open(config: Config, asked: Asked) -> Generator[_Feed, None, None]:
    """The cuts that were asked for: of files, of topics, or as recorded."""
    if asked.recorded:
        unknown = [s for s in asked.sources if s not in config.source.topics]
        if unknown:
            raise click.UsageError(f"--cuts progress: {', '.join(unknown)} is not in source.topics")
        if asked.start or asked.end:
            raise click.UsageError("--cuts progress takes all that is recorded; leave --start and --end away")
        feed = _open_recorded(config, asked)
    elif not asked.sources:
        raise click.UsageError("--from: name a file or a topic")
    elif config.source.type == "files" or any(map(_is_file, asked.sources)):
        if asked.start or asked.end:
            raise click.UsageError("--start and --end are for topics; for files take --rows")
        feed = _open_files(config, asked)
    else:
        feed = _open_topics(config, asked)
    with feed as opened:
        yield opened


def _is_file(name: str) -> bool:
    """Whether this names a file and not a topic: it is there, or it looks like one."""
    return "/" in name or Path(name).suffix.lower() in _FILE_SUFFIXES or Path(name).is_file()


@contextmanager
def _open_files(config: Config, asked: Asked) -> Generator[_Feed, None, None]:
    paths = [Path(s) for s in asked.sources]
    for path in paths:
        if not path.is_file():
            raise click.BadParameter(f"{path}: there is no such file", param_hint="--from")
    topic = config.source.topics[0] if config.source.topics else paths[0].name
    source = FileSource(paths, topic=topic, decode=config.decode)
    try:
        decoder = compile_decoder(config.decode, source.columns)
        cuts = feed_source(lambda count: source.poll(count, 0.0), _MESSAGES_A_STEP, asked.rows)
        total, unit, done = asked.rows, "rows", _itself
        if total is None:
            total, unit, done = source.bytes_total, "bytes", lambda _: source.bytes_read
        yield _Feed(cuts, decoder.decode, total, unit, done, lambda: _naive_note(decoder))
    finally:
        source.close()


@contextmanager
def _open_topics(config: Config, asked: Asked) -> Generator[_Feed, None, None]:
    decoder = compile_decoder(config.decode)
    warnings = preflight(config.source)
    deadline = Deadline(config.runtime.deadline)
    topics = config.source.model_copy(update={"topics": list(asked.sources)})
    source = KafkaSource(config.model_copy(update={"source": topics}), deadline)
    try:
        starts = source.resolve_start(f"timestamp:{asked.start}") if asked.start else source.beginning_offsets()
        ends = source.resolve_start(f"timestamp:{asked.end}") if asked.end else source.end_offsets()
        source.seek(starts)
        total = sum(max(0, e.next_offset - s.next_offset) for s, e in zip(starts, ends, strict=True))
        cuts = feed_merged(source, starts, ends, config.runtime.deadline, _MESSAGES_A_STEP, asked.rows)
        yield _Feed(
            cuts,
            decoder.decode,
            min(total, asked.rows or total),
            "messages",
            _itself,
            lambda: [*warnings, *_naive_note(decoder)],
        )
    finally:
        source.close()
        deadline.close()


@contextmanager
def _open_recorded(config: Config, asked: Asked) -> Generator[_Feed, None, None]:
    decoder = compile_decoder(config.decode)
    warnings = preflight(config.source)
    deadline = Deadline(config.runtime.deadline)
    source: KafkaSource | None = None
    try:
        chain = read_chain(KafkaProgressLog(config, deadline).read(), config.name)
        steps = chain.to_replay(0)
        if chain.origin is None or (steps and steps[0].number != 1):
            raise ProgressError(
                f"{config.progress_topic} does not begin with the first step: it was trimmed, or nothing ran yet; "
                "with sink.progress.trim: false all cuts are kept"
            )
        source = KafkaSource(config, deadline)
        source.seek([Position(*position) for position in chain.origin.positions])
        total = sum(r.end - r.start for step in steps for r in step.cut)
        cuts = feed_recorded(
            [(step.cut, step.digest) for step in steps], source, config.runtime.deadline, chain.excluded or ()
        )
        if asked.rows is not None:
            cuts = _whole_cuts(cuts, asked.rows)
        yield _Feed(
            cuts,
            decoder.decode,
            min(total, asked.rows or total),
            "cuts",
            _itself,
            lambda: [*warnings, *_naive_note(decoder)],
        )
    finally:
        if source:
            source.close()
        deadline.close()


def _whole_cuts(cuts: Iterable[Fed], rows: int) -> Iterator[Fed]:
    """Cuts until that many messages were in them: a recorded cut is not divided."""
    seen = 0
    for fed in cuts:
        yield fed
        seen += len(fed.messages)
        if seen >= rows:
            return


def _itself(messages: int) -> int:
    return messages


def _naive_note(decoder: Decoder) -> list[str]:
    return ["times without a zone were taken as UTC"] if decoder.naive_times else []


# Where forecasts and dead letters go.


@contextmanager
def _forecast_file(path: Path) -> Generator[Each, None, None]:
    with ForecastWriter(path) as writer:
        yield lambda report, _: writer.write(report)


@contextmanager
def _dead_letter_file(path: Path, encoder: ForecastEncoder) -> Generator[Each, None, None]:
    """One JSON object a line: key, value and headers as on the dead-letter topic, bytes that are no text as base64."""
    try:
        file = path.open("wb")
    except OSError as error:
        raise _unwritable(path, error) from error

    def write(report: StepReport, messages: Messages) -> None:
        lines = [_as_object(letter) for letter in encoder.encode_dead_letters(report, messages)]
        try:
            file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            file.flush()
        except OSError as error:
            raise _unwritable(path, error) from error

    with file:
        yield write


def _as_object(letter: OutMessage) -> dict[str, object]:
    headers = {name: _text(value) for name, value in letter.headers}
    return {"key": _text(letter.key), "value": _text(letter.value), "headers": headers}


def _text(data: bytes | None) -> object:
    """Text where it is some; other bytes are an object, which msgspec writes as base64."""
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return {"base64": data}


def _unwritable(path: Path, error: OSError) -> StreamlstmError:
    return StreamlstmError(f"cannot write {path}: {error.strerror or error}")


@contextmanager
def _progress(feed: _Feed) -> Generator[Each, None, None]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[messages]:,} messages"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"replaying {feed.unit}", total=feed.total, messages=0)
        seen = 0

        def advance(_report: StepReport, messages: Messages) -> None:
            nonlocal seen
            seen += len(messages)
            bar.update(task, completed=feed.done(seen), messages=seen)

        yield advance
