import http.client
import io
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import pytest
from reports import make_report
from rich.console import Console

from streamlstm.cli.board import Board
from streamlstm.cli.demonstration import CONFIG, _table
from streamlstm.cli.main import main
from streamlstm.config.model import Config
from streamlstm.transport.host import available


def test_a_demo_of_generated_series_forecasts_learns_and_says_what_came_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--source", "synthetic", "--seconds", "4", "--port", "0"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"metrics at http://127.0.0.1:\d+/metrics", captured.err)
    series = [line for line in captured.out.splitlines() if "wave-" in line]
    assert len(series) == 8
    assert all(re.search(r"\d", line.split()[1]) and line.split()[2] != "–" for line in series)
    records, updates = re.search(r"([\d,]+) records of 8 series, (\d+) updates", captured.out).groups()
    assert int(records) >= 8 * 20
    assert int(updates) > 0


@pytest.mark.skipif(not available(), reason="there is no /proc on this machine")
def test_a_demo_of_this_machine_shows_its_own_series(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seconds", "3", "--port", "0"]) == 0
    out = capsys.readouterr().out
    assert "memory.available_bytes" in out
    assert "load.1m" in out
    assert "cpu.busy_percent" in out


def test_a_port_that_is_taken_is_said_so_and_a_free_one_used(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert main(["demo", "--source", "synthetic", "--seconds", "1", "--port", str(port)]) == 0
    err = capsys.readouterr().err
    assert f"port {port} is taken" in err
    assert f":{port}/metrics" not in err


def test_on_a_terminal_a_table_lives_while_metrics_are_served_and_ctrl_c_ends_it_well() -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "streamlstm.cli.main",
        "demo",
        "--source",
        "synthetic",
        "--seconds",
        "0",
        "--port",
        "0",
    ]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with _interruptible():
        started = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    with started as process, _ended(process):
        os.close(theirs)
        shown = _read_until(ours, rb"metrics at http://127.0.0.1:(\d+)/metrics", 60)
        port = int(re.search(rb"127.0.0.1:(\d+)/metrics", shown)[1])
        _read_until(ours, rb"(?s)in 10 s.*wave-7.*[1-9]\d* updates", 60)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/metrics")
        body = connection.getresponse().read().decode()
        connection.close()
        assert float(re.search(r"^streamlstm_updates_total (\S+)", body, re.MULTILINE)[1]) > 0
        process.send_signal(2)
        assert re.search(rb"records of 8 series", _read_until(ours, rb"updates of the weights", 30))
        assert process.wait(30) == 0
    os.close(ours)


@contextmanager
def _interruptible() -> Generator[None]:
    """What is started inside does not inherit that SIGINT is ignored, as it is where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Generator[None]:
    """It waits for its terminal to be read, and would do so for ever once nobody does."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def _read_until(terminal: int, pattern: bytes, timeout_s: float) -> bytes:
    shown = b""
    until = time.monotonic() + timeout_s
    while not re.search(pattern, shown):
        assert time.monotonic() < until, shown.decode(errors="replace")
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536)
    return shown


def test_the_table_marks_series_that_the_model_forecasts_better_than_the_last_value() -> None:
    board = Board(ahead=2)
    error = np.array([[[1.0] * 2, [2.0] * 2, [np.nan] * 2], [[2.0] * 2, [1.0] * 2, [np.nan] * 2]])
    board.update(make_report(keys=["better", "worse"], records=2, horizons=2, error=error))
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(_table(board, "caption"))
    lines = console.file.getvalue().splitlines()
    (better,) = [line for line in lines if "better" in line]
    (worse,) = [line for line in lines if "worse" in line]
    assert "\x1b[32m" in better
    assert "+0.75" in better
    assert "\x1b[32m" not in worse
    assert "-3.00" in worse


def test_the_demo_s_configuration_is_valid_and_learns_within_a_minute() -> None:
    config = Config.model_validate(CONFIG)
    assert config.k2 + config.training.k1 <= 20
