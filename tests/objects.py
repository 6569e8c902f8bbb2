"""An object store in memory, whose every call may fail, fail after it took effect, hang, or end the process."""

import errno
import io
import threading
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.fs as pafs
from fakes import Crash, Fate

from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.objects import Caller, ObjectPrefix


@dataclass
class Trouble:
    """
    What befalls the ``at``-th call (``None``: nothing). Each call is counted before and after it takes effect.

    ``kill`` ends the process: no later call does anything. ``error`` fails one call, ``away`` all from there on,
    ``hang`` makes one call wait for ``release``.
    """

    at: int | None = None
    kind: str = "kill"
    calls: int = 0
    dead: bool = False
    release: threading.Event = field(default_factory=threading.Event)

    def point(self, what: str = "") -> None:
        if self.dead:
            raise Crash
        here = self.calls
        self.calls += 1
        if self.at is None or here < self.at or (here > self.at and self.kind != "away"):
            return
        if self.kind == "kill":
            self.dead = True
            raise Crash
        if self.kind == "hang":
            self.release.wait(30)
            return
        raise OSError("AWS Error NETWORK_CONNECTION during an operation: the connection was reset")

    @property
    def met(self) -> bool:
        return self.at is not None and self.calls > self.at


class MemoryBucket(pafs.FileSystemHandler):
    """One process's view of ``objects``, which live on."""

    def __init__(self, objects: dict[str, bytes], trouble: Trouble | Fate | None = None) -> None:
        self.objects, self.trouble = objects, trouble or Trouble()

    def part_of(self, data: bytes) -> bytes | None:
        """What is there of an object whose upload failed; ``None``: nothing."""
        return None

    def get_type_name(self) -> str:
        return "memory"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        self.trouble.point("look at objects")
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        if path in self.objects:
            return pafs.FileInfo(path, pafs.FileType.File, size=len(self.objects[path]))
        there = path == "bucket" or any(name.startswith(f"{path}/") for name in self.objects)
        return pafs.FileInfo(path, pafs.FileType.Directory if there else pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        self.trouble.point("list objects")
        start = f"{selector.base_dir}/"
        found = [name for name in self.objects if name.startswith(start)]
        return [self._info(name) for name in found if selector.recursive or "/" not in name[len(start) :]]

    def delete_file(self, path: str) -> None:
        self.trouble.point(f"delete {path}")
        if path not in self.objects:
            raise FileNotFoundError(errno.ENOENT, path)
        del self.objects[path]
        self.trouble.point(f"delete {path}, done")

    def delete_dir(self, path: str) -> None:
        for name in [name for name in self.objects if name.startswith(f"{path}/")]:
            self.trouble.point(f"delete {name}")
            self.objects.pop(name, None)  # what another process deleted meanwhile is no error of a store
        self.trouble.point(f"delete {path}, done")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self.trouble.point(f"open {path}")
        if path not in self.objects:
            raise FileNotFoundError(errno.ENOENT, path)
        return pa.PythonFile(_Reading(self, self.objects[path]), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        self.trouble.point(f"begin {path}")
        return pa.PythonFile(_Writing(self, path), mode="w")

    def copy_file(self, src: str, dest: str) -> None:
        self.trouble.point(f"copy {src} to {dest}")
        if src not in self.objects:
            raise FileNotFoundError(errno.ENOENT, src)
        self.objects[dest] = self.objects[src]
        self.trouble.point(f"copy {src} to {dest}, done")

    def _no(self, *_: object) -> None:
        raise NotImplementedError

    create_dir = delete_dir_contents = delete_root_dir_contents = move = open_append_stream = _no


class _Reading(io.BytesIO):
    def __init__(self, bucket: MemoryBucket, data: bytes) -> None:
        super().__init__(data)
        self.bucket = bucket

    def read(self, size: int | None = -1) -> bytes:
        self.bucket.trouble.point("read")
        return super().read(size)


class _Writing(io.BytesIO):
    """There when it was closed."""

    def __init__(self, bucket: MemoryBucket, path: str) -> None:
        super().__init__()
        self.bucket, self.path = bucket, path

    def write(self, data: object) -> int:
        self.bucket.trouble.point(f"send a part of {self.path}")
        return super().write(data)

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            try:
                self.bucket.trouble.point(f"finish {self.path}")
            except BaseException:
                part = self.bucket.part_of(data)
                if part is not None:
                    self.bucket.objects[self.path] = part
                raise
            self.bucket.objects[self.path] = data
            self.bucket.trouble.point(f"finish {self.path}, done")


def object_store(
    objects: dict[str, bytes], trouble: Trouble | Fate | None = None, limit_s: float = 20.0
) -> CheckpointStore:
    """A store over these objects, as one process sees it."""
    bucket = MemoryBucket(objects, trouble)
    return CheckpointStore(
        ObjectPrefix("s3://bucket/prefix", "bucket/prefix", lambda: pafs.PyFileSystem(bucket), Caller(limit_s))
    )
