"""
What ``streamlstm demo`` does: the program on this machine's own series, with a table and ``/metrics``.

Apart from :mod:`streamlstm.cli.demo`, because it loads torch, and a help text must not wait.
"""

import math
import statistics
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Literal

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from streamlstm.cli.board import Board, show, show_skill
from streamlstm.cli.device import prepare_device
from streamlstm.cli.engines import engine_maker
from streamlstm.config.keys import config_hash, learning_values
from streamlstm.config.model import Config
from streamlstm.errors import ConfigError
from streamlstm.records.decode import compile_decoder
from streamlstm.recovery.making import Steppable
from streamlstm.service.http import HttpServer
from streamlstm.service.logging import configure_logging
from streamlstm.service.observer import Committed, StepTimings
from streamlstm.service.watch import Watch, watch
from streamlstm.transport.host import DECODE, HostSource, SyntheticSource, available
from streamlstm.transport.interfaces import Position

_AHEAD = 10
_LINE_EVERY_S = 5.0
_MOST_ROWS = 40
_SPEED = 10.0  # generated series live so much faster than the clock

# Small, so that a minute is long enough to see it learn: a series' first window is complete after k2 seconds.
CONFIG = {
    "name": "demo",
    "source": {"type": "files"},
    "decode": DECODE.model_dump(),
    "series": {"interval": "1s"},
    "model": {"hidden_size": 32, "horizons": 12, "calendar": []},
    "training": {"k1": 1, "k2": 16, "optimizer": {"lr": 0.004}},
}


def demonstrate(source: Literal["host", "synthetic"] | None, seconds: int, port: int) -> None:
    """Run for so many seconds (0: until Ctrl-C), then say what came of it."""
    configure_logging("warning")
    config = Config.model_validate(CONFIG)
    kind = source or ("host" if available() else "synthetic")
    if kind == "host" and not available():
        raise ConfigError("--source host: there is no /proc here; take --source synthetic")
    made = (
        HostSource(clock_ns=time.time_ns, sleep=time.sleep)
        if kind == "host"
        else SyntheticSource(clock_ns=time.time_ns, sleep=time.sleep, speed=_SPEED)
    )
    device = prepare_device(config)
    seen = watch(config, config_hash(config), device)
    board = Board(_AHEAD)
    loop = _Loop(config, engine_maker(config, device).create(learning_values(config)), made, seen, board)
    with _served(seen, port) as address:
        what = "this machine" if kind == "host" else f"generated series, {_SPEED:g} s of theirs in one of ours,"
        until = f"for {seconds} s" if seconds else "until Ctrl-C"
        click.echo(f"forecasting {what} {until}; metrics at http://{address}/metrics", err=True)
        try:
            _show_while(loop, board, seconds)
        except KeyboardInterrupt:
            click.echo(err=True)
        finally:
            made.close()
    for line in _summary(loop, board):
        click.echo(line)


class _Loop:
    """Poll → decode → step → observe: the service's loop, with nothing to publish to."""

    def __init__(
        self, config: Config, engine: Steppable, source: HostSource | SyntheticSource, seen: Watch, board: Board
    ) -> None:
        self._decode = compile_decoder(config.decode).decode
        self._engine = engine
        self._source = source
        self._seen = seen
        self._board = board
        self.updates = 0
        self.records = 0
        seen.observer.observe_phase("running")

    def turn(self, timeout_s: float) -> None:
        """One turn: wait so long for records, take in those that came."""
        began_s = time.monotonic()
        self._seen.observer.observe_turn(began_s)
        messages = self._source.poll(1000, timeout_s)
        polled_s = time.monotonic()
        if messages is None:
            return
        batch = self._decode(messages)
        decoded_s = time.monotonic()
        report = self._engine.step(batch)
        timings = StepTimings(polled_s - began_s, decoded_s - polled_s, time.monotonic() - decoded_s)
        sizes = {messages.cut[0].topic: sum(len(value or b"") for value in messages.value)}
        positions = [Position(r.topic, r.partition, r.end) for r in messages.cut]
        self._seen.observer.observe_step(report, timings, sizes)
        self._seen.observer.observe_commit(
            Committed([report], len(report.forecasts), 0, 0, 0.0, time.time(), positions)
        )
        self._board.update(report)
        self.updates += sum(not update.skipped for update in report.updates)
        self.records += sum(report.counts().values())


@contextmanager
def _served(seen: Watch, port: int) -> Generator[str, None, None]:
    """``/metrics`` on this port, or on a free one when it is taken."""
    server = HttpServer(f"127.0.0.1:{port}", seen.status, seen.metrics.render)
    try:
        address = server.start()
    except ConfigError:
        click.echo(f"port {port} is taken; using a free one", err=True)
        server = HttpServer("127.0.0.1:0", seen.status, seen.metrics.render)
        address = server.start()
    try:
        yield address
    finally:
        server.close()


def _show_while(loop: _Loop, board: Board, seconds: int) -> None:
    """Turn the loop until the time is over, and show: a table that updates on a terminal, a line now and then else."""
    console = Console(file=sys.stdout)
    began_s = time.monotonic()

    def left_s() -> float:
        return began_s + seconds - time.monotonic() if seconds else 1.0

    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while (left := left_s()) > 0:
                loop.turn(min(1.0, left))
                live.update(_table(board, _caption(loop, board, time.monotonic() - began_s)), refresh=True)
        return
    told_s = began_s
    while (left := left_s()) > 0:
        loop.turn(min(1.0, left))
        if time.monotonic() - told_s >= _LINE_EVERY_S:
            told_s = time.monotonic()
            click.echo(_caption(loop, board, told_s - began_s))


def _caption(loop: _Loop, board: Board, elapsed_s: float) -> str:
    return f"{elapsed_s:.0f} s · {len(board)} series · {loop.records:,} records · {loop.updates:,} updates"


def _table(board: Board, caption: str) -> Table:
    """The board, as many rows of it as a screen takes."""
    table = Table(caption=caption, caption_justify="left")
    table.add_column("series", overflow="ellipsis", no_wrap=True)
    for title in ("now", "in 1 s", f"in {board.ahead} s", "error", "skill"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status")
    for row in list(board)[:_MOST_ROWS]:
        style = "" if row.warming or not row.skill > 0 else "green"
        table.add_row(
            row.series,
            show(row.now),
            show(row.soon),
            show(row.later),
            show(row.error),
            show_skill(row.skill),
            "warming" if row.warming else "ready",
            style=style,
        )
    return table


def _summary(loop: _Loop, board: Board) -> Iterator[str]:
    """What came of it, as lines that need no terminal."""
    yield f"{'series':<32} {'now':>12} {'in 1 s':>12} {f'in {board.ahead} s':>12} {'error':>12} {'skill':>7} status"
    for row in board:
        yield (
            f"{row.series:<32} {show(row.now):>12} {show(row.soon):>12} {show(row.later):>12} "
            f"{show(row.error):>12} {show_skill(row.skill):>7} {'warming' if row.warming else 'ready'}"
        )
    skills = [row.skill for row in board if not math.isnan(row.skill)]
    yield ""
    yield f"{loop.records:,} records of {len(board)} series, {loop.updates:,} updates of the weights"
    if skills:
        better = sum(skill > 0 for skill in skills)
        yield (
            f"skill against the last value: median {show_skill(statistics.median(skills))}, "
            f"above zero for {better} of {len(skills)} series that move"
        )
