"""
``streamlstm checkpoint``: what is stored, whether it is whole, and going back.

What the commands do stands in :mod:`streamlstm.cli.stored`, which loads torch, and a help text need not wait for that.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamlstm.cli.groups import Group
from streamlstm.cli.options import examples, with_loaded

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded

_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@click.group(
    cls=Group,
    epilog=examples(
        "streamlstm checkpoint list -c forecasts.yaml",
        "streamlstm checkpoint show latest -c forecasts.yaml",
        "streamlstm checkpoint restore 1200 -c forecasts.yaml --dry-run",
    ),
)
def checkpoint() -> None:
    """
    What is stored, and going back.

    An ID is a step number, or `latest`: the newest that is there.
    """


@checkpoint.command(
    "list",
    epilog=examples(
        "streamlstm checkpoint list -c forecasts.yaml",
        "streamlstm checkpoint list -c forecasts.yaml --json",
    ),
)
@with_loaded
@_json
def list_(loaded: "Loaded", *, as_json: bool) -> None:
    """
    List the checkpoints, oldest first, and check every byte of each.

    `series` are in memory, `stored` beyond series.max_series.

    The newest that is whole is marked: a start takes it, unless the chain was made to go on from an older one
    (`revert`), which is not asked here. Those that were put aside come last, by the name that `restore` knows them by.
    Reads only; a running service is not disturbed.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.list_all(loaded, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint show latest -c forecasts.yaml",
        "streamlstm checkpoint show 1200 -c forecasts.yaml --json | jq .config.differs",
    )
)
@click.argument("ident", metavar="ID")
@with_loaded
@_json
def show(loaded: "Loaded", ident: str, *, as_json: bool) -> None:
    """
    Show everything that a checkpoint says of itself.

    When and by whom it was made and where it stands; how its configuration and machine differ from what is here and
    now; what is in it. Its bytes are checked first. Reads only; a running service is not disturbed.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.show(loaded, ident, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint verify -c forecasts.yaml",
        "streamlstm checkpoint verify latest -c forecasts.yaml --json",
    )
)
@click.argument("ident", metavar="[ID]", required=False)
@with_loaded
@_json
def verify(loaded: "Loaded", ident: str | None, *, as_json: bool) -> None:
    """
    Check one checkpoint, or all: every byte, and that it can be read as a state.

    Exit 65 when one is bad, with the file at fault, and when there is none. Changes nothing: a start puts a bad one
    aside, not this. Those that were put aside before are not checked again. A running service is not disturbed; what it
    prunes meanwhile is passed over, and when that was all, the exit is 75.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.verify(loaded, ident, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint diff 1200 latest -c forecasts.yaml",
        "streamlstm checkpoint diff 1200 latest -c forecasts.yaml --json | jq .series.columns",
    )
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@with_loaded
@_json
def diff(loaded: "Loaded", a: str, b: str, *, as_json: bool) -> None:
    """
    Say how two checkpoints differ, to the bit.

    A and B are IDs, or paths of archives or of directories that hold one checkpoint. Says where they stand, what
    learning and series differ in, and plainly whether the two states are the same bits. Reads only.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.diff(loaded, a, b, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint restore 1200 -c forecasts.yaml --dry-run",
        "streamlstm checkpoint restore 1200 -c forecasts.yaml",
        "streamlstm checkpoint restore 00000000000000001200.bad-1 -c forecasts.yaml",
        "streamlstm checkpoint restore /backup/forecasts-1200.tar -c forecasts.yaml",
    )
)
@click.argument("what", metavar="ID|NAME|PATH")
@with_loaded
@_dry_run
@_json
def restore(loaded: "Loaded", what: str, *, dry_run: bool, as_json: bool) -> None:
    """
    Let the next start take this checkpoint.

    Newer ones are put aside, not deleted. The next start computes the recorded steps after it once more: the same
    bits, and nothing is published again. To go back and learn otherwise, see `revert`.

    NAME is one that was put aside (see `list`); PATH an archive that `export` wrote, or a copied directory. Both are
    refused if they are damaged, or of another deployment or run. One that a `revert` left behind is put aside again by
    the next start. Exit 75 while the service runs.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.restore(loaded, what, dry_run=dry_run, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint revert 1200 -c forecasts.yaml --exclude metrics.raw:3:88120-88460 --dry-run",
        "streamlstm checkpoint revert 1200 -c forecasts.yaml --exclude metrics.raw:3:88120-88460",
    )
)
@click.argument("ident", metavar="ID")
@with_loaded
@click.option(
    "--exclude",
    "excluded",
    multiple=True,
    metavar="TOPIC:PARTITION:FROM-TO",
    help="Learn without these offsets, FROM included and TO not: it is the first that is used again; repeatable.",
)
@_dry_run
@_json
def revert(loaded: "Loaded", ident: str, *, excluded: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """
    Go back to this checkpoint and learn again from there.

    Recorded in the chain at once; the next start puts newer checkpoints aside, learns all that follows anew without
    the excluded ranges (and those excluded before), and publishes it again with the next revision. Readers tell by
    `model.revision`: of two forecasts with the same coordinates the higher one counts.

    Refused for a range that the checkpoint has learnt already, an input or a chain that is not retained from there
    on, and (75) while the service runs. Needs the broker. To only load an older checkpoint, see `restore`.
    """
    from streamlstm.cli import reverting  # noqa: PLC0415, because of what this module says first

    reverting.revert(loaded, ident, excluded, dry_run=dry_run, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint prune -c forecasts.yaml --dry-run",
        "streamlstm checkpoint prune -c forecasts.yaml --set checkpoint.keep.last=2",
    )
)
@with_loaded
@_dry_run
@_json
def prune(loaded: "Loaded", *, dry_run: bool, as_json: bool) -> None:
    """
    Remove now what checkpoint.keep does not keep.

    The service does so after each checkpoint; this is for a disk that is full meanwhile. The newest one that is whole
    always stays. Exit 75 while the service runs.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.prune(loaded, dry_run=dry_run, as_json=as_json)


@checkpoint.command(
    epilog=examples(
        "streamlstm checkpoint export latest -c forecasts.yaml --out /backup/forecasts.tar",
        "streamlstm checkpoint export 1200 -c forecasts.yaml --out forecasts-1200.tar",
    )
)
@click.argument("ident", metavar="ID")
@with_loaded
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file; it must not exist."
)
def export(loaded: "Loaded", ident: str, *, out: Path) -> None:
    """
    Write one checkpoint as an uncompressed tar, which `restore` takes.

    It appears only once it is whole and was read back; exit 74 when it cannot be written. A running service is not
    disturbed.
    """
    from streamlstm.cli import stored  # noqa: PLC0415, because of what this module says first

    stored.export(loaded, ident, out)
