"""
Series beyond memory: a file of this machine that holds the states of those who left, while the process lives.

It is not durable and need not be: checkpoints are, and hold what is in here. So nothing is synced, and each start
begins with a new file. A row is one blob with a CRC-32; one that does not fit its row ends the process, and the next
start reads the checkpoint again. Views are read transactions of their own (SQLite's write-ahead log), so a checkpoint
streams what was here at its step while steps go on.
"""

import os
import sqlite3
import tempfile
import weakref
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from streamlstm.engine.state import pack, unpack
from streamlstm.errors import Temporary
from streamlstm.records.batch import SeriesId
from streamlstm.series.admission import BEGINNING
from streamlstm.series.table import Rows

_PREFIX = "stored-"
_CACHE_KIB = 32 << 10
_AT_ONCE = 2048
_DELETED_AT_ONCE = 2000

# ``since`` is the step at which a series left, ``seen`` the watermark when it was last seen.
_SCHEMA = """
PRAGMA page_size = 16384;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -{cache};
CREATE TABLE stored (
    key BLOB NOT NULL UNIQUE, topic TEXT NOT NULL, partition INTEGER NOT NULL,
    since INTEGER NOT NULL, seen INTEGER NOT NULL, crc INTEGER NOT NULL, row BLOB NOT NULL
);
CREATE INDEX by_place ON stored (topic, partition, since);
CREATE INDEX by_seen ON stored (seen);
"""

_COUNTS = "topic = ? AND partition = ? AND since > ? AND (? IS NULL OR seen > ?)"


class Scratch:
    """
    The file. Used by one thread, views by any one other; it is removed when nobody holds this any more.

    Errors of the disk under it are :class:`~streamlstm.errors.Temporary` (75).
    """

    def __init__(self, directory: Path, like: dict[str, Tensor]) -> None:
        self._like = like
        self._width = pack(like).shape[1]
        with _explained(directory):
            # Only we can read it, and so what SQLite makes beside it.
            file, name = tempfile.mkstemp(prefix=_PREFIX, suffix=".sqlite", dir=directory)
            os.close(file)
            self.path = Path(name)
            self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._database.executescript(_SCHEMA.format(cache=_CACHE_KIB))
        self.count = 0
        weakref.finalize(self, _remove, self._database, self.path)

    def __len__(self) -> int:
        return self.count

    def put(self, rows: Rows, since: int) -> None:
        """These leave memory, at step ``since``."""
        seen = rows.columns["seen_ns"].tolist()
        blobs = [row.tobytes() for row in pack(rows.columns)]
        values = (
            (key := _key(one), one.topic, one.partition, since, at, zlib.crc32(blob, zlib.crc32(key)), blob)
            for one, at, blob in zip(rows.series, seen, blobs, strict=True)
        )
        with self._transaction():
            self._database.executemany("INSERT INTO stored VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self.count += len(rows)

    def fetch(self, series: Sequence[SeriesId]) -> Rows | None:
        """Those of these series that are here: they return to memory. ``None`` = none of them."""
        if not self.count or not series:
            return None
        with self._transaction():
            keys = [(_key(one),) for one in series]
            found: list[tuple[SeriesId, bytes, int, bytes]] = []
            for one, key in zip(series, keys, strict=True):
                row = self._database.execute("SELECT crc, row FROM stored WHERE key = ?", key).fetchone()
                if row is not None:
                    found.append((one, *key, *row))
            self._database.executemany("DELETE FROM stored WHERE key = ?", ((key,) for _, key, _, _ in found))
        self.count -= len(found)
        return self._rows(found) if found else None

    def forget(self, until: int, records: int) -> None:
        """
        Drop some of those that were seen no later than ``until``; who returns is forgotten in any case.

        More than ``records``, those of the step: no more can leave memory by it, so those left to drop never pile up.
        """
        if self.count:
            with self._transaction():
                gone = self._database.execute(
                    "DELETE FROM stored WHERE rowid IN (SELECT rowid FROM stored WHERE seen <= ? LIMIT ?)",
                    (max(until, BEGINNING), _DELETED_AT_ONCE + records),
                )
                self.count -= gone.rowcount

    def view(self, until: int | None, origin: str) -> "ScratchView | None":
        """What is here now, but for what was seen no later than ``until``. ``None`` = nothing."""
        return ScratchView(self, until, origin) if self.count else None

    def read(self, found: Iterable[tuple[bytes, int, bytes]]) -> Rows:
        """Rows as they are in the file: key, CRC, blob."""
        return self._rows([(_series(key), key, crc, blob) for key, crc, blob in found])

    def _rows(self, found: list[tuple[SeriesId, bytes, int, bytes]]) -> Rows:
        for _, key, crc, blob in found:
            if zlib.crc32(blob, zlib.crc32(key)) != crc or len(blob) != self._width:
                raise Temporary(
                    f"{self.path} is damaged: a series stored there is not what it was; a restart reads it from the "
                    "checkpoint, and if it happens again, look at the disk"
                )
        packed = np.frombuffer(b"".join(blob for *_, blob in found), np.uint8).reshape(len(found), self._width)
        return Rows(tuple(one for one, *_ in found), unpack(packed, self._like))

    @contextmanager
    def _transaction(self) -> Generator[None]:
        with _explained(self.path):
            self._database.execute("BEGIN")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


class ScratchView:
    """
    What was in the file at one moment. See :class:`~streamlstm.engine.state.Stored`.

    By ``scratch``, where it comes from, and ``origin`` a checkpoint knows which files of earlier ones it may take over.
    """

    def __init__(self, scratch: Scratch, until: int | None, origin: str) -> None:
        self.scratch, self.origin = scratch, origin
        self.until = None if until is None else max(until, BEGINNING)
        with _explained(scratch.path):
            self._database = sqlite3.connect(scratch.path, isolation_level=None, check_same_thread=False)
            self._database.execute("BEGIN")
            # Only a read makes the transaction begin.
            self._database.execute("SELECT 1 FROM stored LIMIT 1").fetchone()

    def places(self) -> list[tuple[str, int]]:
        """See :class:`~streamlstm.engine.state.Stored`."""
        with _explained(self.scratch.path):
            found = self._database.execute("SELECT DISTINCT topic, partition FROM stored").fetchall()
        return sorted(cast("list[tuple[str, int]]", found))

    def rows(self, topic: str, partition: int, after: int = -1) -> Iterator[Rows]:
        """See :class:`~streamlstm.engine.state.Stored`; only those that left after step ``after``."""
        with _explained(self.scratch.path):
            cursor = self._database.execute(
                f"SELECT key, crc, row FROM stored WHERE {_COUNTS} ORDER BY since, rowid",  # noqa: S608, because it is ours
                (topic, partition, after, self.until, self.until),
            )
            while found := cursor.fetchmany(_AT_ONCE):
                yield self.scratch.read(found)

    def count(self, topic: str, partition: int, after: int = -1) -> int:
        """How many series :meth:`rows` gives."""
        with _explained(self.scratch.path):
            (count,) = self._database.execute(
                f"SELECT COUNT(*) FROM stored WHERE {_COUNTS}",  # noqa: S608, because it is ours
                (topic, partition, after, self.until, self.until),
            ).fetchone()
        return count

    def close(self) -> None:
        """See :class:`~streamlstm.engine.state.Stored`."""
        self._database.close()

    def __del__(self) -> None:
        self.close()


def _remove(database: sqlite3.Connection, path: Path) -> None:
    database.close()
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove what killed processes left. The directory must be ours alone."""
    for path in directory.glob(f"{_PREFIX}*.sqlite*"):
        path.unlink(missing_ok=True)


def _key(series: SeriesId) -> bytes:
    return f"{series.topic}\0{series.partition}\0{series.key}".encode(errors="surrogatepass")


def _series(key: bytes) -> SeriesId:
    topic, partition, name = key.decode(errors="surrogatepass").split("\0", 2)
    return SeriesId(topic, int(partition), name)


@contextmanager
def _explained(path: Path) -> Generator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise Temporary(
            f"series beyond series.max_series are kept in {path}, which cannot be used: {error}; look at the disk, or "
            "raise series.max_series"
        ) from error
