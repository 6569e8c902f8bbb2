"""
The chain of committed steps on this machine's disk, for a publisher that is not all-or-nothing.

A record is durable before anything of it is published, so that a start after a crash knows what may be out and can
publish it again. Files hold consecutive records and are named by the number of their first one::

    record = CRC-32 of number and length · number u64 · length u32 · 16 bytes of SHA-256(number, length, value) · value

At most one record is unsynced at any time. So a write that was cut off can only be the last record of the last file:
that one was never acknowledged, nothing of it was published, and it is dropped when the journal is opened. Whatever
else is not as it was written is damage, and is refused. The two can be told apart: a write that was cut off left the
file short, or left out whole sectors, which then read as zeros; a value is text.
"""

import hashlib
import logging
import re
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from streamlstm.errors import CheckpointNotWritten, ProgressError
from streamlstm.recovery.disk import Disk
from streamlstm.transport.interfaces import ProgressEntry

DIRECTORY = "journal"
"""Its name beside the generations."""

SEGMENT_BYTES = 4 << 20
"""A file that is longer is not appended to. Trimming removes whole files."""

_SEGMENT = re.compile(r"^(\d{20})\.records$")
_NUMBERED = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_DIGEST_BYTES = 16
_HEADER_BYTES = _NUMBERED.size + _CRC.size + _DIGEST_BYTES
_SECTOR_BYTES = 512

_log = logging.getLogger(__name__)


class _Segment(NamedTuple):
    first: int
    path: Path


class Journal:
    """
    A :class:`~streamlstm.transport.interfaces.ProgressLog` that can be appended to, in one directory.

    :meth:`append` and :meth:`trim` are for the owner of the state directory, after :meth:`open`; :meth:`read` is for
    anybody, also while the owner writes.
    """

    def __init__(self, directory: Path, disk: Disk | None = None, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.directory = directory
        self._disk, self._segment_bytes = disk or Disk(), segment_bytes
        self._open = False
        self._file: BinaryIO | None = None
        self._size = 0
        self._next = 0

    def open(self) -> None:
        """
        Drop a record whose write was cut off, and go on after the last one. Nothing is made before the first
        :meth:`append`: a start may yet be refused, and leaves nothing behind then.

        The last one is written once more where it stands and synced: after a failed sync it may be in memory only, and
        look as if it were not. Raises :class:`~streamlstm.errors.ProgressError` for a damaged file and
        :class:`~streamlstm.errors.CheckpointNotWritten` for a disk that fails.
        """
        self.close()
        try:
            segments = self._segments()
            if segments:
                self._continue(segments[-1])
            else:
                self._next = 0
        except OSError as error:
            self._fail(error)
        self._open = True

    def append(self, value: bytes) -> int:
        """
        Make a record durable; its number.

        Raises :class:`~streamlstm.errors.CheckpointNotWritten` when the disk fails, and from then on: what a failed
        sync left behind only the next :meth:`open` can tell.
        """
        if not self._open:
            raise CheckpointNotWritten(f"the journal {self.directory} is not open, or has failed: start again")
        number, record = self._next, _encode(self._next, value)
        try:
            if self._file is None or (self._size and self._size + len(record) > self._segment_bytes):
                self._begin(number, record)
            else:
                self._disk.write(self._file, record)
                self._disk.sync_data(self._file)
        except OSError as error:
            self._fail(error)
        self._next, self._size = number + 1, self._size + len(record)
        return number

    def read(self, start: int = 0) -> list[ProgressEntry]:
        """
        See :class:`~streamlstm.transport.interfaces.ProgressLog`. Changes nothing, waits for nobody.

        However slow it is beside the owner, the records are consecutive, the last one is at least the last of when the
        call began, and the first at most the first of when it returns. A listing may miss files that are made or
        removed while it is taken, so the order is the point:

        1. list the files for the newest one, and read it: nothing newer is needed;
        2. list them again: all before the newest had been made when this begins, so none of them is missed;
        3. read these from the newest back to ``start``. The owner removes the oldest first, so where one is gone all
           before it are.

        It begins again only where the owner has begun a newer file, and trimmed all that was listed, before the newest
        was read.

        A last record that is not whole is one that the owner is just writing, or was when it was killed. Raises
        :class:`~streamlstm.errors.ProgressError` for any other damage, with the file and the byte.
        """
        gone = None
        try:
            while listed := self._segments():
                try:
                    return self._read_back(listed[-1], start)
                except FileNotFoundError as error:
                    if error.filename == gone:
                        raise  # what was trimmed is not listed again
                    gone = error.filename
        except OSError as error:
            raise ProgressError(f"journal {error.filename or self.directory}: {error.strerror or error}") from error
        return []

    def trim(self, before: int) -> None:
        """
        See :class:`~streamlstm.transport.interfaces.ProgressLog`. Removes the files all of whose records are older.

        Oldest first and one by one, or a power cut would leave a hole. Raises
        :class:`~streamlstm.errors.CheckpointNotWritten`; nothing that is needed is lost then.
        """
        assert self._open
        for segment, following in pairwise(self._segments()):
            if following.first > before:
                return
            try:
                self._disk.remove_tree(segment.path)
                self._disk.sync_directory(self.directory)
            except OSError as error:
                raise CheckpointNotWritten(
                    f"the journal's file {segment.path} could not be removed: {error.strerror or error}"
                ) from error

    def close(self) -> None:
        """Append no more."""
        self._open = False
        file, self._file, self._size = self._file, None, 0
        if file is not None:
            file.close()

    def _continue(self, segment: _Segment) -> None:
        data = segment.path.read_bytes()
        entries, end = _scan(data, segment.first)
        self._next = segment.first + len(entries)
        if end < len(data):
            if not _is_torn(data, end, self._next):
                raise _damaged(segment.path, end, self._next)
            _log.warning(
                "journal %s: record %d was cut off while it was written, and is dropped; nothing of it was published, "
                "unless the disk lost what it had acknowledged",
                segment.path,
                self._next,
            )
        self._file = self._disk.reopen(segment.path)
        if end < len(data):
            self._disk.truncate(self._file, end)
        last = _encode(*entries[-1]) if entries else b""
        self._file.seek(end - len(last))
        self._disk.write(self._file, last)
        self._disk.sync(self._file)
        self._disk.sync_directory(self.directory)
        self._size = end

    def _begin(self, number: int, record: bytes) -> None:
        """A new file, with its first record. The names on the way must be durable too before that one counts."""
        if number == 0:
            if not self.directory.exists():
                self._disk.make_directory(self.directory)
            self._disk.sync_directory(self.directory.parent)
        if self._file is not None:
            self._file.close()
        self._size = 0
        self._file = self._disk.create(self._path(number))
        self._disk.write(self._file, record)
        self._disk.sync_data(self._file)
        self._disk.sync_directory(self.directory)

    def _fail(self, error: OSError) -> NoReturn:
        """Nothing is retried: the kernel may call lost pages clean."""
        self.close()
        raise CheckpointNotWritten(
            f"the journal {self.directory} cannot be written: {error.strerror or error}; nothing more is published "
            "until it can be"
        ) from error

    def _read_back(self, newest: _Segment, start: int) -> list[ProgressEntry]:
        """
        All from ``start`` on, or from the first that is left, to the end of ``newest``.

        Raises :class:`FileNotFoundError` where that is gone too.
        """
        runs, following = [_read_whole(newest, may_be_torn=not self._open)], newest
        older = [s for s in self._segments() if s.first < newest.first] if newest.first > start else []
        for segment in reversed(older):
            if following.first <= start:
                break
            try:
                run = _read_whole(segment, may_be_torn=False)
            except FileNotFoundError:
                break
            if segment.first + len(run) != following.first:
                raise ProgressError(
                    f"journal {following.path} begins with record {following.first}, and records from "
                    f"{segment.first + len(run)} on are missing before it"
                )
            runs.append(run)
            following = segment
        if not any(runs):  # it had just been begun, and may be all there is by now
            runs = [_read_whole(newest, may_be_torn=not self._open)]
        return [entry for run in reversed(runs) for entry in run if entry.offset >= start]

    def _segments(self) -> list[_Segment]:
        """Oldest first; none where there is no directory."""
        try:
            found = [_SEGMENT.match(path.name) for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(_Segment(int(m[1]), self.directory / m[0]) for m in found if m)

    def _path(self, first: int) -> Path:
        return self.directory / f"{first:020d}.records"


def _encode(number: int, value: bytes) -> bytes:
    numbered = _NUMBERED.pack(number, len(value))
    return _CRC.pack(zlib.crc32(numbered)) + numbered + _digest(numbered, value) + value


def _digest(numbered: bytes, value: bytes) -> bytes:
    return hashlib.sha256(numbered + value).digest()[:_DIGEST_BYTES]


def _scan(data: bytes, first: int) -> tuple[list[ProgressEntry], int]:
    """The records from the front up to one that is not whole, and the byte where that one begins, or the end."""
    entries: list[ProgressEntry] = []
    at = 0
    while (value := _value_at(data, at, number := first + len(entries))) is not None:
        entries.append(ProgressEntry(number, value))
        at += _HEADER_BYTES + len(value)
    return entries, at


def _value_at(data: bytes, at: int, number: int) -> bytes | None:
    """The value of the record that begins here, if it is whole and has this number."""
    length = _length_at(data, at, number)
    if length is None:
        return None
    begin = at + _HEADER_BYTES
    value = data[begin : begin + length]
    digest = _digest(data[at + _CRC.size : begin - _DIGEST_BYTES], value)
    return value if len(value) == length and data[begin - _DIGEST_BYTES : begin] == digest else None


def _length_at(data: bytes, at: int, number: int) -> int | None:
    """The length of the value of the record that begins here, if its header is whole and has this number."""
    header = data[at : at + _HEADER_BYTES]
    numbered = header[_CRC.size : -_DIGEST_BYTES]
    if len(header) < _HEADER_BYTES or header[: _CRC.size] != _CRC.pack(zlib.crc32(numbered)):
        return None
    found, length = _NUMBERED.unpack(numbered)
    return length if found == number else None


def _read_whole(segment: _Segment, *, may_be_torn: bool) -> list[ProgressEntry]:
    """All records of a file. Damage is what is there twice: a start may be cutting off what a kill left behind."""
    data = segment.path.read_bytes()
    while True:
        entries, end = _scan(data, segment.first)
        number = segment.first + len(entries)
        if end == len(data) or (may_be_torn and _is_torn(data, end, number)):
            return entries
        before, data = data, segment.path.read_bytes()
        if data == before:
            raise _damaged(segment.path, end, number)


def _damaged(path: Path, at: int, number: int) -> ProgressError:
    return ProgressError(
        f"journal {path}: record {number}, at byte {at}, is damaged; bring the state directory back from a copy, "
        "or start anew under another name with other topics"
    )


def _is_torn(data: bytes, at: int, number: int) -> bool:
    """Whether what begins here is the last write, cut off, and not something that was whole once."""
    if len(data) - at < _HEADER_BYTES:
        return True
    length = _length_at(data, at, number)
    end = len(data) if length is None else at + _HEADER_BYTES + length
    if end != len(data):
        return end > len(data)
    boundaries = range(at - at % _SECTOR_BYTES + _SECTOR_BYTES, end, _SECTOR_BYTES)
    return any(not any(data[a:b]) for a, b in pairwise([at, *boundaries, end]))
