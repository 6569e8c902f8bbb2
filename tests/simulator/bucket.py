"""
An object store that outlives processes: calls fail before or after they took effect, uploads leave a part of their
object, and what was waited for in vain arrives later, or never.
"""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs
from fakes import Fate
from objects import MemoryBucket

from simulator.weather import Weather
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.objects import Caller, ObjectAttempt, ObjectPrefix

NAME = "s3://bucket/prefix"


@dataclass
class Late:
    """A call that nobody waits for any more. ``sent``: it is on its way, even if the process that made it is gone."""

    work: Callable[[], object]
    hands: "Hands"
    sent: bool


@dataclass
class Bucket:
    """The objects, and the calls that have not arrived yet, in their order."""

    objects: dict[str, bytes] = field(default_factory=dict)
    late: list[Late] = field(default_factory=list)
    attempts: int = 0
    arrived: int = 0

    def store(self, weather: Weather | None = None) -> CheckpointStore:
        """As a process under this weather sees it; without one, as it is."""
        hands = Hands(self, weather or Weather(), quiet=weather is None)
        filesystem = pafs.PyFileSystem(TornBucket(self.objects, hands))
        return CheckpointStore(NumberedPrefix(self, lambda: filesystem, ImpatientCaller(self, hands)))

    def settle(self, rng: random.Random) -> None:
        """Some of what is on its way arrives."""
        while self.late and rng.random() < 0.3:
            late = self.late.pop(0)
            if late.sent or not late.hands.weather.dead:
                late.hands.quiet = True
                with suppress(Exception):
                    late.work()
                late.hands.quiet = False
                self.arrived += 1


class Hands(Fate):
    """What befalls the calls of one process; nothing, while one that is late arrives."""

    def __init__(self, bucket: Bucket, weather: Weather, *, quiet: bool) -> None:
        super().__init__()
        self.bucket, self.weather, self.quiet = bucket, weather, quiet
        self.failing = False

    @property
    def spared(self) -> bool:
        """Files that are read side by side are too: their calls have no order."""
        return self.quiet or threading.current_thread().name.startswith("checkpoint-read")

    def point(self, what: str = "") -> None:
        if self.spared:
            return
        self.failing = not self.weather.dead
        self.weather.point(what)
        if self.weather.struck("store", what):
            raise OSError("AWS Error NETWORK_CONNECTION during an operation: the connection was reset")
        self.failing = False


class TornBucket(MemoryBucket):
    """An upload that failed may leave a part of its object."""

    trouble: Hands

    def part_of(self, data: bytes) -> bytes | None:
        weather = self.trouble.weather
        if not self.trouble.failing or weather.rng.random() < 0.5:
            return None
        weather.errors["torn"] = weather.errors.get("torn", 0) + 1
        return data[: weather.rng.randrange(len(data) + 1)]


class ImpatientCaller(Caller):
    """Waits for no clock: a call is over at once, or it hangs for longer than anybody waits."""

    def __init__(self, bucket: Bucket, hands: Hands) -> None:
        super().__init__()
        self._bucket, self._hands = bucket, hands

    @property
    def line(self) -> "ImpatientCaller":
        return self

    def put(self, item: Callable[[], None], /) -> None:
        self._bucket.late.append(Late(item, self._hands, sent=False))

    def outcome(self, work: Callable[[], Any]) -> Any:
        weather = self._hands.weather
        if not weather.dead and not self._hands.spared:
            self._bucket.settle(weather.rng)
        if not self._hands.spared and weather.struck("hang", "a call of the store"):
            self._bucket.late.append(Late(work, self._hands, sent=True))
            return None
        try:
            return (work(),)
        except BaseException as error:  # noqa: BLE001, because the caller must hear of it, whatever it is
            return error


class NumberedPrefix(ObjectPrefix):
    """Attempts are told apart by their number, so that one seed gives one story."""

    def __init__(self, bucket: Bucket, connector: Callable[[], pafs.FileSystem], caller: Caller) -> None:
        super().__init__(NAME, "bucket/prefix", connector, caller)
        self._bucket = bucket

    def begin(self, step: int) -> ObjectAttempt:
        attempt = super().begin(step)
        self._bucket.attempts += 1
        attempt.ident = f"{self._bucket.attempts:016x}"
        return attempt
