"""What ``streamlstm checkpoint revert`` does and prints. Apart from the command, because it loads torch and Kafka."""

import json
import re
import secrets
from collections.abc import Sequence
from contextlib import ExitStack

import click

from streamlstm.cli.delivery import open_delivery
from streamlstm.cli.options import suggest
from streamlstm.config.load import Loaded
from streamlstm.config.model import Config
from streamlstm.records.batch import Range
from streamlstm.recovery.branching import revert as go_back
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.inspection import step_of
from streamlstm.recovery.outlook import Outlook, look_ahead
from streamlstm.recovery.progress import read_chain
from streamlstm.service.logging import configure_logging
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import Position
from streamlstm.transport.kafka.preflight import preflight
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.topics import check_readable

_RANGE = re.compile(r"(?P<topic>[^:]+):(?P<partition>\d+):(?P<start>\d+)-(?P<end>\d+)")


def revert(loaded: Loaded, ident: str, excluded: Sequence[str], *, dry_run: bool, as_json: bool) -> None:
    """``checkpoint revert``."""
    config = loaded.config
    ranges = [parse_range(told) for told in excluded]
    configure_logging(config.logging.level, config.logging.format)
    for warning in preflight(config.source):
        click.echo(f"warning: {warning}", err=True)
    with ExitStack() as stack:
        store = open_store(config.checkpoint.url)
        step = step_of(store, ident)
        check_readable(config)
        deadline = Deadline(config.runtime.deadline)
        stack.callback(deadline.close)
        delivery = open_delivery(config, deadline)
        chain = read_chain(delivery.progress.read(), config.name)
        outlook = look_ahead(store, chain, _earliest(config, deadline), step, ranges)
        if not dry_run and not outlook.done:
            stack.callback(store.leave)
            stack.callback(delivery.publisher.close)
            go_back(
                store, delivery.publisher, delivery.progress, config.name, step, ranges, lambda: secrets.token_hex(8)
            )
    if as_json:
        click.echo(json.dumps(_as_json(outlook, dry_run=dry_run), indent=2))
    else:
        _print(outlook, dry_run=dry_run)
    options = "".join(f" --exclude {told}" for told in excluded)
    again = f"streamlstm checkpoint revert {ident} -c {loaded.file}{options}"
    suggest(again if dry_run else f"streamlstm run -c {loaded.file}")


def parse_range(told: str) -> Range:
    """
    ``topic:partition:from-to``, ``to`` not included.

    >>> parse_range("metrics.raw:3:88120-88460")
    Range(topic='metrics.raw', partition=3, start=88120, end=88460)
    """
    found = _RANGE.fullmatch(told)
    if found is None:
        raise click.BadParameter(
            f"{told!r}: write topic:partition:from-to, as in metrics.raw:3:88120-88460", param_hint="--exclude"
        )
    return Range(found["topic"], int(found["partition"]), int(found["start"]), int(found["end"]))


def _earliest(config: Config, deadline: Deadline) -> Sequence[Position]:
    source = KafkaSource(config, deadline)
    try:
        return source.resolve_start("earliest")
    finally:
        source.close()


def _as_json(outlook: Outlook, *, dry_run: bool) -> dict[str, object]:
    step = outlook.generation.step
    return {
        "step": step,
        "revision": outlook.revision - outlook.done,
        "relearnt": {
            "steps": outlook.steps,
            "offsets": outlook.offsets - outlook.passed_over,
            "passed_over": outlook.passed_over,
        },
        "excluded": [r._asdict() for r in outlook.excluded],
        "put_aside_at_next_start": list(outlook.beyond),
        "already_done": outlook.done,
        "dry_run": dry_run,
    }


def _print(outlook: Outlook, *, dry_run: bool) -> None:
    step = outlook.generation.step
    if outlook.done:
        click.echo(
            f"the chain goes on from step {step} already, with revision {outlook.revision - 1}; nothing was done"
        )
        return
    beyond = (
        f"; what it holds beyond, up to step {outlook.last_step}, {'would count' if dry_run else 'counts'} no more"
        if outlook.last_step > step
        else ""
    )
    click.echo(
        f"the chain {'would go' if dry_run else 'goes'} on from step {step}, with revision {outlook.revision}{beyond}"
    )
    click.echo(
        f"the next start learns {outlook.offsets - outlook.passed_over:,} offsets again and publishes them again "
        f"(they were {outlook.steps:,} steps)"
    )
    for r in outlook.excluded:
        click.echo(f"passed over from now on: {r.topic}-{r.partition}, offsets {r.start} to {r.end - 1}")
    for other in outlook.beyond:
        click.echo(f"the next start puts the checkpoint of step {other} aside")
    click.echo(
        "readers: of two forecasts with the same coordinates the higher model.revision counts, here "
        f"{outlook.revision}; what is passed over gets no new one, and those it had are to be dropped"
    )
