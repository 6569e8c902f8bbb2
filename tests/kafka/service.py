"""The service as an operator has it: a process with a configuration file, ended by signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployment import Deployment

from streamlstm.config.load import load
from streamlstm.config.model import Config

START_TIMEOUT_S = 180.0


def wait_for(happened: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """What ``happened`` returns, once it is true."""
    end = time.monotonic() + timeout_s
    while not (found := happened()):
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)
    return found


class Service:
    """``streamlstm run`` for a deployment, as often as it is started."""

    def __init__(self, deployment: Deployment, directory: Path, *, partitions: int = 2, **sections: Any) -> None:
        self.partitions = partitions
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "config.yaml"
        self.log = directory / "log"
        self.log.touch()
        # JSON is YAML.
        self.file.write_text(
            json.dumps(
                {
                    "version": 1,
                    "name": deployment.name,
                    "source": {
                        "bootstrap_servers": deployment.cluster.bootstrap,
                        "topics": [deployment.input],
                        "poll": {"max_records": 500},
                    },
                    "decode": {"series_id": ["@key"], "timestamp": {"path": "$.ts"}, "target": "$.value"},
                    "model": {"hidden_size": 8, "horizons": 4, "calendar": []},
                    "http": {"listen": "127.0.0.1:0"},
                    "logging": {"format": "json"},
                    "checkpoint": {"url": str(directory / "state")},
                    **sections,
                }
            )
        )
        self.child: subprocess.Popen[bytes] | None = None
        self._read_from = 0

    @property
    def config(self) -> Config:
        return load(self.file, environ={}).config

    def start(self, *options: str, under: str = "") -> None:
        """``under`` is what a shell does first, such as ``ulimit``."""
        assert self.child is None
        self._read_from = self.log.stat().st_size
        shell = ["bash", "-c", f'{under}; exec "$@"', "bash"] if under else []
        command = [*shell, sys.executable, "-m", "streamlstm.cli.main", "run", "-c", str(self.file), *options]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def said(self) -> str:
        """What this life has written to its log."""
        with self.log.open() as log:
            log.seek(self._read_from)
            return log.read()

    def wait_ready(self) -> dict[str, Any]:
        """Wait for the end of start-up; what it said then."""

        def ready() -> dict[str, Any] | None:
            assert self.child is not None
            found = re.search(r'^{.*"event": "ready".*}$', self.said(), re.MULTILINE)
            assert found or self.child.poll() is None, self.said()
            return json.loads(found[0]) if found else None

        return wait_for(ready, START_TIMEOUT_S, f"the service is ready: {self.log}")

    def status(self) -> dict[str, Any]:
        """What ``/status`` answers."""
        address = wait_for(lambda: re.search(r'"address": "([^"]+)"', self.said()), START_TIMEOUT_S, "it listens")[1]
        with urllib.request.urlopen(f"http://{address}/status", timeout=5) as answer:
            return json.loads(answer.read())

    def wait_committed(self, records: int, timeout_s: float) -> None:
        """Until this life has committed its way to so many offsets in all."""
        wait_for(lambda: self.committed() >= records, timeout_s, f"{records} records are committed")

    def committed(self) -> int:
        """Offsets of all partitions together; 0 until this life has committed something."""
        positions = self.positions()
        return sum(p["next_offset"] or 0 for p in positions) if any(self.status()["records"].values()) else 0

    def nothing_left(self) -> bool:
        """Whether all that was there at the last fetch is read. What was read last may not be committed yet."""
        lag = [p["lag_records"] for p in self.positions()]
        return len(lag) == self.partitions and all(left == 0 for left in lag)

    def wait_consumed(self, timeout_s: float) -> None:
        """Until nothing is left of an input that does not grow."""
        wait_for(self.nothing_left, timeout_s, "the input is consumed")

    def positions(self) -> list[dict[str, Any]]:
        assert self.child is not None
        assert self.child.poll() is None, self.said()
        return self.status()["positions"]

    def send(self, number: signal.Signals) -> None:
        assert self.child is not None
        self.child.send_signal(number)

    def kill(self) -> None:
        """At this instruction."""
        self._end(signal.SIGKILL)

    def stop(self, timeout_s: float = 30.0) -> int:
        """As a supervisor does; its exit code."""
        return self._end(signal.SIGTERM, timeout_s)

    def complaint(self) -> str:
        """The one line it ended with."""
        (line,) = [line for line in self.said().splitlines() if line.startswith("streamlstm: error: ")]
        return line

    def wait(self, timeout_s: float = 60.0) -> int:
        """Let it end by itself; its exit code."""
        assert self.child is not None
        code = self.child.wait(timeout_s)
        self.child = None
        return code

    def _end(self, number: signal.Signals, timeout_s: float = 30.0) -> int:
        assert self.child is not None
        self.child.send_signal(number)
        return self.wait(timeout_s)

    def close(self) -> None:
        if self.child is not None:
            self.kill()


def published(service: Service) -> dict[int, list[int]]:
    """The offsets committed readers have a forecast for, by revision."""
    seen: dict[int, list[int]] = {}
    for value in service.deployment.committed(service.config.forecast_topic):
        told = json.loads(value)
        seen.setdefault(told["model"]["revision"], []).append(told["source"]["offset"])
    return {revision: sorted(offsets) for revision, offsets in seen.items()}
