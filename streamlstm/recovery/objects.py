"""
Generations in an object store, where there is no rename, no fsync and no lock.

::

    <step:020d>/<attempt>/…      the files of one attempt, under a name no other attempt has
    <step:020d>/MANIFEST.json    names the attempt: with this object the generation is there
    <step:020d>.bad-<n>          the manifest of one that was put aside
    opened-by                    who came last: a note, and the proof that we may write

An upload that returned is whole and durable; one that failed may leave a part of the object. So the manifest is
uploaded last among its attempt's files, and then copied by the store itself to the name that counts: the generation is
there at one instant, in place of an older one of the same step, and two hosts that write the same step leave one or the
other. A kill leaves objects that no manifest names; below the newest generation they are swept up at the next start,
above it they may be the upload of a process that still lives: nothing here can tell. Who may write is decided by the
transactional id, and what a fenced process still writes is off the progress chain, or holds the same steps.

Every call is waited for no longer than ``limit_s``, whatever the client's own timeouts do. That a store does not answer
says nothing about what is in it: reading is then :class:`~streamlstm.errors.Temporary`, and never a bad generation.
"""

import errno
import hashlib
import os
import queue
import re
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn, Protocol, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from streamlstm.config.urls import ObjectUrl
from streamlstm.errors import CheckpointError, ConfigError, StreamlstmError, Temporary
from streamlstm.recovery.manifest import MANIFEST, digest_manifest, parse_manifest
from streamlstm.recovery.place import CHECKPOINT_URL, name_of, step_of_bad
from streamlstm.transport.deadline import underway

LIMIT_S = 28.0
"""Longest wait for one call."""

_CONNECT_S = 4.0
_REQUEST_S = 5.0
_ATTEMPTS = 3
_RETRIES_S = 20

_READ_BLOCK = 4 << 20
_WRITE_BLOCK = 1 << 20
_LONGEST_ERROR = 300
_NOTE = "opened-by"
_COMMITTED = re.compile(rf"(\d{{20}})/{re.escape(MANIFEST)}")
_BAD = re.compile(r"(\d{20})\.bad-(\d+)")
_INSIDE = re.compile(r"(\d{20})/(?:([0-9a-f]{16})/)?[^/]+")

# What the clients say in words only. Anything else is a store that fails, and may recover.
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE|SIGNATURE_DOES_NOT_MATCH|"
    r"MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|PERMISSION_DENIED|UNAUTHENTICATED|"
    r"HTTP status code: 40[13]|HTTP response code: 40[13]"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET")
_SETUP = {errno.EACCES, errno.EPERM, errno.ENOENT}

_T = TypeVar("_T")


def connect(url: ObjectUrl) -> pafs.FileSystem:
    """A client with bounded patience; credentials from where the SDKs look for them."""
    options = dict(url.options)
    if url.scheme == "s3":
        return pafs.S3FileSystem(
            region=options.get("region"),
            endpoint_override=options.get("endpoint_override"),
            scheme=options.get("scheme", "https"),
            connect_timeout=_CONNECT_S,
            request_timeout=_REQUEST_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            # In the foreground no call does more than upload one part, and closing has nothing left to wait for.
            background_writes=False,
            # Small objects take one call instead of three.
            allow_delayed_open=True,
        )
    return pafs.GcsFileSystem(
        anonymous=url.anonymous,
        endpoint_override=options.get("endpoint_override"),
        scheme=options.get("scheme", "https"),
        retry_time_limit=timedelta(seconds=_RETRIES_S),
    )


class _Listing(NamedTuple):
    """Names below the prefix, without it."""

    names: frozenset[str]

    def committed(self) -> list[int]:
        return sorted(int(match[1]) for match in map(_COMMITTED.fullmatch, self.names) if match)

    def bad(self) -> list[str]:
        return sorted(name for name in self.names if _BAD.fullmatch(name))

    def inside(self, step: int) -> dict[str, list[str]]:
        """Names of a step's files by attempt, without its manifest."""
        found: dict[str, list[str]] = {}
        for match in map(_INSIDE.fullmatch, sorted(self.names)):
            if match and int(match[1]) == step and not _COMMITTED.fullmatch(match[0]):
                found.setdefault(match[2] or "", []).append(match[0])
        return found

    def steps_with_files(self) -> list[int]:
        return sorted({int(match[1]) for match in map(_INSIDE.fullmatch, self.names) if match})


class ObjectPrefix:
    """A :class:`~streamlstm.recovery.place.Place` in an object store. ``root`` is ``bucket/prefix``."""

    directory = None
    setting = CHECKPOINT_URL
    needs = "a bucket that exists, in which the credentials found here may list, read, write and delete"

    def __init__(
        self, name: str, root: str, connector: Callable[[], pafs.FileSystem], caller: "Caller | None" = None
    ) -> None:
        self.name = name
        self._root, self._connector = root, connector
        self._caller = caller or Caller()
        self._filesystem: pafs.FileSystem | None = None
        self._opened = False
        self._known: dict[int, set[str]] = {}
        self._seen: dict[int, set[bytes]] = {}

    def open(self) -> None:
        """See that the bucket is there and that we may write; then sweep. Nothing when it is open."""
        if self._opened:
            return
        bucket = self._root.partition("/")[0]
        # Listing what does not exist is no error to every client.
        found: pafs.FileInfo = self._call(lambda fs: fs.get_file_info(bucket))
        if found.type != pafs.FileType.Directory:
            raise OSError(errno.ENOENT, f"there is no bucket {bucket}, or it is not ours to see")
        with self.create(_NOTE) as note:
            note.write(f"{socket.gethostname()} {os.getpid()}\n".encode())
            note.sync()
        self._sweep()
        self._opened = True

    def close(self) -> None:
        """See :class:`~streamlstm.recovery.place.Place`."""
        self._opened = False

    def leave(self) -> None:
        """See :class:`~streamlstm.recovery.place.Place`. A bucket is made by nobody here."""
        self.close()

    def steps(self) -> list[int]:
        """See :class:`~streamlstm.recovery.place.Place`."""
        with self.reading():
            return self._list().committed()

    def bad(self) -> list[str]:
        """See :class:`~streamlstm.recovery.place.Place`."""
        with self.reading():
            return self._list().bad()

    def files(self, step: int) -> "ObjectFiles":
        """See :class:`~streamlstm.recovery.place.Place`."""
        return ObjectFiles(self, step)

    def begin(self, step: int) -> "ObjectAttempt":
        """See :class:`~streamlstm.recovery.place.Place`."""
        return ObjectAttempt(self, step)

    def put_aside(self, step: int) -> str:
        """Copy its manifest to a marker, then delete it. A kill between the two does no more than begin again."""
        current = f"{name_of(step)}/{MANIFEST}"
        manifest = self.get(current)
        if manifest is None or (step in self._seen and _sha256(manifest) not in self._seen[step]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), current)
        for name in (taken := [name for name in self._list().bad() if name.startswith(f"{name_of(step)}.")]):
            if self.get(name) == manifest:
                break
        else:
            last = max((int(name.rpartition("-")[2]) for name in taken), default=0)
            name = f"{name_of(step)}.bad-{last + 1}"
            self.copy(current, name)
        self._delete(current)
        return name

    def files_of_bad(self, name: str) -> "ObjectFiles":
        """See :class:`~streamlstm.recovery.place.Place`."""
        return ObjectFiles(self, step_of_bad(name), name)

    def bring_back(self, name: str) -> None:
        """Copy its marker to where the manifest was, then delete it. A kill between the two leaves both."""
        step = step_of_bad(name)
        if self.get(f"{name_of(step)}/{MANIFEST}") is not None:
            raise OSError(errno.EEXIST, f"there is a checkpoint of step {step}")
        self.copy(name, f"{name_of(step)}/{MANIFEST}")
        self._delete(name)

    def remove(self, name: str) -> None:
        """What makes it a generation, or one that was put aside, first; then what that alone named."""
        bad = _BAD.fullmatch(name)
        self._delete(name if bad else f"{name}/{MANIFEST}")
        self._collect(int(bad[1] if bad else name), self._list())
        if not bad:
            for told in (self._known, self._seen):
                told.pop(int(name), None)

    def remember(self, step: int, manifest: bytes) -> None:
        """Of a manifest that this process has read or written, and so may replace."""
        self._known.setdefault(step, set()).add(digest_manifest(manifest))
        self.look_at(step, manifest)

    def look_at(self, step: int, manifest: bytes | None) -> None:
        """What this process has judged of a step: of one that was looked at nothing else is put aside."""
        seen = self._seen.setdefault(step, set())
        if manifest is not None:
            seen.add(_sha256(manifest))

    def knows(self, step: int, manifest: bytes) -> bool:
        """Whether :meth:`remember` was told."""
        return digest_manifest(manifest) in self._known.get(step, ())

    def get(self, name: str) -> bytes | None:
        """One small object, ``None`` where there is none."""
        try:
            return self._call(lambda fs: _read_all(fs, self._at(name)))
        except FileNotFoundError:
            return None

    def copy(self, name: str, to: str) -> None:
        """The same object under another name too, at one instant."""
        self._call(lambda fs: fs.copy_file(self._at(name), self._at(to)))

    @contextmanager
    def create(self, name: str) -> Generator["Upload"]:
        """An upload."""
        upload = Upload(self._caller, self._call(lambda fs: fs.open_output_stream(self._at(name))))
        try:
            yield upload
        finally:
            upload.abandon()

    def list_inside(self, where: str) -> set[str]:
        """The objects right below a directory."""
        found = self._call(lambda fs: fs.get_file_info(pafs.FileSelector(self._at(where), allow_not_found=True)))
        return {info.base_name for info in found if info.type == pafs.FileType.File}

    def read_stream(self, name: str) -> "Download":
        """Begin to read an object."""
        return Download(self, self._call(lambda fs: fs.open_input_stream(self._at(name))))

    def call(self, work: Callable[[], _T]) -> _T:
        """A call, waited for no longer than we may."""
        return self._caller.call(work)

    @contextmanager
    def reading(self) -> Generator[None]:
        """What goes wrong while reading, as an error of the whole start: it says nothing about a generation."""
        try:
            yield
        except OSError as error:
            _cannot_read(self.name, error)

    def _call(self, work: Callable[[pafs.FileSystem], _T]) -> _T:
        def connected() -> _T:
            if self._filesystem is None:
                self._filesystem = self._connector()
            return work(self._filesystem)

        return self._caller.call(connected)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _list(self) -> _Listing:
        selector = pafs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found: Iterable[pafs.FileInfo] = self._call(lambda fs: fs.get_file_info(selector))
        start = len(self._root) + 1
        return _Listing(frozenset(info.path[start:] for info in found if info.type == pafs.FileType.File))

    def _sweep(self) -> None:
        """Remove what no manifest names, below the newest generation: no process would make one of it any more."""
        listing = self._list()
        committed = listing.committed()
        for step in listing.steps_with_files():
            left = step not in committed or len(listing.inside(step)) > 1
            if committed and step < committed[-1] and left:
                self._collect(step, listing)

    def _collect(self, step: int, listing: _Listing) -> None:
        """Remove those of a step's files that neither its manifest nor one that was put aside names."""
        naming = [name for name in listing.bad() if name.startswith(f"{name_of(step)}.")]
        if step in listing.committed():
            naming.append(f"{name_of(step)}/{MANIFEST}")
        named: set[str] = set()
        for manifest in (data for data in map(self.get, naming) if data is not None):
            try:
                named.add(parse_manifest(manifest).attempt)
            except CheckpointError:
                return  # it may name any
        if not naming:
            self._delete_below(name_of(step))
            return
        for attempt, files in listing.inside(step).items():
            if attempt not in named:
                for name in files:
                    self._delete(name)

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call(lambda fs: fs.delete_file(self._at(name)))

    def _delete_below(self, name: str) -> None:
        # Some clients delete all that is there, and then miss an object for the directory itself.
        with suppress(FileNotFoundError):
            self._call(lambda fs: fs.delete_dir(self._at(name)))


class ObjectAttempt:
    """A generation under a name of its own. See :class:`~streamlstm.recovery.place.Attempt`."""

    def __init__(self, place: ObjectPrefix, step: int) -> None:
        self._place, self._step = place, step
        self.ident = secrets.token_hex(8)

    @contextmanager
    def create(self, name: str) -> Generator["Upload"]:
        """See :class:`~streamlstm.recovery.place.Attempt`."""
        with self._place.create(f"{name_of(self._step)}/{self.ident}/{name}") as upload:
            yield upload

    def link(self, step: int, attempt: str, name: str) -> None:
        """Copied by the store itself: nothing travels, but it is kept once for each generation."""
        self._place.copy(f"{name_of(step)}/{attempt}/{name}", f"{name_of(self._step)}/{self.ident}/{name}")

    def commit(self, manifest: bytes) -> None:
        """Upload the manifest, and copy it unless another process has made a generation of this step meanwhile."""
        with self.create(MANIFEST) as draft:
            draft.write(manifest)
            draft.sync()
        there = self._place.get(f"{name_of(self._step)}/{MANIFEST}")
        if there is not None and not self._place.knows(self._step, there):
            raise OSError(errno.EBUSY, "another process has written a checkpoint of this step meanwhile")
        self._place.remember(self._step, manifest)
        self._place.copy(f"{name_of(self._step)}/{self.ident}/{MANIFEST}", f"{name_of(self._step)}/{MANIFEST}")

    def discard(self) -> None:
        """Leave all to the sweep: a call that failed may still arrive, and one that came too late may have counted."""


class ObjectFiles:
    """The files of one generation. See :class:`~streamlstm.recovery.generations.Files`."""

    readers = 1  # the time a call has counts from when it waits behind another

    def __init__(self, place: ObjectPrefix, step: int, manifest: str = "") -> None:
        self._place, self._step = place, step
        self._manifest = manifest or f"{name_of(step)}/{MANIFEST}"

    @contextmanager
    def manifest(self) -> Generator["_Bytes"]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        with self._place.reading():
            data = self._place.get(self._manifest)
        self._place.look_at(self._step, data)
        if data is None:
            raise CheckpointError(f"{MANIFEST} is missing")
        self._place.remember(self._step, data)
        yield _Bytes(data)

    def names(self, attempt: str) -> set[str]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        with self._place.reading():
            return self._place.list_inside(self._within(attempt)) - {MANIFEST}

    @contextmanager
    def open(self, attempt: str, name: str) -> Generator["Download"]:
        """See :class:`~streamlstm.recovery.generations.Files`."""
        with self._place.reading():
            try:
                stream = self._place.read_stream(f"{self._within(attempt)}/{name}")
            except FileNotFoundError as error:
                raise CheckpointError(f"{name} is missing") from error
        yield stream

    def _within(self, attempt: str) -> str:
        return f"{name_of(self._step)}/{attempt}" if attempt else name_of(self._step)


class Upload:
    """An object that is being written. See :class:`~streamlstm.recovery.place.Draft`."""

    def __init__(self, caller: "Caller", stream: pa.NativeFile) -> None:
        self._caller, self._stream = caller, stream
        self._line = caller.line
        self._over = False

    def write(self, data: bytes | memoryview, /) -> None:
        """See :class:`~streamlstm.recovery.place.Draft`."""
        for first in range(0, len(data), _WRITE_BLOCK):
            self._caller.call(lambda piece=data[first : first + _WRITE_BLOCK]: self._stream.write(piece))

    def sync(self) -> None:
        """The upload ends: from now on the object is there."""
        self._caller.call(self._stream.close)
        self._over = True

    def abandon(self) -> None:
        """
        Let go of an upload that was not finished. A part of an object may become visible; nothing names it.

        The client would do so when it forgets the stream, in whichever thread that happens, and wait for the store. So
        it is done behind whatever that line still waits for, and nobody waits.
        """
        if not self._over:
            self._line.put(self._stream.close)


class Download:
    """An object that is being read."""

    def __init__(self, place: ObjectPrefix, stream: pa.NativeFile) -> None:
        self._place, self._stream = place, stream

    def read(self, size: int, /) -> bytes:
        """See :class:`~streamlstm.recovery.generations.Readable`."""
        blocks: list[bytes] = []
        with self._place.reading():
            while size and (block := self._next(min(size, _READ_BLOCK))):
                blocks.append(block)
                size -= len(block)
        return b"".join(blocks)

    def _next(self, size: int) -> bytes:
        return self._place.call(lambda: self._stream.read(size))


class _Bytes:
    """A small object that was read at once."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int, /) -> bytes:
        taken, self._data = self._data[:size], self._data[size:]
        return taken


class Line(Protocol):
    """Calls, one after the other."""

    def put(self, item: Callable[[], None], /) -> None:
        """One more, behind the others; nobody waits for it."""
        ...


class Caller:
    """
    Makes calls in a thread of its own, so that waiting has an end.

    A call that is not over by then is left to itself, with its thread, which ends when it does; the next one gets a new
    thread.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._line: Line | None = None

    @property
    def line(self) -> "Line":
        """Whoever makes the calls now, in order."""
        if self._line is None:
            self._line = _Thread()
        return self._line

    def call(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns. Raises ``OSError`` with an ``errno`` for whatever the store says."""
        outcome = self.outcome(work)
        if outcome is None:
            raise OSError(errno.ETIMEDOUT, f"the store did not answer within {self._limit_s:g} s")
        if isinstance(outcome, BaseException):
            raise _as_os_error(outcome) from outcome
        return outcome[0]

    def outcome(self, work: Callable[[], _T]) -> tuple[_T] | BaseException | None:
        """What ``work`` returns or raises; ``None`` when that takes too long."""
        done: queue.SimpleQueue[tuple[_T] | BaseException] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((work(),))
            except BaseException as error:  # noqa: BLE001, because the caller must hear of it, whatever it is
                done.put(error)

        self.line.put(run)
        try:
            return done.get(timeout=self._limit_s)
        except queue.Empty:
            self._line = None
            return None


class _Thread:
    """A :class:`Line` whose thread ends after the last call, once nobody holds on to the line."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name="object store", daemon=True).start()
        weakref.finalize(self, self._calls.put, None).atexit = False

    def put(self, item: Callable[[], None], /) -> None:
        self._calls.put(item)


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        with suppress(BaseException), underway():  # what an upload that nobody waits for says at its end
            call()
        del call


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _read_all(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def _as_os_error(error: BaseException) -> BaseException:
    """With an ``errno`` that says whose fault it is."""
    if not isinstance(error, OSError | pa.ArrowException) or isinstance(error, StreamlstmError):
        return error
    text = " ".join(str(error).split())[:_LONGEST_ERROR]
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, text)
    number = errno.EACCES if _DENIED.search(text) else errno.ENOENT if _NO_BUCKET.search(text) else errno.EREMOTEIO
    # An OSError with ENOENT would be a FileNotFoundError, and the missing bucket no more than a missing object.
    return OSError(number, text) if number != errno.ENOENT else NotADirectoryError(errno.ENOTDIR, text)


def _cannot_read(name: str, error: OSError) -> NoReturn:
    what = f"{CHECKPOINT_URL}: {name}: {error.strerror or error}"
    if error.errno in _SETUP | {errno.ENOTDIR}:
        raise ConfigError(what) from error
    raise Temporary(f"{what}; the store did not let itself be read, which says nothing about what is in it") from error
