import gzip
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from streamlstm.errors import ConfigError
from streamlstm.service.http import HttpServer


class Answers:
    well = True
    problem: str | None = None
    asked: float | None = None

    def healthy(self) -> bool:
        return self.well

    def unready(self, max_lag_s: float | None = None) -> str | None:
        self.asked = max_lag_s
        return self.problem

    def snapshot(self) -> dict:
        if self.problem == "defect":
            raise RuntimeError("secret payload")
        return {"version": "0.1.0", "skill": float("nan")}


def render(accept: str) -> tuple[bytes, str]:
    return f"# {accept}\n".encode() * 400, "text/plain; version=0.0.4"


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def address(answers: Answers) -> Iterator[tuple[str, int]]:
    server = HttpServer("127.0.0.1:0", answers, render, max_connections=20, head_timeout_s=1.0)
    host, port = server.start().split(":")
    yield host, int(port)
    server.close()


Reply = tuple[int, dict[str, str], bytes]


def ask(address: tuple[str, int], path: str, method: str = "GET", **headers: str) -> Reply:
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def send(address: tuple[str, int], data: bytes) -> bytes:
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_metrics_are_rendered_as_accepted(address: tuple[str, int]) -> None:
    status, headers, body = ask(address, "/metrics", Accept="application/openmetrics-text")
    assert status == 200
    assert body.startswith(b"# application/openmetrics-text\n")
    assert headers["content-type"] == "text/plain; version=0.0.4"
    assert "content-encoding" not in headers


def test_metrics_are_compressed_for_who_takes_gzip(address: tuple[str, int]) -> None:
    _, headers, body = ask(address, "/metrics", Accept="x", Accept_Encoding="deflate, gzip")
    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(body) == b"# x\n" * 400
    assert int(headers["content-length"]) == len(body) < 200
    _, headers, _ = ask(address, "/metrics", Accept="long " * 10, Accept_Encoding="gzip;q=0")
    assert "content-encoding" not in headers


def test_health_follows_the_loop(address: tuple[str, int], answers: Answers) -> None:
    assert ask(address, "/healthz")[::2] == (200, b"ok\n")
    answers.well = False
    assert ask(address, "/healthz")[::2] == (503, b"stalled\n")


def test_readiness_says_why_not(address: tuple[str, int], answers: Answers) -> None:
    assert ask(address, "/readyz")[0] == 200
    assert answers.asked is None
    answers.problem = "replaying"
    assert ask(address, "/readyz?lag=1.5m")[::2] == (503, b"replaying\n")
    assert answers.asked == 90.0


@pytest.mark.parametrize("lag", ["60", "-1s", "nan", "1e9s", "60s%0a", "1y"])
def test_a_lag_that_is_no_duration_is_refused(address: tuple[str, int], lag: str) -> None:
    assert ask(address, f"/readyz?lag={lag}")[0] == 400


def test_status_is_json_and_the_unknown_is_null(address: tuple[str, int]) -> None:
    status, headers, body = ask(address, "/status")
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"version": "0.1.0", "skill": None}


def test_head_is_get_without_the_body(address: tuple[str, int]) -> None:
    status, headers, body = ask(address, "/status", "HEAD")
    assert status == 200
    assert body == b""
    assert int(headers["content-length"]) == len(ask(address, "/status")[2])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_but_reading_is_allowed(address: tuple[str, int], method: str) -> None:
    status, headers, _ = ask(address, "/metrics", method)
    assert status == 405
    assert headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metrics/../status", "/etc/passwd", "/favicon.ico", "/%2e%2e/", "//"]
)
def test_other_paths_are_not_found(address: tuple[str, int], path: str) -> None:
    status, headers, body = ask(address, path)
    assert status == 404
    assert body == b"not found\n"
    assert "server" not in headers


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET http://[bad/metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET //[ HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"\xff\xfe\x00 nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    ],
    ids=range(10),
)
def test_what_is_no_request_gets_a_clear_refusal(address: tuple[str, int], request_bytes: bytes, status: int) -> None:
    assert send(address, request_bytes).startswith(b"HTTP/1.1 %d " % status)
    assert ask(address, "/healthz")[0] == 200


def test_a_defect_is_a_500_that_tells_nothing_and_the_next_request_is_answered(
    address: tuple[str, int], answers: Answers
) -> None:
    answers.problem = "defect"
    status, _, body = ask(address, "/status")
    assert (status, body) == (500, b"internal server error\n")
    assert ask(address, "/healthz")[0] == 200


def test_three_hundred_idle_connections_keep_nobody_waiting(address: tuple[str, int]) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(address, timeout=5)).send(b"GET /met")
        started = time.monotonic()
        assert ask(address, "/metrics")[0] == 200
        assert time.monotonic() - started < 0.5


def test_the_oldest_connection_makes_room_when_there_are_too_many(answers: Answers) -> None:
    server = HttpServer("127.0.0.1:0", answers, render, max_connections=2, head_timeout_s=30.0)
    host, port = server.start().split(":")
    with ExitStack() as stack:
        stack.callback(server.close)
        oldest, _, newest = (stack.enter_context(socket.create_connection((host, int(port)), timeout=5)) for _ in "123")
        with suppress(ConnectionResetError):
            assert oldest.recv(1) == b""
        newest.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert newest.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=5) as connection:
        started = time.monotonic()
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        assert 0.5 < time.monotonic() - started < 4


def test_a_request_that_trickles_in_does_not_prolong_its_time(address: tuple[str, int]) -> None:
    started = time.monotonic()
    with socket.create_connection(address, timeout=5) as connection, suppress(ConnectionError):
        while time.monotonic() - started < 4:
            connection.send(b"a")
            time.sleep(0.1)
    assert time.monotonic() - started < 3


def test_a_port_in_use_is_one_clear_line(address: tuple[str, int], answers: Answers) -> None:
    with pytest.raises(ConfigError, match=rf"http.listen: cannot listen on 127.0.0.1:{address[1]}: .*in use"):
        HttpServer(f"127.0.0.1:{address[1]}", answers, render).start()


@pytest.mark.parametrize("listen", ["no.such.host.invalid:1", "127.0.0.1:70000", "192.0.2.1:0"])
def test_an_address_that_is_not_ours_is_a_configuration_error(answers: Answers, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"http.listen: "):
        HttpServer(listen, answers, render).start()


def test_closing_frees_the_port_at_once(answers: Answers) -> None:
    first = HttpServer("127.0.0.1:0", answers, render)
    address = first.start()
    idle = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
    first.close()
    second = HttpServer(address, answers, render)
    assert second.start() == address
    second.close()
    idle.close()


def test_metrics_are_put_together_once_for_all_who_ask_at_about_the_same_time(answers: Answers) -> None:
    rendered: list[str] = []

    def count(accept: str) -> tuple[bytes, str]:
        rendered.append(accept)
        return b"metrics", "text/plain"

    for share_s, expected in ((3600.0, ["a", "b"]), (0.0, ["a", "a", "b", "a"])):
        rendered.clear()
        server = HttpServer("127.0.0.1:0", answers, count, share_s=share_s)
        host, port = server.start().split(":")
        for accept in ("a", "a", "b", "a"):
            assert ask((host, int(port)), "/metrics", Accept=accept)[2] == b"metrics"
        server.close()
        assert rendered == expected
