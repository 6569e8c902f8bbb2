"""``streamlstm produce``: load a file into Kafka."""

import os
from pathlib import Path

import click

from streamlstm.cli.options import examples, suggest


@click.command(
    epilog=examples(
        "streamlstm produce -c forecasts.yaml --to metrics.raw --from metrics.ndjson --key '$.host'",
        "streamlstm produce --bootstrap localhost:9092 --to ett --from ETTh2.csv --create-topic --partitions 4",
        "streamlstm produce -c forecasts.yaml --to metrics.raw --from metrics.ndjson --rate 1000",
    )
)
@click.option("--to", "topic", required=True, metavar="TOPIC", help="The topic to append to.")
@click.option(
    "--from",
    "files",
    required=True,
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="NDJSON, whose lines are sent as they are, or .csv, whose rows become JSON objects; repeatable.",
)
@click.option(
    "-c", "--config", "config_file", type=click.Path(path_type=Path), help="Take the broker from this YAML file."
)
@click.option("--set", "config_sets", multiple=True, metavar="KEY=VALUE", help="Override one key of it; repeatable.")
@click.option("--bootstrap", metavar="HOST:PORT", help="Or name the broker, and have no configuration.")
@click.option(
    "--key", metavar="PATH", help="Field that becomes the message's key, as $.host; records of a key stay in order."
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), help="Records per second.  [default: as fast as it goes]"
)
@click.option("--create-topic", is_flag=True, help="Make the topic first if it is not there.")
@click.option("--partitions", type=click.IntRange(1), help="Of a topic that is made.  [default: 1]")
def produce(
    *,
    topic: str,
    files: tuple[Path, ...],
    config_file: Path | None,
    config_sets: tuple[str, ...],
    bootstrap: str | None,
    key: str | None,
    rate: float | None,
    create_topic: bool,
    partitions: int | None,
) -> None:
    """
    Load files into Kafka.

    A record counts as loaded when the broker has it: the first that is not accepted ends the command with its reason.
    In CSV an empty cell becomes null, a number a number, anything else text.
    """
    if (config_file is None) == (bootstrap is None):
        raise click.UsageError("say where the broker is: -c FILE or --bootstrap HOST:PORT")
    if partitions is not None and not create_topic:
        raise click.UsageError("--partitions is for a topic that is made; add --create-topic")
    if config_sets and config_file is None:
        raise click.UsageError("--set overrides a key of the configuration; add -c FILE")
    # Imported here, because --help need not wait for kafka and pydantic.
    from streamlstm.cli.loading import Wanted, load_files, where  # noqa: PLC0415, because of the line above

    source, csv = where(config_file, config_sets, os.environ, bootstrap)
    made = load_files(
        Wanted(source, csv, topic, list(files), key, rate, (partitions or 1) if create_topic else None), say=_say
    )
    click.echo(made)
    if config_file is not None:
        suggest(f"streamlstm run -c {config_file}")


def _say(line: str) -> None:
    click.echo(line, err=True)
