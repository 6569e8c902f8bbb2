import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamlstm.cli.main import main
from streamlstm.service.http import HttpServer

CONFIG = """\
source: {topics: [in]}
decode: {series_id: [$.name], timestamp: {path: $.time}, target: $.value}
sink: {forecasts: {topic: out}}
http: {listen: "%s"}
"""


class Answers:
    well = True
    problem: str | None = None

    def healthy(self) -> bool:
        return self.well

    def unready(self, max_lag_s: float | None = None) -> str | None:
        del max_lag_s
        return self.problem

    def snapshot(self) -> dict:
        return {}


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def address(answers: Answers) -> Iterator[str]:
    server = HttpServer("127.0.0.1:0", answers, lambda _: (b"", ""))
    yield server.start()
    server.close()


def test_a_service_whose_loop_turns_is_well(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--url", f"http://{address}"]) == 0
    assert capsys.readouterr().out == f"http://{address}/healthz: ok\n"


def test_a_stalled_service_is_not(address: str, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.well = False
    assert main(["health", "--url", f"{address}"]) == 1
    assert capsys.readouterr().out == f"{address}/healthz: stalled\n"


def test_readiness_is_asked_for_by_name(address: str, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.problem = "replaying"
    assert main(["health", "--url", f"http://{address}"]) == 0
    assert main(["health", "--url", f"http://{address}", "--ready"]) == 1
    assert "replaying" in capsys.readouterr().out


@pytest.mark.parametrize("anywhere", [False, True])
def test_the_address_is_taken_from_the_configuration(address: str, tmp_path: Path, *, anywhere: bool) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(CONFIG % (address.replace("127.0.0.1", "0.0.0.0") if anywhere else address))
    assert main(["health", "-c", str(file)]) == 0


def test_a_free_port_cannot_be_guessed_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(CONFIG % "127.0.0.1:0")
    assert main(["health", "-c", str(file)]) == 2
    assert "use --url" in capsys.readouterr().err


def test_nobody_there_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        assert main(["health", "--url", url]) == 1
    assert capsys.readouterr().out == f"{url}/healthz: Connection refused\n"


@pytest.mark.parametrize("url", ["https://x:1", "http://", "http://127.0.0.1:port", "http://[::1"])
def test_an_address_that_is_none_is_one_line_and_exit_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--url", url]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_service_that_hangs_is_given_up_on(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert main(["health", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.3"]) == 1
        assert time.monotonic() - started < 2


def test_what_is_no_http_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x1b[31mSSH-2.0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["health", "--url", f"http://127.0.0.1:{server.getsockname()[1]}"]) == 1
        thread.join()
    assert "\x1b" not in capsys.readouterr().out


def test_a_health_check_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys; import streamlstm.cli.health; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
