"""The composition root of the service: every part made once, told of each other, and closed in the reverse order."""

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import structlog

from streamlstm import __version__
from streamlstm.cli import interpreter
from streamlstm.cli.delivery import open_delivery
from streamlstm.cli.device import prepare_device
from streamlstm.cli.engines import engine_maker
from streamlstm.config.keys import config_hash
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.selftest import dependent_rows
from streamlstm.errors import ConfigError, LogCutBack, NotAuthorised, StreamlstmError, Temporary
from streamlstm.records.batch import Messages, RecordBatch
from streamlstm.records.decode import Decoder, compile_decoder
from streamlstm.recovery.background import BackgroundWriter
from streamlstm.recovery.branching import way_back
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.fingerprint import Fingerprint, doubt_rows, take_fingerprint
from streamlstm.recovery.provenance import Settings
from streamlstm.recovery.resume import Terms, World, resume
from streamlstm.recovery.stored import SCRATCH
from streamlstm.service.daemon import Daemon, Log, Pace, Startup, StoppedEarly
from streamlstm.service.encode import ForecastEncoder
from streamlstm.service.http import HttpServer
from streamlstm.service.logging import configure_logging
from streamlstm.service.observer import Observers
from streamlstm.service.sessions import run_sessions
from streamlstm.service.sightings import Sightings
from streamlstm.service.stopping import Stop, signals_stop
from streamlstm.service.watch import watch
from streamlstm.transport.deadline import Deadline, leave
from streamlstm.transport.kafka.preflight import HungUpOn, preflight
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.topics import check_topics, count_held


@dataclass(frozen=True, slots=True)
class Asked:
    """How to start where an ordinary start would be refused; see :class:`~streamlstm.recovery.resume.Terms`."""

    fresh: bool = False
    rebuild: bool = False


_TO_LOOK_S = 2.0

_SEVERAL = "a key is on more than one partition of its topic: on each it is a series of its own"


def serve(config: Config, asked: Asked) -> None:
    """Run the service until it is told to stop. Raises the errors of :mod:`streamlstm.errors`."""
    if config.source.type != "kafka":
        raise ConfigError("source.type: run reads from kafka; files are for `streamlstm replay`")
    configure_logging(config.logging.level, config.logging.format)
    interpreter.share_often()
    log = structlog.get_logger("streamlstm")
    device = prepare_device(config)
    log.info("starting", version=__version__, name=config.name, device=device, config=config_hash(config)[:8])
    decoder = compile_decoder(config.decode)
    for warning in (*preflight(config.source), *check_topics(config)):
        log.warning(warning)

    fingerprint = _check_machine(config, device, log)

    stop = Stop()
    with ExitStack() as stack:
        stack.enter_context(signals_stop(stop, config.runtime.shutdown_timeout, leave))
        # Locked before a port is taken: a process that is being replaced has both, and only the lock says "wait".
        store = open_store(config.checkpoint.url).open()
        stack.callback(store.leave)
        observer = _watch(stack, config, device, log)
        world, terms = _world(stack, store, config, device, _warned(decoder, log)), _terms(config, fingerprint, asked)

        def begin(*, first: bool) -> Daemon:
            interpreter.thaw()
            startup = Startup(observer, log, stop, time.monotonic, fingerprint)
            ready = resume(world, terms if first else replace(terms, fresh=False, rebuild=False), startup)
            startup.ready(ready)
            if first and ready.source == "fresh" and not asked.fresh:
                _warn_of_another_life(config, store, log)
            writer = BackgroundWriter(world.store, Keep(config.checkpoint.keep.last, config.checkpoint.keep.daily))
            encoder = ForecastEncoder(config_hash(config), config.model.horizons, ready.revision)
            interpreter.freeze()
            return Daemon(world, terms, ready, _pace(config), encoder, observer, log, stop, writer)

        try:
            run_sessions(begin, stop, log)
        except LogCutBack as error:
            raise LogCutBack(f"{error}; {way_back(store, error.ends)}", error.ends) from error
        except Temporary:
            _refuse_without_credentials(config)
            raise
        except StoppedEarly:
            log.info("stopped while starting")


def _refuse_without_credentials(config: Config) -> None:
    """
    What a restart would find out at once is said now: a broker that refuses us looks like one that is away.

    Raises :class:`~streamlstm.errors.NotAuthorised`.
    """
    try:
        preflight(config.source, budget_s=_TO_LOOK_S)
    except HungUpOn:
        return  # or it is one that is just going away
    except NotAuthorised:
        raise
    except StreamlstmError:
        return


def _watch(stack: ExitStack, config: Config, device: str, log: Log) -> Observers:
    """Status, metrics and the HTTP server that answers from them."""
    seen = watch(config, config_hash(config), device)
    server = HttpServer(config.http.listen, seen.status, seen.metrics.render)
    log.info("listening", address=server.start())
    stack.callback(server.close)
    return seen.observer


def _world(
    stack: ExitStack,
    store: CheckpointStore,
    config: Config,
    device: str,
    decode: Callable[[Messages], RecordBatch],
) -> World:
    deadline = Deadline(config.runtime.deadline)
    stack.callback(deadline.close)
    source = KafkaSource(config, deadline)
    stack.callback(source.close)
    delivery = open_delivery(config, deadline)
    stack.callback(delivery.publisher.close)
    return World(
        store=store,
        source=source,
        publisher=delivery.publisher,
        progress=delivery.progress,
        decode=decode,
        maker=engine_maker(config, device, store.directory / SCRATCH if store.directory else None),
        monotonic_s=time.monotonic,
        wall_s=time.time,
        new_id=lambda: secrets.token_hex(8),
        repeat=delivery.repeat,
    )


def _check_machine(config: Config, device: str, log: Log) -> Fingerprint:
    """
    The fingerprint, with what the self-test found.

    Raises :class:`~streamlstm.errors.ConfigError` when rows are not independent and ``on_mismatch`` is ``fail``.
    """
    doubts = doubt_rows(dependent_rows(Engine.create(config, device).shape, device))
    for told in doubts.values():
        if config.checkpoint.on_mismatch == "fail":
            raise ConfigError(
                f"checkpoint.on_mismatch: fail: the self-test failed, bits cannot be promised here: {told}"
            )
        log.error("the self-test failed: bits cannot be promised here, and no digest will be compared", what=told)
    return take_fingerprint(device, config.runtime.threads) | doubts


def _warn_of_another_life(config: Config, store: CheckpointStore, log: Log) -> None:
    """A first run, by all that is kept; but what was published tells whether it is. Advice: no start fails for it."""
    try:
        held = count_held(config, config.forecast_topic)
    except StreamlstmError:
        return
    if held:
        kept = store.name if config.sink.delivery == "idempotent" else f"{store.name} and {config.progress_topic}"
        log.warning(
            "this is a first run, but its topic holds forecasts already: if the deployment ran before, stop it now, "
            "bring back what it kept, and start again; else all is learnt and published anew from source.start on",
            topic=config.forecast_topic,
            offsets=held,
            kept_in=kept,
        )


def _terms(config: Config, fingerprint: Fingerprint, asked: Asked) -> Terms:
    return Terms(
        settings=Settings.of(config),
        start=config.source.start,
        fingerprint=fingerprint,
        on_mismatch=config.checkpoint.on_mismatch,
        read_timeout_s=config.runtime.deadline,
        on_gap=config.source.on_gap,
        fresh=asked.fresh,
        rebuild=asked.rebuild,
    )


def _pace(config: Config) -> Pace:
    return Pace(
        max_records=config.source.poll.max_records,
        poll_timeout_s=config.source.poll.timeout,
        commit_every_s=config.sink.commit_every,
        checkpoint_every_s=config.checkpoint.every.time,
        checkpoint_every_records=config.checkpoint.every.records,
        trim=config.sink.progress.trim,
        trouble_limit_s=config.runtime.deadline,
        shutdown_timeout_s=config.runtime.shutdown_timeout,
        fail_on_rejected=config.decode.on_error == "fail",
    )


def _warned(decoder: Decoder, log: Log) -> Callable[[Messages], RecordBatch]:
    """Decode, and say once of each kind what an operator may not expect."""
    told: set[str] = set()
    sightings = Sightings()

    def tell(what: str) -> None:
        if what not in told:
            told.add(what)
            log.warning(what)

    def decode(messages: Messages) -> RecordBatch:
        batch = decoder.decode(messages)
        if decoder.naive_times:
            tell("decode.timestamp: times without a zone are taken as UTC")
        if len(batch.reset_at):
            tell("decode.tombstone: messages without a value start the series of their key anew")
        elif batch.skipped:
            tell("decode.tombstone: messages without a value are passed over")
        if _SEVERAL not in told and sightings.see(batch.series):
            tell(_SEVERAL)
        return batch

    return decode
