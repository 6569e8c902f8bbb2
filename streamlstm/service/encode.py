"""
From reports to messages: forecasts as JSON (``layout: nested``), and dead letters.

Columns become bytes without an object per forecast: times and numbers are formatted for all records at once, and one
bytes template per record puts them together. The same report always gives the same bytes: floats are the shortest text
that reads back as the same double, times are RFC 3339 in UTC with as many decimals of the second as they need
(``08:00:00Z``, ``08:00:00.25Z``), fields stand in a fixed order.

Axes: M forecast records, K horizons.
"""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamlstm import __version__
from streamlstm.engine.report import StepReport
from streamlstm.records.batch import F64, I64, Messages, Range, Rejected
from streamlstm.transport.interfaces import OutMessage

_NS = 1_000_000_000
_DAY_S = 86_400
_FIRST_S = -62_135_596_800  # 0001-01-01T00:00:00Z
_LAST_S = 253_402_300_799  # 9999-12-31T23:59:59Z
_CHUNK = 1 << 16  # forecasts formatted at once: bounds the memory of a step with many horizons
_ROWS_CHARS = 1000
_TEXT_CHARS = 4000

MAX_DEAD_LETTER_BYTES = 900 << 10
"""Key, value and headers of a dead letter: less than the 1 MiB that a topic takes by default, with room for framing."""

_CUT_VALUE = 64 << 10
_CUT_KEY = 1 << 10
_CUT_HEADERS = 64 << 10
_POWERS = 10 ** np.arange(8, -1, -1, dtype=np.int64)


def _clocks_of_day() -> NDArray[np.bytes_]:
    """``00:00:00`` to ``23:59:59``: a table is faster than arithmetic on digits."""
    two = np.array([b"%02d" % i for i in range(60)])
    text = np.empty((24, 60, 60), [("h", "S2"), ("hm", "S1"), ("m", "S2"), ("ms", "S1"), ("s", "S2")])
    text["hm"] = text["ms"] = b":"
    text["h"], text["m"], text["s"] = two[:24, None, None], two[:, None], two
    return text.ravel().view("S8")


_CLOCK_OF_DAY = _clocks_of_day()


class ForecastEncoder:
    """
    What one deployment publishes: forecasts, with key = series id and the timestamp of their input message.

    Not the event time: the broker's retention goes by a message's timestamp and would delete the forecasts of a
    backfill as they are written, and it refuses what lies ahead of its clock. The event time is the ``cutoff``.

    :param config_hash: hex digest of the configuration; its first 8 digits go into every forecast.
    :param revision: how often the deployment went back, or began anew: of two forecasts with the same coordinates the
        higher one counts.
    """

    def __init__(self, config_hash: str, horizons: int, revision: int = 0, version: str = __version__) -> None:
        model = f'"version":{_json(version).decode()},"config":"{config_hash[:8]}","revision":{revision}'
        self._head = b'{"schema":1,"series_id":%b,"cutoff":"%bZ","y":%b,"status":"%b","forecasts":['
        self._tail = (
            b'],"model":{' + model.replace("%", "%%").encode() + b',"update":%d},"source":{%b,"offset":%d,"row":%d}}'
        )
        self._version = version
        self._horizons = horizons
        self._dated = self._template(b'{"horizon":%d,"ds":"%%bZ","yhat":%%b}')
        self._undated = self._template(b'{"horizon":%d,"ds":null,"yhat":%%b}')

    def _template(self, one: bytes) -> bytes:
        return self._head + b",".join(one % j for j in range(1, self._horizons + 1)) + self._tail

    def encode_forecasts(self, report: StepReport) -> list[OutMessage]:
        """One message per forecast record, in the report's order."""
        step = max(1, _CHUNK // self._horizons)
        messages: list[OutMessage] = []
        for start in range(0, len(report.forecasts), step):
            messages += self._encode(report, slice(start, start + step))
        return messages

    def _encode(self, report: StepReport, part: slice) -> list[OutMessage]:
        batch, out, K = report.batch, report.forecasts, self._horizons
        record_M = out.record_M[part]
        time_ns_M, interval_ns_M = batch.time_ns[record_M], out.interval_ns_M[part]
        cutoff_M = format_times(time_ns_M // _NS, time_ns_M % _NS)
        y_M = _format_floats(batch.target[record_M])
        yhat_MK = _format_floats(out.yhat_MK[part].ravel())
        ds_MK, dated_M = _format_due_times(time_ns_M, interval_ns_M, K)

        used = np.unique(batch.code[record_M]).tolist()
        text = {code: _utf8(batch.series[code].key) for code in used}
        quoted = {code: _json(key.decode()) for code, key in text.items()}
        places = [b'"topic":%b,"partition":%d' % (_json(r.topic), r.partition) for r in batch.cut]
        stamp_ms_M = _stamps_ms(time_ns_M, batch.broker_ns[record_M])

        messages: list[OutMessage] = []
        pairs: list[bytes] = [b""] * (2 * K)
        at = 0
        for code, cutoff, y, warming, dated, update, place, offset, row, stamp_ms in zip(
            batch.code[record_M].tolist(),
            cutoff_M,
            y_M,
            out.warming_M[part].tolist(),
            dated_M.tolist(),
            out.update_M[part].tolist(),
            batch.range_index[record_M].tolist(),
            batch.offset[record_M].tolist(),
            batch.row[record_M].tolist(),
            stamp_ms_M.tolist(),
            strict=True,
        ):
            if dated:
                pairs[0::2] = ds_MK[at : at + K]
                pairs[1::2] = yhat_MK[at : at + K]
                template, values = self._dated, pairs
            else:
                template, values = self._undated, yhat_MK[at : at + K]
            status = b"warming" if warming else b"ready"
            value = template % (quoted[code], cutoff, y, status, *values, update, places[place], offset, row)
            messages.append(OutMessage(text[code], value, [], stamp_ms))
            at += K
        return messages

    def encode_dead_letters(self, report: StepReport, messages: Messages) -> list[OutMessage]:
        """
        One dead letter per message with rejected rows: key, value and headers untouched, plus ``streamlstm.error.*``.

        ``reason``, ``message`` and ``path`` are those of the first bad row, ``rows`` lists them all (``0,2-5``).
        ``timestamp`` is the input message's, so that the same log makes the same dead letters.

        A message that would make more than :data:`MAX_DEAD_LETTER_BYTES` is cut, for the topic would refuse it at
        every start: 64 KiB of the value and 1 KiB of the key are kept, the headers if they come to no more than 64 KiB,
        and ``value_bytes`` and ``value_sha256`` tell of the whole value.
        """
        bad: dict[tuple[str, int, int], list[Rejected]] = {}
        for rejected in report.rejected:
            bad.setdefault((rejected.topic, rejected.partition, rejected.offset), []).append(rejected)
        letters: list[OutMessage] = []
        for i, rows in sorted((_index(messages, *place), rows) for place, rows in bad.items()):
            first = min(rows, key=lambda r: r.row)
            broker_ns = int(messages.broker_ns[i])
            stamp = (
                format_times(np.array([broker_ns // _NS]), np.array([broker_ns % _NS]))[0] + b"Z"
                if broker_ns >= 0
                else b""
            )
            error = {
                "reason": first.reason.encode(),
                "message": _utf8(_shorten(first.message)),
                "path": _utf8(_shorten(first.path)),
                "topic": _utf8(first.topic),
                "partition": b"%d" % first.partition,
                "offset": b"%d" % first.offset,
                "rows": _format_rows([r.row for r in rows]).encode(),
                "timestamp": stamp,
                "version": self._version.encode(),
            }
            key, value = messages.key[i], messages.value[i]
            headers = [*(messages.headers[i] if messages.headers else ())]
            told = [(f"streamlstm.error.{name}", text) for name, text in error.items()]
            if len(key or b"") + len(value or b"") + _size(headers) + _size(told) > MAX_DEAD_LETTER_BYTES:
                if value is not None:
                    told.append(("streamlstm.error.value_bytes", b"%d" % len(value)))
                    told.append(("streamlstm.error.value_sha256", hashlib.sha256(value).hexdigest().encode()))
                key, value = key and key[:_CUT_KEY], value and value[:_CUT_VALUE]
                headers = headers if _size(headers) <= _CUT_HEADERS else []
            stamp_ms = broker_ns // 1_000_000 if broker_ns >= 0 else None
            letters.append(OutMessage(key, value, headers + told, stamp_ms))
        return letters


def format_times(seconds: I64, nanos: NDArray[np.integer]) -> list[bytes]:
    """
    RFC 3339 without the final ``Z``, for years 1 to 9999: seconds since the epoch and ns within the second.

    >>> format_times(np.array([1_795_075_200, -1]), np.array([0, 250_000_000]))
    [b'2026-11-19T08:00:00', b'1969-12-31T23:59:59.25']
    """
    if not seconds.size:
        return []
    day, clock = np.divmod(seconds, _DAY_S)
    first, last = int(day.min()), int(day.max())
    if last - first <= day.size + 366:  # the usual case: few days, many times
        date = np.datetime_as_string(np.arange(first, last + 1).astype("datetime64[D]")).astype("S10")[day - first]
    else:
        date = np.datetime_as_string(day.astype("datetime64[D]")).astype("S10")
    fraction = bool(nanos.any())
    layout = [("date", "S10"), ("T", "S1"), ("clock", "S8")] + (
        [("point", "u1"), ("digits", "u1", 9)] if fraction else []
    )
    text = np.empty(seconds.size, np.dtype(layout))
    text["date"], text["T"], text["clock"] = date, b"T", _CLOCK_OF_DAY[clock]
    if fraction:  # trailing NULs are not part of a numpy string: what is not needed becomes NUL
        text["point"] = np.where(nanos == 0, 0, ord("."))
        nanos = nanos[:, None]
        text["digits"] = np.where(nanos % (10 * _POWERS) == 0, 0, nanos // _POWERS % 10 + ord("0"))
    return text.view(f"S{text.itemsize}").tolist()


def _format_due_times(time_ns_M: I64, interval_ns_M: I64, horizons: int) -> tuple[list[bytes], NDArray[np.bool_]]:
    """
    When each forecast is due, M × K, and which records know that: those with an interval, and all due by year 9999.

    Seconds and nanoseconds are kept apart: a thousand long intervals overflow int64 nanoseconds.
    """
    j_K = np.arange(1, horizons + 1)
    nanos_MK = (time_ns_M % _NS)[:, None] + (interval_ns_M % _NS)[:, None] * j_K
    seconds_MK = (time_ns_M // _NS)[:, None] + (interval_ns_M // _NS)[:, None] * j_K + nanos_MK // _NS
    dated_M = (interval_ns_M > 0) & (seconds_MK[:, -1] <= _LAST_S)
    seconds_MK = np.clip(seconds_MK, _FIRST_S, _LAST_S)
    return format_times(seconds_MK.ravel(), (nanos_MK % _NS).ravel()), dated_M


def _stamps_ms(time_ns_M: I64, broker_ns_M: I64) -> I64:
    """The input message's own timestamp; the event time, but not before the epoch, where it had none."""
    return np.where(broker_ns_M >= 0, broker_ns_M, np.maximum(time_ns_M, 0)) // 1_000_000


def _format_floats(values: F64) -> list[bytes]:
    """Shortest text that reads back the same; ``null`` for NaN."""
    return msgspec.json.encode(values.tolist())[1:-1].split(b",") if values.size else []


def _index(messages: Messages, topic: str, partition: int, offset: int) -> int:
    """Where in the cut a message is: its range, then its offset, both ascending."""
    for i, r in enumerate(messages.cut):
        if _holds(r, topic, partition, offset):
            start, end = np.searchsorted(messages.range_index, [i, i + 1])
            at = int(start + np.searchsorted(messages.offset[start:end], offset))
            if at < end and messages.offset[at] == offset:
                return at
    raise LookupError(f"{topic}-{partition} @ {offset} is not in the cut")


def _holds(r: Range, topic: str, partition: int, offset: int) -> bool:
    return r.topic == topic and r.partition == partition and r.start <= offset < r.end


def _format_rows(rows: Sequence[int]) -> str:
    """
    Rows as ranges, cut with ``…`` where they would fill a header.

    >>> _format_rows([5, 0, 3, 4])
    '0,3-5'
    """
    parts: list[list[int]] = []
    for row in sorted(set(rows)):
        if parts and row == parts[-1][1] + 1:
            parts[-1][1] = row
        else:
            parts.append([row, row])
    text = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)
    return text if len(text) <= _ROWS_CHARS else text[: text.rindex(",", 0, _ROWS_CHARS)] + ",…"


def _size(headers: Sequence[tuple[str, bytes | None]]) -> int:
    """Bytes of headers, with what their framing takes."""
    return sum(8 + len(_utf8(name)) + len(value or b"") for name, value in headers)


def _shorten(text: str) -> str:
    """What fits a header: a field name from the message may be as long as the message."""
    return text if len(text) <= _TEXT_CHARS else text[:_TEXT_CHARS] + "…"


def _utf8(text: str) -> bytes:
    """UTF-8, whatever the text: a lone surrogate must not stop the stream."""
    return text.encode("utf-8", "backslashreplace")


def _json(text: str) -> bytes:
    return msgspec.json.encode(text)
