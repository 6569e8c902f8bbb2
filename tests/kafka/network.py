"""
A network between clients and their brokers, with weather: replies get lost, connections break, fall silent or crawl.

It reads along: requests and replies come in frames, and a reply names its request. Brokers tell clients where they are,
and those addresses are replaced by ours, which have the same length. Brokers speak to one another past it. With a TLS
context it is what clients meet first, and what says so when it does not like them.
"""

import asyncio
import contextlib
import random
import select
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

APIS = {
    "Produce": 0,
    "Fetch": 1,
    "Metadata": 3,
    "FindCoordinator": 10,
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "EndTxn": 26,
    "DescribeCluster": 60,
}
_TELL_ADDRESSES = {APIS[api] for api in ("Metadata", "FindCoordinator", "DescribeCluster")}
_HOST = "127.0.0.1"
_CRAWL = 256
_CRAWL_PAUSE_S = 0.0005


class Fault(Enum):
    """What may befall one request."""

    REPLY_LOST = "the broker did it, and the connection is reset before its reply"
    REPLY_SWALLOWED = "the broker did it, and from then on nothing passes and nobody hangs up"
    REQUEST_TORN = "half of it arrives, and the connection is reset"
    REQUEST_SWALLOWED = "it never arrives, and from then on nothing passes and nobody hangs up"


@dataclass(eq=False)
class Strike:
    """A fault for the next request of its kind."""

    api: str
    fault: Fault
    struck: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Line:
    """One connection, both halves of it."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    asked: dict[int, tuple[int, Strike | None]] = field(default_factory=dict)
    silent: bool = False

    def reset(self) -> None:
        """RST to both, whatever is under way."""
        for writer in (self.client, self.broker):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Network:
    """A :class:`broker.Cluster`'s plaintext listeners, reached the long way round; ``bootstrap`` is where."""

    def __init__(self, brokers: Sequence[str], seed: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._rng, self._tls = random.Random(seed), tls
        self._doors: list[_Door] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self._lines: set[_Line] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._strikes: list[Strike] = []
        self._substitutes: dict[bytes, bytes] = {}
        self._down = False
        self.crawls = False
        self.bootstrap = [self._do(self._listen(address)) for address in brokers]

    def strike(self, api: str, fault: Fault) -> Strike:
        """Let this happen to the next request of this kind."""
        strike = Strike(api, fault)
        self._loop.call_soon_threadsafe(self._strikes.append, strike)
        return strike

    def cut(self) -> None:
        """Reset every connection, and every new one, until :meth:`mend`."""
        self._do(self._set_down(down=True))

    def mend(self) -> None:
        """As if nothing had been."""
        self._do(self._set_down(down=False))

    def close(self) -> None:
        for door in self._doors:
            door.close()
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[object, object, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self, broker: str) -> str:
        host, port = broker.split(":")
        assert host == _HOST, "an address is replaced by one of the same length"

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._accept(int(port), reader, writer)

        server = await asyncio.start_server(accept, _HOST, 0)
        self._servers.append(server)
        ours = server.sockets[0].getsockname()[1]
        if self._tls:
            self._doors.append(_Door(self._tls, ours))
            ours = self._doors[-1].port
        prefix = _HOST.encode()
        self._substitutes[prefix + struct.pack(">i", int(port))] = prefix + struct.pack(">i", ours)
        return f"{_HOST}:{ours}"

    async def _set_down(self, *, down: bool) -> None:
        self._down = down
        for line in list(self._lines) if down else ():
            line.reset()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        self._down = True
        for line in list(self._lines):
            line.reset()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _accept(self, port: int, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._down:
            client.transport.abort()
            return
        try:
            from_broker, broker = await asyncio.open_connection(_HOST, port)
        except OSError:
            client.transport.abort()
            return
        line = _Line(client, broker)
        self._lines.add(line)
        pumps = [
            asyncio.ensure_future(self._pump(line, self._requests(line, from_client))),
            asyncio.ensure_future(self._pump(line, self._replies(line, from_broker))),
        ]
        self._pumps.update(pumps)
        for pump in pumps:
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, line: _Line, pumping: Coroutine[object, object, None]) -> None:
        """Until one end hangs up; then the other is hung up on, unless this line has fallen silent."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await pumping
        if not line.silent or line.client.transport.is_closing():
            line.client.close()
            line.broker.close()
            self._lines.discard(line)

    async def _requests(self, line: _Line, reader: asyncio.StreamReader) -> None:
        while True:
            frame = await _frame(reader)
            api, _, correlation = struct.unpack_from(">hhi", frame, 4)
            strike = self._due(api)
            line.asked[correlation] = (api, strike)
            if line.silent:
                continue
            fault = strike and strike.fault
            if fault is Fault.REQUEST_TORN:
                line.broker.write(frame[: len(frame) // 2])
                await line.broker.drain()
                line.reset()
                strike.struck.set()
            elif fault is Fault.REQUEST_SWALLOWED:
                line.silent = True
                strike.struck.set()
            else:
                await self._pass_on(frame, line.broker)

    async def _replies(self, line: _Line, reader: asyncio.StreamReader) -> None:
        while True:
            frame = await _frame(reader)
            (correlation,) = struct.unpack_from(">i", frame, 4)
            api, strike = line.asked.pop(correlation)
            if line.silent:
                continue
            fault = strike and strike.fault
            if fault is Fault.REPLY_LOST:
                line.reset()
                strike.struck.set()
            elif fault is Fault.REPLY_SWALLOWED:
                line.silent = True
                strike.struck.set()
            else:
                await self._pass_on(self._readdressed(frame) if api in _TELL_ADDRESSES else frame, line.client)

    def _due(self, api: int) -> Strike | None:
        for at, strike in enumerate(self._strikes):
            if APIS[strike.api] == api:
                return self._strikes.pop(at)
        return None

    def _readdressed(self, frame: bytes) -> bytes:
        for theirs, ours in self._substitutes.items():
            frame = frame.replace(theirs, ours)
        return frame

    async def _pass_on(self, frame: bytes, writer: asyncio.StreamWriter) -> None:
        while self.crawls and frame:
            bytes_ = self._rng.randint(1, _CRAWL)
            writer.write(frame[:bytes_])
            await writer.drain()
            frame = frame[bytes_:]
            await asyncio.sleep(_CRAWL_PAUSE_S)
        writer.write(frame)
        await writer.drain()


class _Door:
    """TLS before a port of this machine. By threads: asyncio hangs up on a refused client without a word."""

    def __init__(self, context: ssl.SSLContext, inside: int) -> None:
        self._context, self._inside = context, inside
        self._listener = socket.create_server((_HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._welcome, name="door", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._converse, args=(client,), name="door", daemon=True).start()

    def _converse(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(client, server_side=True, do_handshake_on_connect=False) as outer,
        ):
            try:
                outer.do_handshake()
            except ssl.SSLError:
                # The client was told why. What it has sent meanwhile is taken: a reset would overtake that.
                outer.shutdown(socket.SHUT_WR)
                while outer.recv(4096):
                    pass
                return
            with socket.create_connection((_HOST, self._inside)) as inner:
                _carry(outer, inner)


def _carry(outer: ssl.SSLSocket, inner: socket.socket) -> None:
    """Both ways, in one thread: a TLS connection is not for two. Until one end hangs up."""
    while True:
        ready = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
        for source, sink in ((outer, inner), (inner, outer)):
            if source in ready:
                data = source.recv(65536)
                if not data:
                    return
                sink.sendall(data)


async def _frame(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big"))
