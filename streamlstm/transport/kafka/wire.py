"""
Just enough of Kafka's protocol to find out why a connection does not work: four requests over one socket.

The client's own code reports one error for six causes, so the preflight looks for itself. Requests and responses are
those of the protocol guide, in versions that brokers from 1.0 to 4.x answer; none of them changes anything.
"""

import socket
import struct
from dataclasses import dataclass
from typing import NamedTuple

_API_VERSIONS, _METADATA, _SASL_HANDSHAKE, _SASL_AUTHENTICATE = 18, 3, 17, 36
_METADATA_VERSIONS = range(4, 9)  # those encoded below; brokers from 1.0 know one of them
_LARGEST_RESPONSE = 16 << 20


class NotKafka(Exception):
    """The bytes that came back are no Kafka response."""


class HungUp(Exception):
    """The other side closed the connection instead of answering."""


class Handshake(NamedTuple):
    """The broker's answer to a SASL mechanism: its error code, and the mechanisms it has."""

    error: int
    mechanisms: tuple[str, ...]


class Authenticated(NamedTuple):
    """The broker's answer to a SASL token."""

    error: int
    message: str
    token: bytes


class Address(NamedTuple):
    """Where a broker says it can be reached."""

    host: str
    port: int


@dataclass
class Connection:
    """One socket, one request at a time. The socket's own time-out bounds each wait."""

    sock: socket.socket
    correlation: int = 0

    def versions(self) -> dict[int, tuple[int, int]]:
        """Which requests the broker knows, and in which versions. The first thing any listener answers."""
        answer = self._ask(_API_VERSIONS, 0, b"")
        answer.int16()
        return {answer.int16(): (answer.int16(), answer.int16()) for _ in range(answer.int32())}

    def metadata(self, versions: dict[int, tuple[int, int]]) -> list[Address]:
        """The brokers' addresses. A listener that wants authentication first hangs up here."""
        low, high = versions.get(_METADATA, (0, 0))
        usable = [v for v in _METADATA_VERSIONS if low <= v <= high]
        if not usable:
            return []
        version = usable[-1]
        answer = self._ask(_METADATA, version, struct.pack(">i?", 0, False) + (b"\0\0" if version >= 8 else b""))
        answer.int32()  # throttle time
        brokers: list[Address] = []
        for _ in range(answer.int32()):
            answer.int32()  # node id
            brokers.append(Address(answer.string() or "", answer.int32()))
            answer.string()  # rack
        return brokers

    def handshake(self, mechanism: str) -> Handshake:
        """Ask for a SASL mechanism."""
        answer = self._ask(_SASL_HANDSHAKE, 1, _string(mechanism))
        return Handshake(answer.int16(), tuple(answer.string() or "" for _ in range(answer.int32())))

    def authenticate(self, token: bytes) -> Authenticated:
        """Give one SASL token."""
        answer = self._ask(_SASL_AUTHENTICATE, 0, struct.pack(">i", len(token)) + token)
        return Authenticated(answer.int16(), answer.string() or "", answer.bytes())

    def _ask(self, api: int, version: int, body: bytes) -> "_Answer":
        self.correlation += 1
        request = struct.pack(">hhi", api, version, self.correlation) + _string("streamlstm-preflight") + body
        self.sock.sendall(struct.pack(">i", len(request)) + request)
        (length,) = struct.unpack(">i", self._read(4))
        if not 4 <= length <= _LARGEST_RESPONSE:
            raise NotKafka(f"a response of {length} bytes")
        answer = _Answer(self._read(length))
        if answer.int32() != self.correlation:
            raise NotKafka("a response to another request")
        return answer

    def _read(self, count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            part = self.sock.recv(count)
            if not part:
                raise HungUp
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class _Answer:
    """A response, read from left to right."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def int16(self) -> int:
        return int.from_bytes(self._take(2), "big", signed=True)

    def int32(self) -> int:
        return int.from_bytes(self._take(4), "big", signed=True)

    def string(self) -> str | None:
        length = self.int16()
        return None if length < 0 else self._take(length).decode("utf-8", "replace")

    def bytes(self) -> bytes:
        length = self.int32()
        return b"" if length < 0 else self._take(length)

    def _take(self, count: int) -> "bytes":
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise NotKafka("a response that ends too soon")
        self._at += count
        return taken


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">h", len(data)) + data
