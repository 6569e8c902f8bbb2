"""
What ``streamlstm replay`` does: open what is asked for, drive it through the engine, and tell.

Apart from :mod:`streamlstm.cli.replay`, because it loads torch, Kafka and Arrow, and a help text must not wait.
"""

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from streamlstm import __version__
from streamlstm.cli.asked import Asked
from streamlstm.cli.device import prepare_device
from streamlstm.cli.engines import engine_maker
from streamlstm.cli.replay_inputs import Feed, is_of_files, open_feed, open_named
from streamlstm.cli.result import Result, as_json_text, as_lines
from streamlstm.config.keys import config_hash, learning_values
from streamlstm.config.model import Config
from streamlstm.engine.report import StepReport
from streamlstm.errors import ConfigError, DataError
from streamlstm.records.batch import Messages
from streamlstm.records.decode import refuse_rejected
from streamlstm.recovery.background import BackgroundWriter, in_a_thread
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.fingerprint import compare_fingerprints, take_fingerprint
from streamlstm.recovery.generations import Loaded
from streamlstm.recovery.making import EngineMaker
from streamlstm.recovery.provenance import Settings
from streamlstm.service.daemon import CheckpointSchedule
from streamlstm.service.encode import ForecastEncoder
from streamlstm.service.keeping import Begun, Clocks, Keeper, Live, Terms, take_up
from streamlstm.service.logging import configure_logging
from streamlstm.service.replay import Fed, Learner, Made, Summary, Tally, replay
from streamlstm.service.stopping import Stop, signals_stop
from streamlstm.transport.appended import AppendedFile, Output
from streamlstm.transport.deadline import leave
from streamlstm.transport.forecasts import ForecastWriter
from streamlstm.transport.interfaces import Frozen, OutMessage

_LINES = {".jsonl", ".ndjson"}

Each = Callable[[StepReport, Fed], None]
"""Told of every step."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a replay takes from where it runs: engines, the fingerprint of their bits, files, and a thread for these."""

    maker: EngineMaker
    fingerprint: Mapping[str, str]
    disk: Disk
    start: Callable[[Callable[[], None]], None]


def this_machine(config: Config) -> Machine:
    """The real one."""
    device = prepare_device(config)
    return Machine(engine_maker(config, device), take_fingerprint(device, config.runtime.threads), Disk(), in_a_thread)


def replay_history(config: Config, asked: Asked, *, as_json: bool, machine: Machine | None = None) -> Iterator[str]:
    """
    Replay, then give the lines to print.

    With ``checkpoint_to``, killed at any instruction and run again with ``resume``, it ends in the same bytes as if it
    had never been killed. With ``strict``, raises :class:`~streamlstm.errors.DataError` after the last line when a
    record could not be used or a recorded digest differs.
    """
    configure_logging(config.logging.level, config.logging.format)
    machine = machine or this_machine(config)
    with ExitStack() as stack:
        store = _open_store(stack, config, asked, machine.disk)
        begun = _take_up(config, asked, store, machine) if store and asked.resume else None
        named = None if begun else asked.from_checkpoint
        with nullcontext() if named is None else open_named(config, named) as base:
            feed = stack.enter_context(open_feed(config, asked, begun, base and base.generation))
            engine = _make_engine(machine.maker, config, asked, begun, base)
        del base  # the engine has its own copy
        tally = Tally(config.model.horizons, asked.score_from, asked.standardise or 0, begun and begun.tally)
        outputs = _open_outputs(stack, config, asked, tally, begun, machine.disk)
        listeners: list[Each] = [opened.write for opened in outputs.values()]
        if config.decode.on_error == "fail":
            listeners.insert(0, lambda report, _: refuse_rejected(report.batch))
        listeners.append(stack.enter_context(_progress(feed, tally)))
        began_s = time.monotonic() - (begun.spent_s if begun else 0.0)
        keeper = None
        if store:
            live = Live(engine, feed, feed.positions, tally, {name: opened.output for name, opened in outputs.items()})
            keeper = _keeper(stack, config, asked, begun, machine, store, live, began_s)
            listeners.append(keeper.after)

        def each(report: StepReport, fed: Fed) -> None:
            for listener in listeners:
                listener(report, fed)

        replay(engine.heed(feed.cuts), feed.decode, engine, tally, each)
        if keeper and not (begun and begun.finished and engine.step_number == begun.state.step):
            keeper.keep(finished=True)
        for opened in outputs.values():
            opened.output.finish()
        elapsed_s = time.monotonic() - began_s
    result = Result(
        config, tally.scores.score(), tally.summary, elapsed_s, asked.standardise, asked.score_from,
        engine.state().digests(),
    )  # fmt: skip
    yield from [as_json_text(result)] if as_json else as_lines(result, recorded=asked.recorded)
    for note in feed.notes():
        click.echo(f"note: {note}", err=True)
    if asked.strict:
        _refuse_flaws(tally.summary, recorded=asked.recorded)


def _refuse_flaws(summary: Summary, *, recorded: bool) -> None:
    if summary.rejected or summary.differing:
        digests = f", {summary.differing:,} of {summary.compared:,} recorded digests differ" if recorded else ""
        raise DataError(f"--strict: records that could not be used: {sum(summary.rejected.values()):,}{digests}")


# Going on.


def _open_store(stack: ExitStack, config: Config, asked: Asked, disk: Disk) -> CheckpointStore | None:
    """Where generations of this replay go, locked: an empty place, or with ``resume`` one that has some."""
    if asked.checkpoint_to is None:
        if asked.resume:
            raise click.UsageError("--resume goes on from what --checkpoint-to DIR left; name it")
        return None
    if asked.checkpoint_to.absolute() == Path(config.checkpoint.url).absolute():
        raise click.UsageError("--checkpoint-to: this is where the service keeps its state (checkpoint.url)")
    store = open_store(asked.checkpoint_to, disk, "--checkpoint-to").open()
    stack.callback(store.leave)
    if not asked.resume and (store.steps() or store.bad()):
        raise click.UsageError(
            f"--checkpoint-to: {asked.checkpoint_to} holds checkpoints; add --resume to go on from them, or name an "
            "empty directory"
        )
    return store


def _take_up(config: Config, asked: Asked, store: CheckpointStore, machine: Machine) -> Begun | None:
    """What was begun in ``store``: the same command, and on a machine that gives the same bits."""
    begun = take_up(store, Settings.of(config))
    if begun is None:
        return None
    now = asked.lasting(of_files=is_of_files(config, asked))
    other = [option for option, value in now.items() if begun.asked.get(option) != value]
    if other:
        told = ", ".join(f"{option} was {begun.asked.get(option)!r}" for option in other)
        raise click.UsageError(f"--resume takes the command that was begun: {told}")
    differences = compare_fingerprints(begun.provenance.fingerprint, machine.fingerprint)
    if differences and config.checkpoint.on_mismatch == "fail":
        raise ConfigError(
            f"checkpoint.on_mismatch: fail: the replay was begun on another machine or other libraries: "
            f"{'; '.join(differences)}; run it there, or set rebase to go on with other bits"
        )
    if differences:
        click.echo(f"note: other bits from here on: {'; '.join(differences)}", err=True)
    for bad in begun.refused:
        click.echo(f"note: checkpoint {bad.step} is bad and was put aside: {bad.reason}", err=True)
    return begun


def _keeper(
    stack: ExitStack,
    config: Config,
    asked: Asked,
    begun: Begun | None,
    machine: Machine,
    store: CheckpointStore,
    live: Live,
    began_s: float,
) -> Keeper:
    """Who takes the generations; from here on a signal is a request to stop after the step."""
    stop = Stop()
    stack.enter_context(signals_stop(stop, config.runtime.shutdown_timeout, leave))
    every = config.checkpoint.every
    step = live.engine.step_number
    terms = Terms(
        lineage=begun.provenance.lineage if begun else secrets.token_hex(8),
        incarnation=secrets.token_hex(8),
        settings=Settings.of(config),
        fingerprint=machine.fingerprint,
        asked=asked.lasting(of_files=is_of_files(config, asked)),
    )
    return Keeper(
        BackgroundWriter(store, Keep(config.checkpoint.keep.last, config.checkpoint.keep.daily), machine.start),
        CheckpointSchedule(every.time, every.records, tried_s=time.monotonic(), durable_step=step),
        terms,
        live,
        Clocks(time.monotonic, time.time, lambda: time.monotonic() - began_s),
        structlog.get_logger("streamlstm"),
        stop,
    )


def _make_engine(maker: EngineMaker, config: Config, asked: Asked, begun: Begun | None, base: Loaded | None) -> Learner:
    """Going on, from a checkpoint, or from nothing. A recorded step says itself what it is computed under."""
    now = learning_values(config)
    if begun:
        state, then = begun.state, begun.learning
    elif base:
        state, then = base.state, base.generation.provenance.settings.learning
    else:
        return Learner(maker, maker.create(now), now)
    learning = then if asked.recorded else now
    try:
        return Learner(maker, maker.restore(state, then, learning), learning)
    except ValueError as error:
        raise ConfigError(f"the state of step {state.step} does not fit the configuration: {error}") from error


# Where forecasts and dead letters go.


@dataclass(frozen=True, slots=True)
class _Opened:
    """An output, and what it takes of a step."""

    output: Output
    write: Each


def _open_outputs(
    stack: ExitStack, config: Config, asked: Asked, tally: Tally, begun: Begun | None, disk: Disk
) -> dict[str, _Opened]:
    """What was asked for, by option; begun anew, or as long as ``begun`` says."""
    encode = _Encoders(config)
    opened: dict[str, _Opened] = {}
    for option, path in (("--out", asked.out), ("--dead-letters", asked.dead_letters)):
        if path is None:
            continue
        if asked.checkpoint_to and path.exists() and not path.is_file():
            raise click.UsageError(f"{option}: {path} is no file, and a replay that goes on cuts it back")
        frozen = begun.outputs[option] if begun else None
        if option == "--dead-letters":
            opened[option] = _lines(
                AppendedFile(path, disk, frozen), lambda report, fed: _letters(encode.of(fed), report, fed.messages)
            )
        elif path.suffix.lower() in _LINES:
            opened[option] = _lines(
                AppendedFile(path, disk, frozen), lambda report, fed: _values(encode.of(fed), report)
            )
        else:
            opened[option] = _table(path, disk, tally, frozen, begun, keep=asked.checkpoint_to is not None)
        stack.callback(opened[option].output.close)
    return opened


class _Encoders:
    """An encoder for every configuration, version and revision that steps were made under; of files, for this one."""

    def __init__(self, config: Config) -> None:
        self._horizons = config.model.horizons
        self._here = Made(config_hash(config), __version__, 0)
        self._made: dict[Made, ForecastEncoder] = {}

    def of(self, fed: Fed) -> ForecastEncoder:
        made = fed.made or self._here
        if made not in self._made:
            self._made[made] = ForecastEncoder(made.config_hash, self._horizons, made.revision, made.version)
        return self._made[made]


def _lines(file: AppendedFile, encode: Callable[[StepReport, Fed], bytes]) -> _Opened:
    return _Opened(file, lambda report, fed: file.append(encode(report, fed)))


def _table(path: Path, disk: Disk, tally: Tally, frozen: Frozen | None, begun: Begun | None, *, keep: bool) -> _Opened:
    finished = begun is not None and begun.finished
    writer = ForecastWriter(path, disk, tally.numbers, frozen, finished=finished, keep=keep)
    return _Opened(writer, lambda report, _: writer.write(report))


def _values(encoder: ForecastEncoder, report: StepReport) -> bytes:
    """The bytes of each forecast as it is published, one a line: JSON holds no line end."""
    return b"".join([(message.value or b"") + b"\n" for message in encoder.encode_forecasts(report)])


def _letters(encoder: ForecastEncoder, report: StepReport, messages: Messages) -> bytes:
    """One JSON object a line: key, value and headers as on the dead-letter topic, bytes that are no text as base64."""
    letters = encoder.encode_dead_letters(report, messages) if report.rejected else []
    return b"".join([msgspec.json.encode(_as_object(letter)) + b"\n" for letter in letters])


def _as_object(letter: OutMessage) -> dict[str, object]:
    headers = {name: _text(value) for name, value in letter.headers}
    return {"key": _text(letter.key), "value": _text(letter.value), "headers": headers}


def _text(data: bytes | None) -> object:
    """Text where it is some; other bytes are an object, which msgspec writes as base64."""
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return {"base64": data}


@contextmanager
def _progress(feed: Feed, tally: Tally) -> Generator[Each, None, None]:
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

        def advance(_report: StepReport, _fed: Fed) -> None:
            seen = tally.summary.messages
            bar.update(task, completed=feed.done(seen), messages=seen)

        yield advance
