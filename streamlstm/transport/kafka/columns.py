"""
From the bytes of unpacked batches to records as columns, many at once.

kafka-python reads one record after the other, byte by byte, in Python: 4 µs each, most of what reading costs. Here only
the lengths of the records are walked in Python, because each says where the next one begins; every other field is read
by numpy, for all records at a time.

Nothing is judged here. Bytes that are not just as they should be are given to kafka-python, which says what is wrong
with them; so are numbers that could leave 64 bits, and records so few that numpy costs more than it saves.

Axes: N records.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from kafka.errors import CorruptRecordError
from kafka.record.util import decode_varint
from numpy.typing import NDArray

from streamlstm.records.batch import I64, Headers
from streamlstm.transport.kafka.waiting import Records

U8 = NDArray[np.uint8]

FEW = 24
"""Fewer records than these are read faster one by one."""

_LATEST_MS = ((1 << 63) - 1) // 1_000_000
_INT64 = range(-(1 << 63), 1 << 63)
_SAFE = 1 << 62
"""Two numbers below this have a sum of 64 bits."""

_NONE = np.empty(0, np.int64)
_PAD = bytes(64)
"""Behind the last record: six numbers may be read behind its end before that is seen."""


class Run(NamedTuple):
    """
    So many ``records`` of an unpacked batch, from where reading it stands; with ``whole`` they are all that is left.

    ``instead`` is what stands for them when the batch could not be unpacked.
    """

    batch: Any
    records: int
    whole: bool
    instead: Records | None = None


class Damage(NamedTuple):
    """A batch in which something is not as it should be, and what that is."""

    batch: Any
    error: Exception


class _Odd(Exception):
    """These bytes are not for us."""


def read(runs: Sequence[Run]) -> tuple[Records, Damage | None]:
    """
    The records of runs by one leader, and the batches moved on behind them. With a damage they are those before it.

    A run that has something ``instead`` comes alone.
    """
    if runs[0].instead is not None:
        return runs[0].instead, None
    if sum([run.records for run in runs]) >= FEW:
        try:
            return _columns(runs), None
        except _Odd:
            pass
    return _one_by_one(runs)


def broker_ns(timestamp_ms: int) -> int:
    """
    A broker's timestamp, or -1: a producer may write any number, and what does not fit is no time.

    >>> broker_ns(1_700_000_000_123), broker_ns(-1), broker_ns(1 << 62)
    (1700000000123000000, -1, -1)
    """
    return timestamp_ms * 1_000_000 if 0 <= timestamp_ms <= _LATEST_MS else -1


def _one_by_one(runs: Sequence[Run]) -> tuple[Records, Damage | None]:
    found: list[Any] = []
    damage = None
    for batch, count, whole, _ in runs:
        try:
            # Behind the last record of a batch there must be nothing.
            found.extend(map(_checked, batch if whole else islice(batch, count)))
        except CorruptRecordError as error:
            damage = Damage(batch, error)
            break
    offsets: list[int] = []
    times: list[int] = []
    records = Records(_NONE, _NONE, [], [], None, [], runs[-1].batch.leader_epoch)
    for r in found:
        key, value = r.key, r.value
        offsets.append(r.offset)
        times.append(broker_ns(r.timestamp))
        records.key.append(key)
        records.value.append(value)
        records.payload.append(len(key or b"") + len(value or b""))
    records.offset, records.broker_ns = np.array(offsets, np.int64), np.array(times, np.int64)
    if any(r.headers for r in found):
        records.headers = [[(name, value or b"") for name, value in r.headers] for r in found]
    return records, damage


def _checked(record: Any) -> Any:  # noqa: ANN401, because the client's types are untyped
    if record.offset not in _INT64:
        raise CorruptRecordError("Out of int64 range")
    return record


def _columns(runs: Sequence[Run]) -> Records:
    begins: list[int] = []
    sizes: list[int] = []
    spans: list[memoryview] = []
    moved: list[int] = []
    end = total = 0
    for batch, count, whole, _ in runs:
        data, start = batch._buffer, batch._pos  # noqa: SLF001, because nothing public reaches the bytes
        end = _walk(data, start, count, begins, sizes)
        if end > len(data) or (whole and end != len(data)):
            raise _Odd
        spans.append(memoryview(data)[start:end])
        moved.append(total - start)
        total += end - start
    text = b"".join((*spans, _PAD))
    byte = np.frombuffer(text, np.uint8)
    counts = [run.records for run in runs]
    size_N = np.array(sizes)
    if (size_N & 1).any():
        raise _Odd  # zigzag: they are less than nothing
    at_N = np.array(begins) + np.repeat(moved, counts)
    end_N = at_N + (size_N >> 1)
    _, at_N = _numbers(byte, at_N)  # attributes, of which there are none yet
    later_ms_N, at_N = _numbers(byte, at_N)
    further_N, at_N = _numbers(byte, at_N)
    key_N, key_at_N = _numbers(byte, at_N)
    value_N, value_at_N = _numbers(byte, np.minimum(key_at_N + np.maximum(key_N, 0), end_N))
    headers_N, at_N = _numbers(byte, np.minimum(value_at_N + np.maximum(value_N, 0), end_N))
    headers = _headers(text, at_N, end_N, headers_N)
    base, first_ms, moves = zip(*(_origin(run.batch) for run in runs), strict=True)
    ms_N = np.repeat(first_ms, counts) + later_ms_N * np.repeat(moves, counts)
    records = Records(
        offset=np.repeat(base, counts) + further_N,
        broker_ns=np.where((ms_N < 0) | (ms_N > _LATEST_MS), -1, ms_N * 1_000_000),
        key=_slices(text, key_at_N, key_N),
        value=_slices(text, value_at_N, value_N),
        headers=headers,
        payload=(np.maximum(key_N, 0) + np.maximum(value_N, 0)).tolist(),
        leader_epoch=runs[-1].batch.leader_epoch,
    )
    last = runs[-1]
    last.batch._pos = end  # noqa: SLF001, because see above
    last.batch._next_record_index += last.records  # noqa: SLF001, because see above
    return records


def _walk(data: bytearray, at: int, count: int, begins: list[int], sizes: list[int]) -> int:
    """Where so many records begin, behind their length, and that length in zigzag; returns where the last one ends."""
    begin, size_of = begins.append, sizes.append
    try:
        for _ in range(count):
            size = data[at]
            at += 1
            shift = 7
            while size >> shift:
                if shift > 28:
                    raise _Odd
                size += (data[at] - 1) << shift  # less the bit that said that there is more
                at += 1
                shift += 7
            begin(at)
            size_of(size)
            at += size >> 1
    except IndexError:
        raise _Odd from None
    return at


def _numbers(byte: U8, at_N: I64) -> tuple[I64, I64]:
    """The zigzag varints that begin at these places, of up to 9 bytes, and where they end."""
    part_N = byte[at_N].astype(np.int64)
    end_N = at_N + 1
    number_N = part_N & 0x7F
    more = np.flatnonzero(part_N > 0x7F)
    shift = 7
    while len(more):
        if shift > 56:
            raise _Odd
        part = byte[end_N[more]].astype(np.int64)
        number_N[more] |= (part & 0x7F) << shift
        end_N[more] += 1
        more = more[part > 0x7F]
        shift += 7
    return (number_N >> 1) ^ -(number_N & 1), end_N


def _slices(text: bytes, at_N: I64, size_N: I64) -> list[bytes | None]:
    ends = (at_N + size_N).tolist()
    if size_N.min() >= 0:
        return [text[at:end] for at, end in zip(at_N.tolist(), ends, strict=True)]
    return [text[at:end] if end >= at else None for at, end in zip(at_N.tolist(), ends, strict=True)]


def _headers(text: bytes, at_N: I64, end_N: I64, count_N: I64) -> list[Headers] | None:
    """The headers of each record, which end it; ``None`` when there are none at all."""
    if not count_N.any():
        if (at_N != end_N).any():
            raise _Odd
        return None
    return [
        _record_headers(text, at, end, count)
        for at, end, count in zip(at_N.tolist(), end_N.tolist(), count_N.tolist(), strict=True)
    ]


def _record_headers(text: bytes, at: int, end: int, count: int) -> Headers:
    """A name may be any bytes, whatever Kafka says, and a header without a value has an empty one."""
    headers: Headers = []
    try:
        while len(headers) != count and at < end:
            size, at = decode_varint(text, at)
            name = text[at : at + size]
            if size < 0:
                raise _Odd
            at += size
            size, at = decode_varint(text, at)
            headers.append((name.decode("utf-8", "backslashreplace"), text[at : at + max(0, size)]))
            at += max(0, size)
    except (ValueError, IndexError):
        raise _Odd from None
    if at != end or len(headers) != count:
        raise _Odd
    return headers


def _origin(batch: Any) -> tuple[int, int, int]:  # noqa: ANN401, because the client's types are untyped
    """What offsets and timestamps of a batch are counted from, and whether a record has a timestamp of its own."""
    if batch.timestamp_type == batch.LOG_APPEND_TIME:
        origin = batch.base_offset, batch.max_timestamp, 0
    else:
        origin = batch.base_offset, batch.first_timestamp, 1
    if max(map(abs, origin)) >= _SAFE:
        raise _Odd
    return origin
