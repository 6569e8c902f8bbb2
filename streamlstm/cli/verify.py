"""``streamlstm verify``: the recorded steps computed again, and every digest compared."""

from typing import TYPE_CHECKING

import click

from streamlstm.cli.options import examples, with_loaded

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded


@click.command(
    epilog=examples(
        "streamlstm verify -c forecasts.yaml --from 1200",
        "streamlstm verify -c forecasts.yaml --from 1200 --to 1500 --json",
    )
)
@with_loaded
@click.option(
    "--from",
    "first",
    type=click.IntRange(min=0),
    required=True,
    metavar="STEP",
    help="From the checkpoint of this step, or the newest before it.",
)
@click.option("--to", "last", type=click.IntRange(min=1), metavar="STEP", help="[default: the newest committed one]")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def verify(loaded: "Loaded", *, first: int, last: int | None, as_json: bool) -> None:
    """
    Prove what was learnt and published.

    Loads a checkpoint, reads the recorded cuts from Kafka again, computes them again, and compares the digest of each
    step with the one that was committed with its forecasts; and, where another checkpoint lies on the way, its weights,
    training and series too. Publishes and writes nothing; a running service is not disturbed.

    Exit 0 when all is the same to the bit, 65 with the first difference when it is not, or when the chain ends before
    `--from`. On another machine or with other libraries differences are to be expected, and that is said first.
    """
    if last is not None and last < first:
        raise click.UsageError(f"--to {last} is before --from {first}")
    from streamlstm.cli.proving import prove_chain  # noqa: PLC0415, because it loads torch, and --help need not wait

    prove_chain(loaded, first, last, as_json=as_json)
