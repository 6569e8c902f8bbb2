"""``streamlstm config``: is it right, and what is in force."""

import json
from typing import TYPE_CHECKING

import click

from streamlstm.cli.groups import Group
from streamlstm.cli.options import examples, suggest, with_loaded

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded


@click.group(
    cls=Group,
    epilog=examples(
        "streamlstm config validate -c forecasts.yaml",
        "streamlstm config show -c forecasts.yaml --origin",
    ),
)
def config() -> None:
    """Validate or show a configuration."""


@config.command(
    epilog=examples(
        "streamlstm config validate -c forecasts.yaml",
        "streamlstm config validate -c forecasts.yaml --set model.horizons=48",
    )
)
@with_loaded
def validate(loaded: "Loaded") -> None:
    """Check a configuration: all that is wrong at once."""
    # Imported here, as are all modules that a help text does not need.
    from streamlstm.config.keys import config_hash  # noqa: PLC0415, because of the line above
    from streamlstm.records.mapping import compile_plan  # noqa: PLC0415, because of the line above

    made, file = loaded.config, loaded.file
    if made.decode.format != "csv":  # a csv file's own header is what its paths are read against
        compile_plan(made.decode)
    click.echo(f"{file}: OK")
    season = made.season or "none"
    facts = {
        "name": f"{made.name} (config {config_hash(made)[:8]})",
        "decode": f"{made.decode.format}, series by {'|'.join(made.decode.series_id)}",
        "model": f"LSTM {made.model.hidden_size}, horizons 1..{made.model.horizons}, season {season}",
        "training": (
            f"k1 {made.training.k1}, k2 {made.k2}, Adam {made.learning_rate:g}" if made.training.enabled else "off"
        ),
    }
    if made.source.type == "kafka":
        chain = [made.progress_topic] if made.sink.delivery == "exactly_once" else []
        facts |= {
            "reads": f"{', '.join(made.source.topics)} from {', '.join(made.source.bootstrap_servers)}",
            "writes": ", ".join([made.forecast_topic, made.dead_letter_topic, *chain]),
            "delivery": made.sink.delivery,
            "state": made.checkpoint.url,
        }
    for name, fact in facts.items():
        click.echo(f"  {name:<9} {fact}")
    if made.source.type == "kafka":
        suggest(f"streamlstm topics create -c {file}")
    else:
        suggest(f"streamlstm replay -c {file} --from FILE")


@config.command(
    epilog=examples(
        "streamlstm config show -c forecasts.yaml",
        "streamlstm config show -c forecasts.yaml --origin",
        "streamlstm config show -c forecasts.yaml --json | jq .model",
    )
)
@with_loaded
@click.option("--origin", is_flag=True, help="Say where each key was set.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
def show(loaded: "Loaded", *, origin: bool, as_json: bool) -> None:
    """Print what is in force, defaults included."""
    from streamlstm.config.docs import origin_of, to_yaml  # noqa: PLC0415, because a help text does not need it
    from streamlstm.config.keys import values  # noqa: PLC0415, because a help text does not need it

    if not as_json:
        click.echo(to_yaml(loaded.config, loaded.origins if origin else None), nl=False)
        return
    plain = loaded.config.model_dump(mode="json")
    if origin:
        plain = {
            path: {"value": value, "origin": origin_of(loaded.origins, path)}
            for path, value in values(loaded.config).items()
        }
    click.echo(json.dumps(plain, indent=2))
