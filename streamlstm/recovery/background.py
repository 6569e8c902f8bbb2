"""Checkpoints beside the loop: a snapshot goes in, and some turns later its outcome comes out."""

import errno
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointNotWritten
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, Written
from streamlstm.recovery.progress import Link
from streamlstm.recovery.provenance import Provenance
from streamlstm.transport.interfaces import Frozen

# A place that is full, read-only, away or in use may come back; any other error says that it loses data.
_MAY_PASS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
}

# So much nicer than the loop; more, and on a busy machine the loop would wait for an interpreter held by a thread that
# gets no time.
_NICE = 5


@dataclass(frozen=True, slots=True)
class Kept:
    """A generation is durable, and older ones were pruned. The chain is needed from ``oldest`` on (``None``: all)."""

    written: Written
    oldest: Link | None
    leftover: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that came to nothing. ``may_pass``: the next one may succeed; otherwise the disk loses data."""

    step: int
    error: CheckpointNotWritten
    may_pass: bool


Outcome = Kept | Failed


def in_a_thread(work: Callable[[], None]) -> None:
    """Do it beside the caller, who goes first. A process that must end does not wait for a disk that hangs."""

    def politely() -> None:
        if sys.platform == "linux":
            # Of this thread, and of those that it starts. Where it is forbidden, the loop waits a little more.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
            # One processor is left to the loop: on two of them, being nicer is not enough against two threads.
            with suppress(OSError):
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[1:])
        work()

    threading.Thread(target=politely, name="checkpoint", daemon=True).start()


class BackgroundWriter:
    """
    Writes one snapshot at a time, in a thread of its own; at most one is in flight.

    The snapshot is immutable, so the loop goes on meanwhile. A kill at any point leaves the older generations.
    """

    def __init__(
        self, store: CheckpointStore, keep: Keep, start: Callable[[Callable[[], None]], None] = in_a_thread
    ) -> None:
        self._store, self._keep, self._start = store, keep, start
        self._done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether an outcome is still to be fetched."""
        return self._busy

    def submit(
        self,
        state: EngineState,
        provenance: Provenance,
        beside: Frozen | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Begin. The outcome of the one before must have been fetched.

        ``before`` is called first, beside the loop too: it makes durable what the generation speaks of.
        """
        assert not self._busy
        self._busy = True
        self._start(lambda: self._work(state, provenance, beside, before))

    def poll(self, timeout_s: float = 0.0) -> Outcome | None:
        """The outcome, if it is there within ``timeout_s``. An unexpected error is raised here."""
        if not self._busy:
            return None
        try:
            outcome = self._done.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        self._busy = False
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _work(
        self, state: EngineState, provenance: Provenance, beside: Frozen | None, before: Callable[[], object]
    ) -> None:
        try:
            before()
            written = self._store.write(state, provenance, beside, last=True)
            leftover = self._store.prune(self._keep)
            self._done.put(Kept(written, self._store.oldest_link(), leftover))
        except CheckpointNotWritten as error:
            cause = error.__cause__
            may_pass = isinstance(cause, OSError) and cause.errno in _MAY_PASS
            self._done.put(Failed(state.step, error, may_pass))
        except BaseException as error:  # noqa: BLE001, because the loop must hear of it, whatever it is
            self._done.put(error)
