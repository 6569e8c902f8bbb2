"""
Options that several commands share, and how they end: examples in the help, the next command afterwards.

::

    @click.command(epilog=examples("streamlstm run -c forecasts.yaml"))
    @with_config
    def run(config: Config) -> None: ...
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded

R = TypeVar("R")


def with_loaded(command: Callable[..., R]) -> Callable[..., R]:
    """
    ``-c/--config FILE`` and ``--set KEY=VALUE``: the command's first argument is the configuration with its origins.

    It is a :class:`~streamlstm.config.load.Loaded`. What is wrong with the configuration is raised before the command
    begins (:class:`~streamlstm.errors.ConfigError`, exit 78).
    """

    @click.option(
        "-c", "--config", "config_file", required=True, type=click.Path(path_type=Path), help="The YAML file."
    )
    @click.option("--set", "config_sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable.")
    @functools.wraps(command)
    def load_first(config_file: Path, config_sets: tuple[str, ...], **options: object) -> R:
        # Imported here, because pydantic would take longer than the whole of --help.
        from streamlstm.config.load import load  # noqa: PLC0415, because of the line above

        return command(load(config_file, sets=config_sets, environ=os.environ), **options)

    return load_first


def with_config(command: Callable[..., R]) -> Callable[..., R]:
    """Like :func:`with_loaded`; the command's first argument is the :class:`~streamlstm.config.model.Config` itself."""

    @with_loaded
    @functools.wraps(command)
    def unwrap(loaded: "Loaded", **options: object) -> R:
        return command(loaded.config, **options)

    return unwrap


def examples(*lines: str) -> str:
    r"""
    The end of a help text.

    >>> examples("streamlstm run -c a.yaml")
    '\x08\nExamples:\n  streamlstm run -c a.yaml'
    """
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def suggest(command: str) -> None:
    """Name the next command, after success, to a person: on stderr, and only on a terminal."""
    if sys.stderr.isatty():
        click.echo(f"next: {command}", err=True)
