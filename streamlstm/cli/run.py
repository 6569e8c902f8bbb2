"""``streamlstm run``: the service."""

from typing import TYPE_CHECKING

import click

from streamlstm.cli.options import examples, with_config

if TYPE_CHECKING:
    from streamlstm.config.model import Config


@click.command(
    epilog=examples(
        "streamlstm run -c forecasts.yaml",
        "streamlstm run -c forecasts.yaml --set checkpoint.url=/var/lib/streamlstm --set logging.format=json",
        "STREAMLSTM_HTTP__LISTEN=0.0.0.0:9108 streamlstm run -c forecasts.yaml",
    )
)
@with_config
@click.option(
    "--fresh",
    is_flag=True,
    help="Where the start would be refused because an identity key, a topic or its partitions were changed, input is "
    "gone or no checkpoint can be used: begin anew at source.start, and put the old checkpoints aside. Otherwise it "
    "does nothing.",
)
@click.option(
    "--rebuild-from-log",
    "rebuild",
    is_flag=True,
    help="Where no checkpoint can be used: compute everything again from the first record; nothing is published twice. "
    "Needs a progress topic that was never trimmed, and all of the input. Otherwise it does nothing.",
)
def run(config: "Config", *, fresh: bool, rebuild: bool) -> None:
    """
    Forecast and learn from Kafka until told to stop.

    Goes on where the last transaction ended, however the process was ended then. SIGTERM or Ctrl-C finishes the step,
    commits it, writes a checkpoint and exits 0; a second one leaves at once, and nothing is lost either.

    Exit codes: 65 the log or the checkpoints cannot be used, 69 no broker, 74 no checkpoint can be written, 75 restart
    me, 76 another process has taken over, 77 not authorised, 78 configuration.
    """
    from streamlstm.cli.serve import Asked, serve  # noqa: PLC0415, because --help need not wait for torch

    if fresh and rebuild:
        raise click.UsageError("--fresh begins anew and --rebuild-from-log goes on: choose one")
    serve(config, Asked(fresh=fresh, rebuild=rebuild))
