"""What ``streamlstm verify`` does and prints. Apart from the command, because it loads torch and Kafka."""

import json
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from streamlstm.cli.delivery import progress_log
from streamlstm.cli.device import prepare_device
from streamlstm.cli.engines import engine_maker
from streamlstm.cli.options import suggest
from streamlstm.config.load import Loaded
from streamlstm.errors import DataError
from streamlstm.records.decode import compile_decoder
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.fingerprint import take_fingerprint
from streamlstm.recovery.progress import read_chain
from streamlstm.recovery.proof import (
    Bench,
    Mismatch,
    Verdict,
    expected_differences,
    find_start,
    nothing_compared,
    prove,
)
from streamlstm.recovery.provenance import Settings
from streamlstm.service.logging import configure_logging
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.kafka.preflight import preflight
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.topics import check_readable


def prove_chain(loaded: Loaded, first: int, last: int | None, *, as_json: bool) -> None:
    """``verify``: raises :class:`~streamlstm.errors.DataError` after the last line when something differs."""
    config = loaded.config
    configure_logging(config.logging.level, config.logging.format)
    device = prepare_device(config)
    for warning in preflight(config.source):
        click.echo(f"warning: {warning}", err=True)
    check_readable(config)
    with ExitStack() as stack:
        deadline = Deadline(config.runtime.deadline)
        stack.callback(deadline.close)
        store = open_store(config.checkpoint.url)
        chain = read_chain(progress_log(config, deadline).read(), config.name)
        generation = find_start(store, chain, first)
        until = chain.last_step if last is None else min(last, chain.last_step)
        expected = expected_differences(chain, generation, until, take_fingerprint(device, config.runtime.threads))
        for difference in expected:
            click.echo(f"warning: other bits are to be expected: {difference}", err=True)
        source = KafkaSource(config, deadline)
        stack.callback(source.close)
        bench = Bench(
            store,
            source,
            compile_decoder(config.decode).decode,
            engine_maker(config, device),
            Settings.of(config),
            config.runtime.deadline,
        )
        began = time.perf_counter()
        with _progress(until - generation.step) as each:
            verdict = prove(bench, chain, generation, until, each)
        seconds = time.perf_counter() - began
    nothing = nothing_compared(verdict, chain)
    if as_json:
        click.echo(json.dumps(_as_json(verdict, expected, seconds), indent=2))
        if nothing:
            click.echo(f"note: {nothing}", err=True)
    else:
        _print(verdict, seconds, nothing)
    if verdict.first is not None:
        raise DataError(_told(verdict, verdict.first))
    suggest(f"streamlstm checkpoint list -c {loaded.file}")


def _told(verdict: Verdict, first: Mismatch) -> str:
    cut = " ".join(f"{r.topic}-{r.partition}@{r.start}-{r.end}" for r in first.cut)
    what = "its outputs are" if first.what == "outputs" else f"after it the {first.what} are"
    return (
        f"{verdict.differing_steps} of {verdict.compared} steps and {verdict.differing_states} of "
        f"{len(verdict.states)} states differ, first step {first.step} ({cut}): {what} not those that were recorded"
    )


def _print(verdict: Verdict, seconds: float, nothing: str) -> None:
    """Facts, a line each; last what they come to."""
    click.echo(f"from the checkpoint of step {verdict.start} to step {verdict.last}")
    click.echo(f"  steps    {verdict.steps:,} computed again, {verdict.compared:,} compared with the chain")
    click.echo(f"  records  {verdict.records:,} in {verdict.messages:,} messages")
    click.echo(f"  updates  {verdict.updates:,}")
    states = ", ".join(map(str, verdict.states)) or "none lies on the way"
    click.echo(f"  states   compared with the checkpoints of steps: {states}")
    for passed in verdict.passed:
        click.echo(f"           not with that of step {passed.step}, which is bad: {passed.reason}")
    click.echo(
        f"  time     {seconds:.1f} s, {verdict.messages / max(seconds, 1e-9):,.0f} messages/s, nothing published"
    )
    click.echo(nothing or ("all the same, to the bit" if verdict.holds else "NOT the same"))


def _as_json(verdict: Verdict, expected: list[str], seconds: float) -> dict[str, object]:
    first = verdict.first
    return {
        "holds": verdict.holds,
        "from": verdict.start,
        "to": verdict.last,
        "steps": verdict.steps,
        "compared": verdict.compared,
        "messages": verdict.messages,
        "records": verdict.records,
        "updates": verdict.updates,
        "states": verdict.states,
        "bad_states": [{"step": passed.step, "reason": passed.reason} for passed in verdict.passed],
        "differing_steps": verdict.differing_steps,
        "differing_states": verdict.differing_states,
        "first_difference": first and {"step": first.step, "what": first.what, "cut": [r._asdict() for r in first.cut]},
        "other_bits_expected": expected,
        "seconds": round(seconds, 3),
        "messages_per_second": round(verdict.messages / max(seconds, 1e-9)),
    }


@contextmanager
def _progress(steps: int) -> Generator[Callable[[Verdict], None], None, None]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("computing again"), BarColumn(), TextColumn("step {task.completed}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps)
        yield lambda verdict: bar.update(task, completed=verdict.steps)
