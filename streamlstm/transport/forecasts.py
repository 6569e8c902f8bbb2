"""Forecasts as a Parquet file, each with the truth that came for it."""

import io
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamlstm.errors import DataError
from streamlstm.records.batch import F64, I32, I64, RecordBatch, SeriesId
from streamlstm.transport.appended import AppendedFile, Disk, unwritable
from streamlstm.transport.interfaces import Frozen


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


class SeriesNumbers:
    """
    Series numbered over a whole stream, by first appearance.

    :param known: those that have a number already, as :meth:`freeze` gave them.
    """

    def __init__(self, known: Iterable[Sequence[Any]] = ()) -> None:
        self._number = {SeriesId(*series): number for number, series in enumerate(known)}

    def number(self, batch: RecordBatch) -> I64:
        """The number of each of the batch's series."""
        numbers = [self._number.setdefault(series, len(self._number)) for series in batch.series]
        return np.array(numbers, np.int64)

    def series(self) -> list[SeriesId]:
        """All of them, each at its number."""
        return list(self._number)


@dataclass(frozen=True, slots=True)
class _Open:
    """Forecasts not yet written, F records in order of arrival. ``series_F`` numbers series over the whole stream."""

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


_BLOCK = 1 << 20


class ForecastWriter:
    """
    Forecasts as a Parquet file, each with the truth that came for it.

    The truth of horizon j of the forecast at clock n is the target of the same series' record with clock n + j, unless
    the series was reset in between. A forecast is written when all its horizons have passed; those still open at
    the end, or the oldest when more than ``most_open`` values wait, are written with what has come. So the file is not
    quite in the order of the log: the coordinates ``topic, partition, offset, row, horizon`` name a forecast.

    A Parquet file cannot be added to once it ends, and says at its end what is in it. So rows are put into a file
    beside it that only grows, as Arrow streams one after the other; :meth:`finish` makes the Parquet file of them,
    which appears under its name whole and durable, or not at all.

    :param frozen: what :meth:`freeze` gave, to go on from there.
    :param finished: whether nothing was written after that: then the file may be whole already.
    :param keep: whether the rows stay when this is closed before it was finished, for another life to go on.
    """

    def __init__(
        self,
        path: Path,
        disk: Disk,
        numbers: SeriesNumbers,
        frozen: Frozen | None = None,
        *,
        finished: bool = False,
        keep: bool = False,
        most_open: int = MOST_OPEN,
        rows_at_once: int = ROWS_AT_ONCE,
    ) -> None:
        self._path, self._disk, self._numbers, self._keep = path, disk, numbers, keep
        self._partial = path.with_name(f".{path.name}.partial")
        self._most_open = most_open
        self._rows_at_once = rows_at_once
        self._waiting: list[_Open] = []
        self._fresh = self._kept = 0
        self.cut_short = 0
        """Records written before all their horizons had passed, because too many waited."""
        if frozen is not None:
            self._fresh, self._kept, self.cut_short = (frozen.values[name] for name in ("fresh", "kept", "cut_short"))
            self._waiting = [_Open(**frozen.arrays)] if frozen.arrays else []
        rows = Frozen(frozen.values["rows"]) if frozen is not None else None
        place = path.with_name(f".{path.name}.rows")
        self._rows = None
        # The rows' name was durable before the generation that says finished: only finishing takes it away.
        if not (finished and path.exists() and not place.exists()):
            self._rows = AppendedFile(place, disk, rows, name=path)

    def write(self, report: Report) -> None:
        """Take the forecasts of the next step, and its records as truth."""
        batch, out = report.batch, report.forecasts
        if not len(out.record_M):
            return
        if self._rows is None:
            raise DataError(f"{self._path} is whole already and cannot be added to; write to another file")
        self._waiting.append(
            _Open(
                series_F=self._numbers.number(batch)[batch.code[out.record_M]],
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
            for table in self._settle(last=False):
                self._rows.append(_as_stream(table))

    def freeze(self) -> Frozen:
        """See :class:`~streamlstm.transport.appended.Output`."""
        held = _Open.joined(self._waiting) if self._waiting else None
        self._waiting = [held] if held else []
        counts = {"fresh": self._fresh, "kept": self._kept, "cut_short": self.cut_short}
        arrays = {column.name: getattr(held, column.name) for column in fields(_Open)} if held else {}
        return Frozen({"rows": self._rows.length if self._rows else 0, **counts}, arrays)

    def sync(self) -> None:
        """See :class:`~streamlstm.transport.appended.Output`."""
        if self._rows:
            self._rows.sync()

    def finish(self) -> None:
        """Write what is left, and let the file appear under its name."""
        if self._rows is None:
            return
        try:
            self._assemble(self._rows)
            self._rows.close()
            self._disk.remove_tree(self._rows.path)
        except OSError as why:
            self.close()
            raise unwritable(self._path, why) from why

    def close(self) -> None:
        """Let go of it. What was not finished leaves no file, but the rows where they are to be kept. Never raises."""
        if self._rows is None:
            return
        self._rows.close()
        for path in (self._partial, *(() if self._keep else (self._rows.path,))):
            with suppress(OSError):  # it is not there, or the disk is full
                self._disk.remove_tree(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def _assemble(self, rows: AppendedFile) -> None:
        """Rows to Parquet, a row group for each time that some were put aside: the same bytes however often killed."""
        with self._disk.extend(self._partial, 0) as file:
            sink = _Held(self._disk, file)
            target = pa.PythonFile(cast("Any", sink), mode="w")
            try:
                with pq.ParquetWriter(target, FORECAST_SCHEMA, compression="zstd") as writer:
                    for table in chain(_tables_of(rows), self._settle(last=True)):
                        writer.write_table(table)
                sink.flush_held()
            except BaseException:
                # Arrow tries to finish its file, and then tells of that instead of the disk.
                if sink.error is not None:
                    raise sink.error from None
                raise
            self._disk.sync(file)
        self._disk.rename(self._partial, self._path)
        self._disk.sync_directory(self._path.parent)

    def _settle(self, *, last: bool) -> Generator[pa.Table, None, None]:
        """The rows of the forecasts whose horizons have all passed; with ``last``, of all of them."""
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
            yield self._as_table(held.take(by_series[some]), y_SK)
        rest = held.take(np.sort(by_series[~ready]))
        self._waiting = [rest] if len(rest) else []
        self._kept = len(rest)
        self._fresh = 0

    def _as_table(self, some: _Open, y_SK: F64) -> pa.Table:
        horizons = y_SK.shape[1]
        horizon = np.arange(1, horizons + 1)
        interval = some.interval_ns_F[:, None]
        timed = (interval > 0) & (interval <= (1 << 62) // horizon)
        ds_ns = some.time_ns_F[:, None] + np.where(timed, interval, 0) * horizon
        ids = self._numbers.series()
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
        return pa.table(columns, schema=FORECAST_SCHEMA)


class _Held:
    """A file for Arrow to write to, many small writes made one; after an error it takes no more and says the same."""

    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self._disk, self._file = disk, file
        self._held = bytearray()
        self._at = 0
        self.closed = False
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is not None:
            raise self.error
        view = memoryview(data).cast("B")
        self._held += view
        self._at += view.nbytes
        if len(self._held) >= _BLOCK:
            self.flush_held()
        return view.nbytes

    def flush_held(self) -> None:
        """What was held back is the kernel's."""
        held, self._held = self._held, bytearray()
        try:
            self._disk.write(self._file, memoryview(held))
        except BaseException as error:
            self.error = error
            raise

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _as_stream(table: pa.Table) -> memoryview:
    """A whole Arrow stream, so that another may follow it."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getbuffer()


def _tables_of(rows: AppendedFile) -> Generator[pa.Table, None, None]:
    """What :func:`_as_stream` made, one after the other."""
    with rows.path.open("rb") as file:
        while file.tell() < rows.length:
            yield pa.ipc.open_stream(file).read_all()


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
