"""
Files as a source of messages.

They are one partition of a topic, in the order given: the offset counts their rows from 0 on, over all of them, and
there is no broker's timestamp. What stands in for the topic's id is a digest of what was read. Files do not grow.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from csv import Error as CsvError
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from streamlstm.config.model import Decode
from streamlstm.errors import DataError, LogGap
from streamlstm.records.batch import Cut, Messages, Range
from streamlstm.records.csv import ends_quoted, split
from streamlstm.transport.interfaces import Position

_BOM = b"\xef\xbb\xbf"
_SKIP_AT_ONCE = 10_000


class _Row(NamedTuple):
    """One row of a file without its line end, how many bytes of the file it used up, and which file that is."""

    value: bytes
    consumed: int
    file: int = 0


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
        self._header = "\n".join(self.columns or ()).encode() + b"\n"
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
        return hashlib.sha256("\n".join(self.file_digests()).encode()).hexdigest()

    def file_digests(self) -> list[str]:
        """The same for each file that was begun."""
        return [sha.hexdigest() for sha in self._shas]

    def expect(self, digests: Sequence[str]) -> None:
        """
        Raise :class:`~streamlstm.errors.DataError` with the file whose rows up to here gave another digest.

        ``digests`` are what :meth:`file_digests` gave at this row before. Files may have been added behind them.
        """
        for path, was, now in zip(self._paths, digests, self.file_digests(), strict=False):
            if was != now:
                raise DataError(
                    f"{path} is not what it was: its rows up to where reading goes on were changed; give it as it was, "
                    "or begin again with another --checkpoint-to"
                )
        if len(self._paths) < len(digests):
            raise DataError(
                f"{len(digests)} files were read, and {len(self._paths)} are given: give them all, in the same order"
            )

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
        self._shas = [hashlib.sha256(self._header)]

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
        if taken and taken[-1].file < len(self._shas):  # the usual case: all of the file that was read last
            self._shas[-1].update(b"\n".join(values) + b"\n")
        else:
            for file, rows in groupby(taken, key=lambda row: row.file):
                self._shas += [hashlib.sha256(self._header) for _ in range(len(self._shas), file + 1)]
                self._shas[file].update(b"\n".join([row.value for row in rows]) + b"\n")
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
        for index, path in enumerate(self._paths):
            try:
                with path.open("rb") as file:
                    rows = self._rows_of(file, index)
                    if self._delimiter:
                        next(rows, None)  # the header
                    yield from rows
            except OSError as why:
                raise DataError(f"cannot read {path}: {why.strerror}") from why

    def _rows_of(self, file: BinaryIO, index: int = 0) -> Iterator[_Row]:
        """The rows that are not blank. ``consumed`` covers the blank lines before a row too."""
        behind = 0
        for row in self._joined(self._lines(file)):
            behind += row.consumed
            if row.value.strip():
                yield _Row(row.value, behind, index)
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
