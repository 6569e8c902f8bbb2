"""
What befalls one life of a process: drawn from a seed, written down as it happens.

Every call to the world is a *point*. At one of them the process may be killed, or be stopped while its successor lives;
between two of them the checkpoint's thread gets on by as many of its own as the seed says.
"""

import errno
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fakes import Crash, Fate

DISK = (errno.EIO, errno.ENOSPC, errno.EROFS)
SWIFT = 1 << 30
"""The pace of a checkpoint's thread that is never waited for."""


class Beside:
    """
    The checkpoint's thread, moved by hand: it runs from one point to the next when it is told to, and never beside
    the loop. So one seed gives one order of everything.
    """

    def __init__(self) -> None:
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            self._go.acquire()
            work()
            self._thread = None
            self._back.release()

        assert self._thread is None
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def advance(self, points: int) -> None:
        """Called by the loop."""
        while self._thread is not None and points > 0:
            points -= 1
            self._go.release()
            self._back.acquire()

    def pause(self) -> None:
        """Called at a point of the thread itself."""
        self._back.release()
        self._go.acquire()

    def finish(self) -> None:
        self.advance(SWIFT)

    @property
    def here(self) -> bool:
        return threading.current_thread() is self._thread


@dataclass
class Weather(Fate):
    """
    The fate of one life: when it dies (``at``), when it sleeps, and how often each kind of call fails.

    ``rates`` maps a kind of trouble to its probability; ``story`` is where everything that happens is told.
    ``errors`` counts what was injected, by kind.
    """

    rng: random.Random = field(default_factory=random.Random)
    rates: Mapping[str, float] = field(default_factory=dict)
    numbers: Sequence[int] = DISK
    pace: int = 3
    sleep_at: int | None = None
    while_asleep: Callable[[], None] | None = None
    story: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    beside: Beside = field(default_factory=Beside)
    died: str = ""

    def point(self, what: str = "a call of the source") -> None:
        if not self.dead:
            if self.beside.here:
                self.beside.pause()
            else:
                self.beside.advance(SWIFT if self.pace == SWIFT else self.rng.randrange(self.pace + 1))
        if self.dead:
            raise Crash
        self.calls += 1
        if self.at is not None and self.calls > self.at:
            self.die(what)
        if self.sleep_at is not None and self.calls > self.sleep_at and not self.beside.here:
            self.sleep_at = None
            assert self.while_asleep is not None
            self.tell(f"asleep before {what}")
            self.while_asleep()
            self.tell(f"awake before {what}")

    def die(self, what: str) -> None:
        """At this instruction."""
        self.dead = True
        self.died = what
        self.tell(f"killed before {what}")
        raise Crash

    def end(self) -> None:
        """The process is gone, and its threads with it."""
        self.dead = True
        self.beside.finish()

    def struck(self, kind: str, what: str) -> bool:
        """Whether this call fails so."""
        if self.dead or self.rng.random() >= self.rates.get(kind, 0.0):
            return False
        self.errors[kind] = self.errors.get(kind, 0) + 1
        self.tell(f"{kind}: {what}")
        return True

    def disk(self, operation: str, what: str) -> int:
        """The error that this operation on the disk ends with, or 0."""
        if self.struck("disk", what):
            number = self.rng.choice(self.numbers)
            self.tell(f"  with {errno.errorcode[number]}")
            return number
        return 0

    def tell(self, event: str) -> None:
        self.story.append(f"    {self.calls:4d} {event}")
