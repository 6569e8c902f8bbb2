"""
``/metrics /healthz /readyz /status``, read-only, for Prometheus, orchestrators and people.

One thread, one event loop: an idle connection costs a socket and no thread, so that a few hundred of them do not keep
a scrape waiting. What is open is bounded (the oldest connection makes room), and so is what a request may be: its head
has a size and a deadline, it has no body, and each connection answers one. Metrics that were put together a moment ago
are given to whoever else asks, so that many scrapers take no more time from the loop than one. Nothing here touches the
engine or changes state; answers come from what the loop has told :class:`~streamlstm.service.status.Status`.
"""

import asyncio
import gzip
import re
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

import msgspec
import structlog

from streamlstm.errors import ConfigError

_HEAD_BYTES = 8192
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_log = structlog.get_logger(__name__)


class Answers(Protocol):
    """What the service knows of itself."""

    def healthy(self) -> bool:
        """Whether the loop turns."""
        ...

    def unready(self, max_lag_s: float | None = None) -> str | None:
        """Why it is not ready; ``None`` when it is."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        ...


Render = Callable[[str], tuple[bytes, str]]
"""Metrics: ``Accept`` header → exposition and its content type."""


class _Request(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]


class _Response(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT
    headers: tuple[tuple[str, str], ...] = ()


class HttpServer:
    """
    Serves one process from a thread of its own, between :meth:`start` and :meth:`close`.

    :param listen: ``host:port``; port 0 takes a free one.
    :param max_connections: open at once; beyond that the oldest is closed.
    :param head_timeout_s: from connecting to the end of the request's head, and again for sending the answer.
    :param share_s: how old the metrics may be that are given to another scraper.
    """

    def __init__(
        self,
        listen: str,
        answers: Answers,
        render: Render,
        *,
        max_connections: int = 128,
        head_timeout_s: float = 5.0,
        share_s: float = 0.1,
    ) -> None:
        self._listen = listen
        self._answers = answers
        self._render = render
        self._max_connections = max_connections
        self._head_timeout_s = head_timeout_s
        self._share_s = share_s
        self._shared: dict[str, tuple[float, _Response]] = {}
        self._open: dict[asyncio.Task[None], None] = {}  # in order of arrival
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None

    def start(self) -> str:
        """Listen, and return the address (``127.0.0.1:9108``). Raises ConfigError when that cannot be."""
        listener = _bind(self._listen)
        host, port = listener.getsockname()[:2]
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, started)), name="http", daemon=True
        )
        self._thread.start()
        started.wait()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Stop listening and drop what is open."""
        if self._thread and self._loop and self._stop:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(self._head_timeout_s)
            self._thread = None

    async def _serve(self, listener: socket.socket, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, sock=listener, limit=_HEAD_BYTES)
        started.set()
        await self._stop.wait()
        self._loop.remove_reader(listener)
        await asyncio.sleep(0.01)  # what was accepted a moment ago arrives, and is turned away
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, as a task we know: the oldest leaves when there are too many."""
        if self._stop is None or self._stop.is_set():
            writer.transport.abort()
            return
        if len(self._open) >= self._max_connections:
            oldest = next(iter(self._open))
            oldest.cancel()
            self._open.pop(oldest)
        task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._open[task] = None
        task.add_done_callback(lambda done: self._leave(done, writer))

    def _leave(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        """Whatever became of the connection, also of one that was cancelled before its task began."""
        self._open.pop(task, None)
        if not writer.is_closing():
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request, answer it, close."""
        try:
            async with asyncio.timeout(self._head_timeout_s):
                response, with_body, compress = await self._exchange(reader)
            async with asyncio.timeout(self._head_timeout_s):
                writer.write(_encode(response, with_body=with_body, compress=compress))
                await writer.drain()
            writer.close()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # it went away or says nothing: nobody to tell

    async def _exchange(self, reader: asyncio.StreamReader) -> tuple[_Response, bool, bool]:
        """The answer to the next request, whether it has a body, and whether it may be compressed."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), True, False
        request = _parse(head)
        if request is None:
            return _plain(HTTPStatus.BAD_REQUEST), True, False
        if request.method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, (("Allow", "GET, HEAD"),)), True, False
        try:
            response = self._route(request)
        except Exception:  # noqa: BLE001, because a defect here must not stop the next scrape
            _log.exception("an HTTP request failed")
            response = _plain(HTTPStatus.INTERNAL_SERVER_ERROR)
        return response, request.method == "GET", _takes_gzip(request.headers.get("accept-encoding", ""))

    def _route(self, request: _Request) -> _Response:
        try:
            url = urlsplit(request.target)
        except ValueError:
            return _plain(HTTPStatus.BAD_REQUEST)
        match url.path:
            case "/metrics":
                return self._metrics(request.headers.get("accept", ""))
            case "/healthz":
                return _verdict(None if self._answers.healthy() else "stalled")
            case "/readyz":
                return self._ready(parse_qs(url.query).get("lag", []))
            case "/status":
                return _Response(HTTPStatus.OK, msgspec.json.encode(self._answers.snapshot()) + b"\n", _JSON)
            case _:
                return _plain(HTTPStatus.NOT_FOUND)

    def _metrics(self, accept: str) -> _Response:
        now_s = time.monotonic()
        self._shared = {key: kept for key, kept in self._shared.items() if now_s - kept[0] < self._share_s}
        if accept not in self._shared:
            body, content_type = self._render(accept)
            self._shared[accept] = now_s, _Response(HTTPStatus.OK, body, content_type)
        return self._shared[accept][1]

    def _ready(self, lag: list[str]) -> _Response:
        if not lag:
            return _verdict(self._answers.unready())
        m = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)", lag[-1])
        if not m:
            return _Response(HTTPStatus.BAD_REQUEST, b"lag: a number with a unit, like 60s\n")
        return _verdict(self._answers.unready(float(m[1]) * _UNITS_S[m[2]]))


def split_listen(listen: str) -> tuple[str, int]:
    """
    Host and port.

    >>> split_listen("[::1]:9108")
    ('::1', 9108)
    """
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _bind(listen: str) -> socket.socket:
    """A listening socket, or a ConfigError that says what is wrong with the address."""
    host, port = split_listen(listen)
    if port > 65_535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"http.listen: {listen}: a port is 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"http.listen: cannot listen on {listen}: {reason}; choose another address, or port 0 for a free one"
        ) from error
    return listener


def _parse(head: bytes) -> _Request | None:
    """The request line and headers, names in lower case; ``None`` for what is not HTTP/1."""
    line, *fields = head.decode("latin-1").split("\r\n")
    m = re.fullmatch(r"([A-Z]{1,16}) (/[!-~]{0,2047}) HTTP/1\.[01]", line)
    if not m:
        return None
    headers: dict[str, str] = {}
    for field in fields[:-2]:
        name, colon, value = field.partition(":")
        if not colon:
            return None
        headers[name.strip().lower()] = value.strip()
    return _Request(m[1], m[2], headers)


def _takes_gzip(accept_encoding: str) -> bool:
    """
    Whether ``Accept-Encoding`` lists gzip, and not with weight 0.

    >>> _takes_gzip("deflate, gzip;q=0.5"), _takes_gzip("gzip;q=0"), _takes_gzip("identity")
    (True, False, False)
    """
    for coding in accept_encoding.split(","):
        name, _, weight = coding.partition(";")
        if name.strip().lower() == "gzip":
            return not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight)
    return False


def _plain(status: HTTPStatus, headers: tuple[tuple[str, str], ...] = ()) -> _Response:
    return _Response(status, status.phrase.lower().encode() + b"\n", headers=headers)


def _verdict(problem: str | None) -> _Response:
    """200 and ``ok``, or 503 and the problem."""
    if problem is None:
        return _Response(HTTPStatus.OK, b"ok\n")
    return _Response(HTTPStatus.SERVICE_UNAVAILABLE, problem.encode() + b"\n")


def _encode(response: _Response, *, with_body: bool, compress: bool) -> bytes:
    body = response.body
    headers = [("Content-Type", response.content_type), *response.headers]
    if compress and len(body) > 1024:
        body = gzip.compress(body, compresslevel=1, mtime=0)
        headers.append(("Content-Encoding", "gzip"))
    headers += [
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
    ]
    lines = [f"HTTP/1.1 {response.status.value} {response.status.phrase}", *(f"{k}: {v}" for k, v in headers), "", ""]
    return "\r\n".join(lines).encode() + (body if with_body else b"")
