"""
Where the tests get their brokers from.

In this order: ``STREAMLSTM_TEST_BOOTSTRAP`` (somebody else's broker: not for tests that kill brokers, or need TLS),
``KAFKA_HOME`` (a directory with a ``kafka`` script: see ``../shared/kafka/README.md``), the same in ``../shared/kafka``
beside the repository, Docker with the official image. With none of them the tests skip, unless
``STREAMLSTM_TEST_REQUIRE_BROKER=1`` says that skipping is failing; those on the mock cluster need none of them.
"""

import atexit
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

DOCKER_IMAGE = "apache/kafka:4.3.0"
_UP_TIMEOUT_S = 90


class NoBroker(Exception):
    """No broker of the kind that was asked for can be had here, and why."""


@dataclass(frozen=True)
class Secure:
    """The SASL_SSL listener of a cluster."""

    bootstrap: str
    ca: str
    user: str
    password: str


class Cluster(Protocol):
    """Brokers that are up."""

    bootstrap: list[str]
    secure: Secure | None

    def do(self, verb: str, broker: int | None = None) -> None:
        """Kill, pause, resume, stop or start a broker, or all of them."""
        ...

    def wipe(self) -> None:
        """Stop them and delete their data."""
        ...


class Foreign:
    """A broker that is not ours to stop."""

    secure = None

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap.split(",")

    def do(self, verb: str, broker: int | None = None) -> None:
        raise NoBroker(f"cannot {verb} broker {broker} of STREAMLSTM_TEST_BOOTSTRAP")

    def wipe(self) -> None:
        pass


class Scripted:
    """Brokers of the ``kafka`` script."""

    def __init__(
        self, script: Path, directory: Path, brokers: int, *, secure: bool, settings: Mapping[str, str]
    ) -> None:
        self._script, self.directory = script, directory
        atexit.register(self.wipe)  # brokers outlive their parent
        options = ["--brokers", str(brokers), *(["--secure"] if secure else [])]
        options += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        state = json.loads(self._run("up", *options))
        self.bootstrap: list[str] = state["bootstrap"].split(",")
        listener: dict[str, Any] | None = state["secure"]
        self.secure = listener and Secure(listener["bootstrap"], listener["ca"], listener["user"], listener["password"])

    def do(self, verb: str, broker: int | None = None) -> None:
        self._run(verb, *([] if broker is None else ["--broker", str(broker)]))

    def wipe(self) -> None:
        atexit.unregister(self.wipe)
        self._run("wipe")

    def _run(self, verb: str, *options: str) -> str:
        command = [str(self._script), verb, str(self.directory), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_UP_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout


class Dockered:
    """One broker in a container."""

    secure = None

    def __init__(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        environment = {
            "KAFKA_NODE_ID": "1",
            "KAFKA_PROCESS_ROLES": "broker,controller",
            "KAFKA_LISTENERS": f"PLAINTEXT://:{port},CONTROLLER://:29093",
            "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
            "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:29093",
            "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        }
        variables = [word for key, value in environment.items() for word in ("-e", f"{key}={value}")]
        command = ["docker", "run", "-d", "--rm", "-p", f"127.0.0.1:{port}:{port}", *variables, DOCKER_IMAGE]
        started = subprocess.run(command, capture_output=True, text=True, timeout=_UP_TIMEOUT_S, check=False)
        if started.returncode:
            raise NoBroker(f"docker cannot start {DOCKER_IMAGE}: {' '.join(started.stderr.split())[:200]}")
        self._container = started.stdout.strip()
        atexit.register(self.wipe)
        self.bootstrap = [f"127.0.0.1:{port}"]
        wait_until(lambda: _answers(port), 60, "the container's broker answers")

    def do(self, verb: str, broker: int | None = None) -> None:
        raise NoBroker(f"cannot {verb} broker {broker} in a container")

    def wipe(self) -> None:
        atexit.unregister(self.wipe)
        subprocess.run(["docker", "kill", self._container], capture_output=True, timeout=30, check=False)


def start(
    directory: Path,
    *,
    brokers: int = 1,
    secure: bool = False,
    mortal: bool = False,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Cluster:
    """
    The first kind of cluster that is to be had and will do; a mortal one may be killed. Raises :class:`NoBroker`.
    """
    special = brokers > 1 or secure or mortal or bool(settings)
    if (bootstrap := os.environ.get("STREAMLSTM_TEST_BOOTSTRAP")) and not special:
        return Foreign(bootstrap)
    beside = Path(__file__).parents[2] / ".." / "shared" / "kafka"
    for home in filter(None, (os.environ.get("KAFKA_HOME"), beside)):
        script = (Path(home) / "kafka").resolve()
        if script.is_file() and shutil.which("java"):
            return Scripted(script, directory, brokers, secure=secure, settings=settings)
    if special:
        raise NoBroker("brokers to kill, several of them, TLS, or settings need the kafka script (KAFKA_HOME) and java")
    if shutil.which("docker"):
        return Dockered()
    raise NoBroker("neither STREAMLSTM_TEST_BOOTSTRAP, nor KAFKA_HOME or ../shared/kafka with java, nor docker")


def wait_until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Ask again and again; a test never sleeps for a fixed time."""
    until = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > until:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    request = b"\0\0\0\x0a\0\x12\0\0\0\0\0\1\xff\xff"  # ApiVersions, version 0
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
        sock.settimeout(1)
        sock.sendall(request)
        return len(sock.recv(8)) == 8
    return False
