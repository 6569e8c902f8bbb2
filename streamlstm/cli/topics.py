"""``streamlstm topics``: the topics a deployment writes to."""

import json
from typing import TYPE_CHECKING

import click

from streamlstm.cli.groups import Group
from streamlstm.cli.options import examples, suggest, with_loaded

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded
    from streamlstm.transport.kafka.topics import Made


@click.group(cls=Group, epilog=examples("streamlstm topics create -c forecasts.yaml"))
def topics() -> None:
    """The topics a deployment writes to."""


@topics.command(
    epilog=examples(
        "streamlstm topics create -c forecasts.yaml --dry-run",
        "streamlstm topics create -c forecasts.yaml --replication 3",
    )
)
@with_loaded
@click.option("--dry-run", is_flag=True, help="Only say what would be created.")
@click.option(
    "--partitions",
    type=click.IntRange(1),
    help="Of forecasts and dead letters.  [default: as many as the widest input has]",
)
@click.option("--replication", type=click.IntRange(1), help="Copies of each partition.  [default: the broker's]")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def create(loaded: "Loaded", *, dry_run: bool, partitions: int | None, replication: int | None, as_json: bool) -> None:
    """
    Create the output, dead-letter and progress topics with the right settings; no progress topic with
    sink.delivery: idempotent.

    Those that are there already are left as they are; in what they differ is said. Run it as often as you like.
    """
    from streamlstm.transport.kafka.preflight import preflight  # noqa: PLC0415, because --help need not wait for kafka
    from streamlstm.transport.kafka.topics import create_topics  # noqa: PLC0415, because of the same

    for warning in preflight(loaded.config.source):
        click.echo(f"warning: {warning}", err=True)
    made = create_topics(loaded.config, dry_run=dry_run, partitions=partitions, replicas=replication)
    if as_json:
        click.echo(json.dumps([_as_json(m) for m in made], indent=2))
    else:
        _print(made)
    suggest(f"streamlstm topics create -c {loaded.file}" if dry_run else f"streamlstm run -c {loaded.file}")


def _as_json(made: "Made") -> dict[str, object]:
    return {
        "topic": made.plan.name,
        "role": made.plan.role,
        "outcome": made.outcome,
        "partitions": made.plan.partitions,
        "settings": dict(made.plan.settings),
        "differs": list(made.differs),
    }


def _print(made: "list[Made]") -> None:
    """A line for each topic, and one for each way in which it is not what would be created."""
    outcome = max(len(m.outcome) for m in made)
    name = max(len(m.plan.name) for m in made)
    for m in made:
        click.echo(f"{m.outcome:<{outcome}}  {m.plan.name:<{name}}  {m.plan.role}, partitions: {m.plan.partitions}")
        for difference in m.differs:
            click.echo(f"{'':<{outcome}}  differs: {difference}")
