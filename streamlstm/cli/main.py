"""
``streamlstm``: the table of commands, and the one place where an exception becomes an exit code.

stdout is data; stderr is logs, progress and errors.
"""

import os
import sys
from collections.abc import Sequence

import click

from streamlstm import __version__
from streamlstm.cli.groups import Entry, LazyGroup
from streamlstm.cli.options import examples
from streamlstm.errors import ConfigError, StreamlstmError
from streamlstm.transport.deadline import end

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_FORECAST, _SETUP, _WATCH = "Forecast", "Set up", "Look after it"

COMMANDS = {
    "run": Entry("streamlstm.cli.run:run", "The service: forecast and learn from Kafka.", _FORECAST),
    "replay": Entry("streamlstm.cli.replay:replay", "Forecast history and score it.", _FORECAST),
    "demo": Entry("streamlstm.cli.demo:demo", "Forecast this machine, live; no broker, no config.", _FORECAST),
    "config": Entry("streamlstm.cli.config:config", "Validate or show a configuration.", _SETUP),
    "topics": Entry("streamlstm.cli.topics:topics", "Create the topics a deployment writes to.", _SETUP),
    "produce": Entry("streamlstm.cli.produce:produce", "Load a file into Kafka.", _SETUP),
    "checkpoint": Entry("streamlstm.cli.checkpoint:checkpoint", "What is stored, and going back.", _WATCH),
    "verify": Entry("streamlstm.cli.verify:verify", "Prove what was learnt and published.", _WATCH),
    "health": Entry("streamlstm.cli.health:health", "Ask a running service whether it is well.", _WATCH),
}


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "streamlstm demo",
        "streamlstm replay -c config/etth2.yaml --from ETTh2.csv",
        "streamlstm run -c config/minimal.yaml",
    ),
)
@click.version_option(__version__, prog_name="streamlstm")
def cli() -> None:
    """Forecasts time series while it learns them: a stateful LSTM on Kafka streams, exactly once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; leave with it where a call that hangs would hold up the end."""
    code = _run(argv)
    end(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    """
    Run one command and return its exit code.

    A :class:`StreamlstmError` is one message on stderr and its own code, Ctrl-C is 130, a reader of our output that
    went away is a quiet 1. Anything else is a defect: it keeps its traceback, and Python exits 1.
    """
    colour = False if os.environ.get("NO_COLOR") else None
    try:
        code = cli.main(
            args=None if argv is None else list(argv), prog_name="streamlstm", standalone_mode=False, color=colour
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # Or Python tries to flush once more on its way out, and says so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StreamlstmError as error:
        label = click.style("error:", fg="red", bold=True)
        click.echo(f"streamlstm: {label} {_visible(error)}", err=True, color=colour)
        return error.exit_code
    # Commands return nothing; a number is what --help, --version or ctx.exit() ended with.
    return code if isinstance(code, int) else 0


def _visible(error: StreamlstmError) -> str:
    """
    Its message, with control characters escaped: no name from outside may forge a line or steer a terminal.

    Only a :class:`ConfigError` has lines of its own, one per problem; what it quotes is escaped already.
    """
    kept = " \n" if isinstance(error, ConfigError) else " "
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in str(error))


if __name__ == "__main__":
    sys.exit(main())
