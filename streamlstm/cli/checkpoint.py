"""``streamlstm checkpoint``: what is stored."""

import json
from typing import TYPE_CHECKING, Any

import click

from streamlstm.cli.groups import Group
from streamlstm.cli.options import examples, suggest, with_loaded

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded
    from streamlstm.recovery.checkpoint import CheckpointStore


@click.group(cls=Group, epilog=examples("streamlstm checkpoint list -c forecasts.yaml"))
def checkpoint() -> None:
    """What is stored."""


@checkpoint.command(
    "list",
    epilog=examples(
        "streamlstm checkpoint list -c forecasts.yaml",
        "streamlstm checkpoint list -c forecasts.yaml --json",
    ),
)
@with_loaded
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def list_(loaded: "Loaded", *, as_json: bool) -> None:
    """
    List the checkpoints, oldest first, and check every byte of each.

    Reads only; a running service is not disturbed. Those that were put aside as bad are listed by name.
    """
    # Imported here, because a help text need not wait for torch.
    from streamlstm.recovery.checkpoint import open_store  # noqa: PLC0415, because of the line above

    store = open_store(loaded.config.checkpoint.url)
    rows = [row for step in store.steps() if (row := _describe(store, step)) is not None]
    aside = store.bad()
    if as_json:
        click.echo(json.dumps({"directory": store.name, "checkpoints": rows, "put_aside": aside}, indent=2))
        return
    if not rows:
        click.echo(f"no checkpoint in {store.name}")
    else:
        _print(rows)
    for name in aside:
        click.echo(f"put aside as bad: {name}", err=True)
    if rows:
        suggest(f"streamlstm run -c {loaded.file}")


def _describe(store: "CheckpointStore", step: int) -> dict[str, Any] | None:
    """One checkpoint as JSON values; ``None`` for one that was pruned while we looked."""
    from datetime import UTC, datetime  # noqa: PLC0415, because a help text need not wait for it

    from streamlstm.errors import CheckpointError  # noqa: PLC0415, because a help text need not wait for it

    try:
        found = store.verify(step)
    except (CheckpointError, OSError) as error:
        return {"step": step, "valid": False, "reason": str(error)} if step in store.steps() else None
    made = found.provenance
    return {
        "step": step,
        "valid": True,
        "time": datetime.fromtimestamp(made.created_ms / 1000, UTC)
        .isoformat(timespec="seconds")
        .replace("+00:00", "Z"),
        "bytes": found.bytes,
        "series": found.series,
        "config": made.settings.hash[:8],
        "positions": [p._asdict() for p in made.positions],
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console  # noqa: PLC0415, because a help text need not wait for it
    from rich.table import Table  # noqa: PLC0415, because a help text need not wait for it

    table = Table(box=None, pad_edge=False)
    for name in ("step", "time", "bytes", "series", "valid", "positions"):
        table.add_column(name, justify="right" if name in ("step", "bytes", "series") else "left")
    for row in rows:
        if row["valid"]:
            where = " ".join(f"{p['topic']}-{p['partition']}@{p['next_offset']}" for p in row["positions"])
            table.add_row(str(row["step"]), row["time"], f"{row['bytes']:,}", f"{row['series']:,}", "yes", where)
        else:
            table.add_row(str(row["step"]), "", "", "", f"no: {row['reason']}", "")
    Console(soft_wrap=True).print(table)
