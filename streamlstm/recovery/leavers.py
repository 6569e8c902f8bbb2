"""
The series beyond memory in a checkpoint: files of those that left, taken over from one generation to the next.

A generation writes who left since the one before, and has the files of that one linked into its directory: so a
checkpoint costs what changed, however many series there are. Of a series in several files the newest row counts, and
one that is in memory again counts as in memory. When the files hold more than twice the rows that count, all of these
are written anew and the old files left out.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import BinaryIO, NamedTuple, cast

import msgspec
import numpy as np

from streamlstm.engine.state import EngineState
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.scratch import ScratchView
from streamlstm.recovery.snapshot import Column, Place, Sink, describe_columns, file_name, read_rows, write_rows
from streamlstm.series.table import Rows


class Leaving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: series of one partition that had left by ``step``, and not by the generation before."""

    name: str
    topic: str
    partition: int
    step: int
    rows: int


class Left(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    What ``meta.json`` says of them. If ``until`` is given, rows last seen no later do not count. ``series`` is how many
    they are, and so how many rows of the files count.
    """

    until: int | None
    series: int
    files: tuple[Leaving, ...]


class Base(NamedTuple):
    """The generation whose files may be taken over."""

    step: int
    attempt: str
    files: tuple[Leaving, ...]


class LeaversPlan:
    """Which files a generation takes over from ``base``, and which it writes."""

    def __init__(self, state: EngineState, base: Base | None) -> None:
        self.linked: tuple[Leaving, ...] = ()
        self.files: dict[str, Callable[[Sink], object]] = {}
        self._written: list[Leaving] = []
        self._until: int | None = None
        self._linked_series = 0
        stored = state.stored
        if stored is None:
            return
        self._until = stored.until
        columns = describe_columns(state)
        after = -1
        if base is not None and isinstance(stored, ScratchView):
            counts = [(stored.count(*place), stored.count(*place, base.step)) for place in stored.places()]
            held = sum(file.rows for file in base.files) + sum(new for _, new in counts)
            if held <= 2 * sum(live for live, _ in counts):
                self.linked, after = base.files, base.step
                self._linked_series = sum(live - new for live, new in counts)
        for topic, partition in stored.places():
            place = Place(topic, partition)
            if isinstance(stored, ScratchView):
                if stored.count(*place, after):
                    self._add(place, state.step, columns, lambda p=place: stored.rows(*p, after))
            else:
                self._add(place, state.step, columns, lambda p=place: stored.rows(*p))

    def told(self) -> Left | None:
        """For ``meta.json``; complete once every file was written. ``None`` = nobody left."""
        files = (*self.linked, *self._written)
        series = self._linked_series + sum(file.rows for file in self._written)
        return Left(self._until, series, files) if files else None

    def _add(self, place: Place, step: int, columns: dict[str, Column], pieces: Callable[[], Iterator[Rows]]) -> None:
        name = file_name("stored", place, step)

        def write(sink: Sink) -> None:
            rows = write_rows(sink, place, columns, pieces())
            self._written.append(Leaving(name, place.topic, place.partition, step, rows))

        self.files[name] = write


class FilesOfLeavers:
    """
    Them, read from a generation's files, whose hashes were checked. See :class:`~streamlstm.engine.state.Stored`.

    ``here`` are the series in memory. ``open_file`` opens a file by its name.
    """

    def __init__(
        self,
        left: Left,
        columns: dict[str, Column],
        here: Sequence[SeriesId],
        open_file: Callable[[str], AbstractContextManager[object]],
        origin: str,
    ) -> None:
        self._left, self._columns, self._here, self._open = left, columns, here, open_file
        self.origin, self.until = origin, left.until

    def places(self) -> list[tuple[str, int]]:
        """See :class:`~streamlstm.engine.state.Stored`."""
        return sorted({(file.topic, file.partition) for file in self._left.files})

    def rows(self, topic: str, partition: int) -> Iterator[Rows]:
        """See :class:`~streamlstm.engine.state.Stored`. Newest file first; only the oldest one's keys are not kept."""
        files = [file for file in self._left.files if (file.topic, file.partition) == (topic, partition)]
        files.sort(key=lambda file: -file.step)
        newer = {one.key for one in self._here if (one.topic, one.partition) == (topic, partition)}
        for file in files:
            for rows in self._read(file):
                yield _without(rows, newer, self.until)
                if file is not files[-1]:
                    newer.update(one.key for one in rows.series)

    def close(self) -> None:
        """See :class:`~streamlstm.engine.state.Stored`."""

    def _read(self, file: Leaving) -> Iterator[Rows]:
        with ExitStack() as stack:
            opened = cast("BinaryIO", stack.enter_context(self._open(file.name)))
            if not (hasattr(opened, "seekable") and opened.seekable()):
                # Parquet is read from its end.
                spool = stack.enter_context(tempfile.TemporaryFile())
                while block := opened.read(1 << 20):
                    spool.write(block)
                spool.seek(0)
                opened = cast("BinaryIO", spool)
            yield from read_rows(opened, self._columns)


def _without(rows: Rows, newer: set[str], until: int | None) -> Rows:
    counts = np.array([one.key not in newer for one in rows.series], np.bool_)
    if until is not None:
        counts &= rows.columns["seen_ns"].numpy() > until
    return rows.pick(np.flatnonzero(counts))
