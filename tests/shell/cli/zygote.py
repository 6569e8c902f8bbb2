"""
Processes that begin where loading ends: torch and Arrow are loaded once, and every life is forked from that.

One line of JSON in: arguments, where stdout and stderr go, after how many seconds, or once there is anything in which
directory, it gets a signal, and which. One line out: how it ended.
"""

import json
import os
import sys
import time
from pathlib import Path

import streamlstm.cli.replaying  # noqa: F401, because that is what takes long
from streamlstm.cli.main import main
from streamlstm.transport.forecasts import ForecastWriter

# Or all rows of a short replay would wait in memory.
ForecastWriter.__init__.__kwdefaults__["rows_at_once"] = 600


def live(argv: list[str], said: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(os.open(said + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        Path(asked["said"]).parent.mkdir(parents=True, exist_ok=True)
        pid = live(asked["argv"], asked["said"])
        if asked["once"] is not None:
            while not list(Path(asked["once"]).glob("0*")):
                time.sleep(0.001)
            os.kill(pid, asked["signal"])
        elif asked["after_s"] is not None:
            time.sleep(asked["after_s"])
            os.kill(pid, asked["signal"])  # it may have ended, but it is ours until it was waited for
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
