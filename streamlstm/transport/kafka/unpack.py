"""
Compressed batches, unpacked to no more than a limit: kafka-python itself lets half a megabyte become half a gigabyte.

Every decoder is asked for the next piece, and for one byte more than may come, so that a bomb costs the limit.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kafka import codec
from kafka.errors import UnsupportedCodecError

_libraries: Any = codec
"""Where kafka-python keeps what it found installed. Untyped, because the stubs at hand are those of version 2."""

_PIECE = 1 << 20
_MEMBERS = 64
"""Most gzip members or lz4 frames in one batch: producers write one, and each costs a copy of the rest."""

_XERIAL = struct.pack("!b7s", -126, b"SNAPPY\0")
_XERIAL_HEADER = 16
_ZSTD_WINDOW = 8 << 20
"""What a zstd frame may ask for beyond the limit: no producer's level needs more."""


class CannotUnpack(Exception):
    """Why a batch is not read: one line, without payload."""


class _Codec(NamedTuple):
    name: str
    installed: Callable[[], bool]
    pieces: Callable[[bytes, int], Iterator[bytes]]


def unpack(number: int, data: bytes, limit: int) -> bytearray:
    """
    The records of a batch that is compressed with this codec, by its number in the batch's attributes.

    Raises :class:`CannotUnpack` when the codec is not known, the bytes are not its, or they would become more than
    ``limit``; and :class:`kafka.errors.UnsupportedCodecError` when its library is missing here: that is no fault of
    the batch, and must not decide what becomes of it.
    """
    if number not in _CODECS:
        raise CannotUnpack(f"compressed with codec {number}, which is not known")
    name, installed, pieces = _CODECS[number]
    if not installed():
        raise UnsupportedCodecError(f"Libraries for {name} compression codec not found")
    unpacked = bytearray()
    try:
        for piece in pieces(data, limit):
            unpacked += piece
            if len(unpacked) > limit:
                break
    except CannotUnpack:
        raise
    except MemoryError:
        raise
    except Exception as error:  # each library has exceptions of its own
        raise CannotUnpack(f"not {name}: {type(error).__name__}") from error
    if len(unpacked) > limit:
        raise CannotUnpack(f"{len(data)} bytes of {name} hold more than {limit} bytes")
    return unpacked


def _gzip(data: bytes, limit: int) -> Iterator[bytes]:
    for _ in range(_MEMBERS):
        decoder = zlib.decompressobj(wbits=31)
        while not decoder.eof:
            piece = decoder.decompress(data, min(_PIECE, limit + 1))
            data = decoder.unconsumed_tail
            if not piece and not data and not decoder.eof:
                raise CannotUnpack("gzip that ends too soon")
            yield piece
        data = decoder.unused_data.lstrip(b"\0")
        if not data:
            return
    raise CannotUnpack(f"more than {_MEMBERS} gzip members")


def _snappy(data: bytes, limit: int) -> Iterator[bytes]:
    if not data.startswith(_XERIAL):
        yield _snappy_block(data, limit)
        return
    at, left = _XERIAL_HEADER, limit
    while at < len(data):
        (size,) = struct.unpack_from("!i", data, at)
        at += 4
        if size < 0 or at + size > len(data):
            raise CannotUnpack("snappy that ends too soon")
        block = _snappy_block(data[at : at + size], left)
        left -= len(block)
        at += size
        yield block


def _snappy_block(block: bytes, limit: int) -> bytes:
    """A block begins with its unpacked length, and is not begun when that is too much."""
    size = shift = 0
    for byte in block[:5]:
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if size > limit:
        raise CannotUnpack(f"{len(block)} bytes of snappy hold {size} bytes, more than are left of the limit")
    return _libraries.snappy.decompress(block)


def _lz4(data: bytes, limit: int) -> Iterator[bytes]:
    for _ in range(_MEMBERS):
        decoder = _libraries.lz4.LZ4FrameDecompressor()
        while not decoder.eof:
            if decoder.needs_input and not data:
                raise CannotUnpack("lz4 that ends too soon")
            piece = decoder.decompress(data, max_length=min(_PIECE, limit + 1))
            data = b""
            yield piece
        data = decoder.unused_data
        if not data:
            return
    raise CannotUnpack(f"more than {_MEMBERS} lz4 frames")


def _zstd(data: bytes, limit: int) -> Iterator[bytes]:
    decoder = _libraries.zstd.ZstdDecompressor(max_window_size=max(limit, _ZSTD_WINDOW))
    with decoder.stream_reader(data, read_across_frames=True) as reader:
        while piece := reader.read(min(_PIECE, limit + 1)):
            yield piece


_CODECS = {
    1: _Codec("gzip", _libraries.has_gzip, _gzip),
    2: _Codec("snappy", _libraries.has_snappy, _snappy),
    3: _Codec("lz4", lambda: _libraries.lz4 is not None, _lz4),
    4: _Codec("zstd", _libraries.has_zstd, _zstd),
}
