"""
Files as a source of messages, and as a sink of forecasts.

The files are one partition of a topic, in the order given: the offset counts their rows from 0 on, over all of them,
and there is no broker's timestamp. What stands in for the topic's id is a digest of what was read. Files do not grow.
"""

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from csv import Error as CsvError
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamlstm.config.model import Decode
from streamlstm.errors import DataError, LogGap, StreamlstmError
from streamlstm.records.batch import F64, I32, I64, Cut, Messages, Range, RecordBatch, SeriesId
from streamlstm.records.csv import ends_quoted, split
from streamlstm.transport.interfaces import Position

_BOM = b"\xef\xbb\xbf"
_SKIP_AT_ONCE = 10_000


class _Row(NamedTuple):
    """One row of a file without its line end, and how many bytes of the file it used up."""

    value: bytes
    consumed: int


class FileSource:
    """
    The rows of CSV or NDJSON files as messages, in bounded memory.

    A CSV row may have line ends inside quotes; blank lines are no rows, and a header is read from each file: they must
    agree. Of a row longer than ``decode.max_bytes`` just enough is kept to be rejected for it.

    Raises :class:`~streamlstm.errors.DataError` for a file that cannot be read or has no usable header.
    """

    def __init__(self, paths: Sequence[Path], *, topic: str, decode: Decode) -> None:
        if not paths:
            raise DataError("no file to read")
        self.topic = topic
        self._paths = list(paths)
        self._delimiter = decode.csv.delimiter.encode() if decode.format == "csv" else None
        self._max_bytes = decode.max_bytes
        try:
            self.bytes_total = sum(path.stat().st_size for path in paths)
        except OSError as why:
            raise DataError(f"cannot read {why.filename}: {why.strerror}") from why
        self.columns = self._agreed_columns() if self._delimiter else None
        """Names in the header, for CSV."""
        self._restart()

    @property
    def bytes_read(self) -> int:
        """How much of ``bytes_total`` lies behind the next row."""
        return self._bytes_read

    @property
    def exhausted(self) -> bool:
        """Whether the last row has been read."""
        return self._exhausted

    def content_digest(self) -> str:
        """SHA-256 (hex) of the header and of all rows before the next one, whatever the line ends."""
        return self._sha.hexdigest()

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:  # noqa: ARG002, because files never wait
        """The next rows, or ``None`` after the last one."""
        start = self._next
        values = self._take(max_records)
        if not values:
            return None
        return self._messages((Range(self.topic, 0, start, self._next),), values)

    def read(self, cut: Cut, timeout_s: float) -> Messages:  # noqa: ARG002, because files never wait
        """Exactly these rows. Raises :class:`~streamlstm.errors.LogGap` when the files have not got them."""
        values: list[bytes] = []
        for part in cut:
            if (part.topic, part.partition) != (self.topic, 0):
                raise DataError(f"the cut is of {part.topic}[{part.partition}], the files are {self.topic}[0]")
            if part.start != self._next:
                self._go_to(part.start)
            values += self._take(part.end - part.start)
            if self._next != part.end:
                raise LogGap(f"{self.topic}: the cut ends at row {part.end}, the files at {self._next}")
        return self._messages(cut, values)

    def seek(self, positions: Sequence[Position]) -> None:
        """Go on from this row; what lies before it is read again for the digest."""
        for position in positions:
            if (position.topic, position.partition) != (self.topic, 0):
                raise DataError(f"there is no {position.topic}[{position.partition}], the files are {self.topic}[0]")
            self._go_to(position.next_offset)

    def close(self) -> None:
        """Give everything back. Never raises."""
        self._rows.close()

    def _restart(self) -> None:
        self._rows = self._all_rows()
        self._next = 0
        self._bytes_read = 0
        self._exhausted = False
        self._sha = hashlib.sha256("\n".join(self.columns or ()).encode() + b"\n")

    def _go_to(self, row: int) -> None:
        if row < self._next:
            self._rows.close()
            self._restart()
        while self._next < row:
            if not self._take(min(row - self._next, _SKIP_AT_ONCE)):
                raise LogGap(f"{self.topic}: row {row} is asked for, the files end at {self._next}")

    def _take(self, count: int) -> list[bytes]:
        taken = list(islice(self._rows, count))
        values = [row.value for row in taken]
        self._next += len(values)
        self._bytes_read += sum(row.consumed for row in taken)
        if len(values) < count:
            self._exhausted = True
            self._bytes_read = self.bytes_total
        if values:
            self._sha.update(b"\n".join(values) + b"\n")
        return values

    def _messages(self, cut: Cut, values: Sequence[bytes]) -> Messages:
        sizes = [part.end - part.start for part in cut]
        offsets = [np.arange(part.start, part.end, dtype=np.int64) for part in cut]
        return Messages(
            cut=cut,
            range_index=np.repeat(np.arange(len(cut), dtype=np.int32), sizes),
            offset=np.concatenate(offsets) if offsets else np.empty(0, np.int64),
            broker_ns=np.full(len(values), -1, np.int64),
            key=[None] * len(values),
            value=list(values),
        )

    def _all_rows(self) -> Generator[_Row]:
        for path in self._paths:
            try:
                with path.open("rb") as file:
                    rows = self._rows_of(file)
                    if self._delimiter:
                        next(rows, None)  # the header
                    yield from rows
            except OSError as why:
                raise DataError(f"cannot read {path}: {why.strerror}") from why

    def _rows_of(self, file: BinaryIO) -> Iterator[_Row]:
        """The rows that are not blank. ``consumed`` covers the blank lines before a row too."""
        behind = 0
        for row in self._joined(self._lines(file)):
            behind += row.consumed
            if row.value.strip():
                yield _Row(row.value, behind)
                behind = 0

    def _lines(self, file: BinaryIO) -> Iterator[_Row]:
        limit = self._max_bytes + 4
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(start)
        while line := file.readline(limit):
            consumed = len(line) + start
            rest = line
            while len(rest) == limit and not rest.endswith(b"\n"):
                rest = file.readline(limit)
                consumed += len(rest)
            yield _Row(line, consumed)
            start = 0

    def _joined(self, lines: Iterator[_Row]) -> Iterator[_Row]:
        """
        Lines, joined where a quoted cell goes on, without the last line end.

        A quote that is not closed within ``max_bytes`` was never meant to open a cell: its line is a row by itself,
        which decoding will reject, and the lines after it are looked at anew.
        """
        ahead: deque[_Row] = deque()
        while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
            whole = [line]
            size = len(line.value)
            open_quote = (
                bool(self._delimiter) and b'"' in line.value and ends_quoted(line.value, self._delimiter or b"")
            )
            while open_quote and size <= self._max_bytes:
                more = ahead.popleft() if ahead else next(lines, None)
                if more is None:
                    break
                whole.append(more)
                size += len(more.value)
                open_quote = ends_quoted(more.value, self._delimiter or b"", quoted=True)
            if open_quote:
                ahead.extendleft(reversed(whole[1:]))
                whole = [line]
            value = b"".join(part.value for part in whole)
            yield _Row(value.removesuffix(b"\n").removesuffix(b"\r"), sum(part.consumed for part in whole))

    def _agreed_columns(self) -> tuple[str, ...]:
        first = self._columns_of(self._paths[0])
        for path in self._paths[1:]:
            if (columns := self._columns_of(path)) != first:
                raise DataError(f"{path} has the columns {list(columns)}, {self._paths[0]} has {list(first)}")
        return first

    def _columns_of(self, path: Path) -> tuple[str, ...]:
        assert self._delimiter is not None
        try:
            with path.open("rb") as file:
                header = next(self._rows_of(file), None)
        except OSError as why:
            raise DataError(f"cannot read {path}: {why.strerror}") from why
        if header is None:
            raise DataError(f"{path} is empty; a CSV file starts with a row of column names")
        try:
            columns = split(header.value, self._delimiter.decode())
        except (UnicodeDecodeError, CsvError):
            raise DataError(f"{path}: the header is not CSV in UTF-8") from None
        twice = sorted({name for name in columns if name and columns.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the header names {', '.join(twice)} twice; rename one of each")
        return tuple(columns)


class ForecastColumns(Protocol):
    """What the writer needs of a step's forecasts, one row for each of M records; K horizons."""

    @property
    def record_M(self) -> I32:
        """Index in the batch."""
        ...

    @property
    def clock_M(self) -> I64:
        """The series' own count of intervals."""
        ...

    @property
    def age_M(self) -> I64:
        """Records since the series' last reset, 1 for the first."""
        ...

    @property
    def interval_ns_M(self) -> I64:
        """Learnt spacing, 0 where there is none."""
        ...

    @property
    def yhat_MK(self) -> F64:
        """The forecasts."""
        ...


class Report(Protocol):
    """What the writer needs of a step's report."""

    @property
    def batch(self) -> RecordBatch:
        """The records the forecasts were made from."""
        ...

    @property
    def forecasts(self) -> ForecastColumns:
        """One row per fresh record, in the batch's order."""
        ...


@dataclass(frozen=True, slots=True)
class _Open:
    """Forecasts not yet written, F records in order of arrival. ``series_F`` numbers series over the writer's life."""

    series_F: I64
    clock_F: I64
    restart_F: NDArray[np.bool_]
    time_ns_F: I64
    interval_ns_F: I64
    target_F: F64
    offset_F: I64
    row_F: I32
    yhat_FK: F64

    def __len__(self) -> int:
        return len(self.series_F)

    def take(self, at: NDArray[np.intp]) -> "_Open":
        return _Open(*(getattr(self, column.name)[at] for column in fields(self)))

    @staticmethod
    def joined(parts: Sequence["_Open"]) -> "_Open":
        return _Open(*(np.concatenate([getattr(part, c.name) for part in parts]) for c in fields(_Open)))


FORECAST_SCHEMA = pa.schema(
    [
        ("series_id", pa.string()),
        ("cutoff", pa.timestamp("ns", tz="UTC")),
        ("ds", pa.timestamp("ns", tz="UTC")),
        ("horizon", pa.int32()),
        ("yhat", pa.float64()),
        ("y", pa.float64()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("row", pa.int32()),
    ]
)
"""One row per forecast and horizon. ``ds`` is null while a series' interval is unknown, ``y`` where no truth came."""

ROWS_AT_ONCE = 1 << 18
"""Rows of the file that are put together in memory: the most in a row group."""
MOST_OPEN = 1 << 24
"""Forecast values that may wait for their truth: 128 MiB of them, and as much again while they are written."""


class ForecastWriter:
    """
    Forecasts as a Parquet file, each with the truth that came for it.

    The truth of horizon j of the forecast at clock n is the target of the same series' record with clock n + j, unless
    the series was reset in between. A forecast is written when all its horizons have passed; those still open at
    the end, or the oldest when more than ``most_open`` values wait, are written with what has come. So the file is not
    quite in the order of the log: the coordinates ``topic, partition, offset, row, horizon`` name a forecast.

    The file appears under its name when :meth:`close` returns, whole and durable, or not at all.
    """

    def __init__(self, path: Path, *, most_open: int = MOST_OPEN, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._most_open = most_open
        self._rows_at_once = rows_at_once
        self._series: dict[SeriesId, int] = {}
        self._waiting: list[_Open] = []
        self._fresh = 0
        self._kept = 0
        self.cut_short = 0
        """Records written before all their horizons had passed, because too many waited."""
        try:
            self._file = self._partial.open("wb")
            self._writer = pq.ParquetWriter(self._file, FORECAST_SCHEMA, compression="zstd")
        except OSError as why:
            raise self._failed(why) from why

    def write(self, report: Report) -> None:
        """Take the forecasts of the next step, and its records as truth."""
        batch, out = report.batch, report.forecasts
        if not len(out.record_M):
            return
        numbers = np.array([self._series.setdefault(series, len(self._series)) for series in batch.series], np.int64)
        self._waiting.append(
            _Open(
                series_F=numbers[batch.code[out.record_M]],
                clock_F=out.clock_M,
                restart_F=out.age_M == 1,
                time_ns_F=batch.time_ns[out.record_M],
                interval_ns_F=out.interval_ns_M,
                target_F=batch.target[out.record_M],
                offset_F=batch.offset[out.record_M],
                row_F=batch.row[out.record_M],
                yhat_FK=out.yhat_MK,
            )
        )
        self._fresh += len(out.record_M)
        if self._fresh * out.yhat_MK.shape[1] >= max(self._rows_at_once, self._kept * out.yhat_MK.shape[1]):
            self._settle(last=False)

    def close(self) -> None:
        """Write what is left, and let the file appear under its name."""
        try:
            self._settle(last=True)
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as why:
            self.discard()
            raise self._failed(why) from why

    def discard(self) -> None:
        """Leave no file behind. Never raises."""
        for undo in (self._writer.close, self._file.close, lambda: self._partial.unlink(missing_ok=True)):
            with suppress(OSError):  # a full disk, perhaps: what was written goes anyway
                undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _failed(self, why: OSError) -> StreamlstmError:
        return StreamlstmError(f"cannot write {self._path}: {why.strerror or why}")

    def _settle(self, *, last: bool) -> None:
        """Write the forecasts whose horizons have all passed; with ``last``, all of them."""
        if not self._waiting:
            return
        held = _Open.joined(self._waiting)
        horizons = held.yhat_FK.shape[1]
        by_series = np.argsort(held.series_F, kind="stable")
        series, clock = held.series_F[by_series], held.clock_F[by_series]
        life = np.cumsum(held.restart_F[by_series], dtype=np.int64)
        newest = np.searchsorted(series, series, side="right") - 1
        ready = (clock[newest] - clock >= horizons) | (life[newest] != life)
        if last:
            ready[:] = True
        else:
            waiting = np.flatnonzero(~ready)
            excess = len(waiting) - self._most_open // horizons
            if excess > 0:
                ready[waiting[np.argsort(by_series[waiting])[:excess]]] = True
                self.cut_short += excess
        place = np.flatnonzero(ready)
        place = place[np.argsort(by_series[place])]
        step = max(1, self._rows_at_once // horizons)
        for begin in range(0, len(place), step):
            some = place[begin : begin + step]
            y_SK = _truth(series, clock, life, held.target_F[by_series], some, horizons)
            self._write_rows(held.take(by_series[some]), y_SK)
        rest = held.take(np.sort(by_series[~ready]))
        self._waiting = [rest] if len(rest) else []
        self._kept = len(rest)
        self._fresh = 0

    def _write_rows(self, some: _Open, y_SK: F64) -> None:
        horizons = y_SK.shape[1]
        horizon = np.arange(1, horizons + 1)
        interval = some.interval_ns_F[:, None]
        timed = (interval > 0) & (interval <= (1 << 62) // horizon)
        ds_ns = some.time_ns_F[:, None] + np.where(timed, interval, 0) * horizon
        ids = list(self._series)
        of = np.repeat(some.series_F, horizons)
        yhat = some.yhat_FK.ravel()
        y = y_SK.ravel()
        moment = pa.timestamp("ns", tz="UTC")
        columns = [
            pa.array([series.key for series in ids], pa.string()).take(pa.array(of)),
            pa.array(np.repeat(some.time_ns_F, horizons)).cast(moment),
            pa.array(ds_ns.ravel(), mask=~timed.ravel()).cast(moment),
            pa.array(np.tile(horizon.astype(np.int32), len(some))),
            pa.array(yhat, mask=np.isnan(yhat)),
            pa.array(y, mask=np.isnan(y)),
            pa.array([series.topic for series in ids], pa.string()).take(pa.array(of)),
            pa.array([series.partition for series in ids], pa.int32()).take(pa.array(of)),
            pa.array(np.repeat(some.offset_F, horizons)),
            pa.array(np.repeat(some.row_F, horizons)),
        ]
        try:
            self._writer.write_table(pa.table(columns, schema=FORECAST_SCHEMA))
        except OSError as why:
            raise self._failed(why) from why


def _truth(series: I64, clock: I64, life: I64, target: F64, some: NDArray[np.intp], horizons: int) -> F64:
    """
    What came true for ``some`` of the records: ``y[i, j - 1]`` is the target at clock + j, NaN where there is none.

    The columns are sorted by series, and by clock in each: the records a forecast speaks about stand behind its own.
    """
    y_SK = np.full((len(some), horizons), np.nan)
    who = np.arange(len(some))
    for ahead in range(1, horizons + 1):
        who = who[some[who] + ahead < len(series)]
        here, there = some[who], some[who] + ahead
        near = (series[there] == series[here]) & (life[there] == life[here]) & (clock[there] - clock[here] <= horizons)
        who, here, there = who[near], here[near], there[near]
        if not len(who):
            break
        y_SK[who, clock[there] - clock[here] - 1] = target[there]
    return y_SK
