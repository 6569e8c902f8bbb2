"""``streamlstm demo``: forecasts of this machine, live."""

from typing import Literal

import click

from streamlstm.cli.options import examples, suggest


@click.command(
    epilog=examples(
        "streamlstm demo",
        "streamlstm demo --seconds 0",
        "streamlstm demo --source synthetic --port 0",
    )
)
@click.option(
    "--source",
    type=click.Choice(["host", "synthetic"]),
    help="This machine's own metrics from /proc, or generated ones.  [default: host where there is a /proc]",
)
@click.option(
    "--seconds", type=click.IntRange(min=0), default=60, show_default=True, help="How long; 0 = until Ctrl-C."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=9108, show_default=True, help="Of /metrics; 0 = a free one."
)
def demo(source: Literal["host", "synthetic"] | None, seconds: int, port: int) -> None:
    """
    Forecast this machine, live; no broker, no config.

    CPU, memory, load, disk and network, once a second, forecast and learnt as they come.
    """
    # Imported here, because it loads torch, which takes longer than a help text may.
    from streamlstm.cli.demonstration import demonstrate  # noqa: PLC0415, because of the line above

    demonstrate(source, seconds, port)
    suggest("streamlstm replay --help")
