"""
Command groups: commands that are imported only when they are used, and an answer to a mistyped name.

A help page costs no more than click: ``--help`` prints what stands in the table, not what the modules say.
"""

import importlib
import select
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import click


class Group(click.Group):
    """A group that answers a mistyped command with the one that was probably meant (exit 2)."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one is near. click's own suggestion knows no lazy commands."""
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(known)}"
            ctx.fail(f"no such command '{name}': {hint}")
        return super().resolve_command(ctx, args)


def _nobody_reads_our_output() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class Entry(NamedTuple):
    """One command: where it lives (``module:attribute``), its line in the help, and the heading it stands under."""

    target: str
    help: str
    heading: str


class LazyGroup(Group):
    """
    A group whose commands are named by dotted path.

    ``entries`` is in the order of the help page; a heading is printed where it changes.
    """

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **kwargs: Any) -> None:  # noqa: ANN401, because they are click's own
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the table's order."""
        del ctx
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        del ctx
        if cmd_name not in self.entries:
            return None
        module, _, attribute = self.entries[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{module}:{attribute} is no command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list under its headings, without importing any of them."""
        del ctx
        width = max(map(len, self.entries))
        for heading in dict.fromkeys(entry.heading for entry in self.entries.values()):
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (name.ljust(width), entry.help)
                        for name, entry in self.entries.items()
                        if entry.heading == heading
                    ]
                )

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401, because click says so
        """Run it. Of all pipes that may break, only our own output's is nothing to talk about."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if _nobody_reads_our_output():
                raise
            # click would end quietly on any EPIPE, and a lost connection must not look like `| head`.
            raise RuntimeError("a connection broke, and nobody dealt with it") from error
