"""A process that waits for ever helps nobody: past a deadline it leaves, and its supervisor starts it again."""

import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from streamlstm.errors import Temporary


def leave(message: str) -> None:
    """
    End the process now, with one line on stderr. Nothing is flushed or closed: a thread that hangs may hold any lock.

    Safe at any instruction, because it is no worse than ``kill -9``.
    """
    os.write(2, f"streamlstm: {message}\n".encode())
    os._exit(Temporary.exit_code)


_underway: set[object] = set()


@contextmanager
def underway() -> Generator[None, None, None]:
    """Inside, a call is made that nothing can end, and that the end of the process would wait for."""
    token = object()
    _underway.add(token)
    try:
        yield
    finally:
        _underway.discard(token)


def end(code: int) -> None:
    """Leave with this exit code if a call is still :func:`underway`; else return, for an orderly end."""
    if _underway:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Deadline:
    """
    Watches calls that can block without a time-out of their own, such as kafka-python's ``commit_transaction``.

    A call that takes longer than ``limit_s`` ends the process with 75: no thread can be interrupted in Python, and
    going on with a client in an unknown state is worse. Time in which the whole process was suspended (SIGSTOP, a
    laptop's lid) does not count: a zombie must live to learn that it was fenced. Use from any thread.
    """

    def __init__(self, limit_s: float, *, expire: Callable[[str], None] = leave) -> None:
        self.limit_s = limit_s
        self._expire = expire
        self._tick_s = min(0.25, limit_s / 20)
        self._lock = threading.Lock()
        self._watched: dict[object, tuple[str, float]] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @contextmanager
    def guard(self, doing: str) -> Generator[None, None, None]:
        """Inside, the clock runs. ``doing`` completes "no answer for 30 s while …"."""
        token = object()
        with self._lock:
            self._watched[token] = (doing, self.limit_s)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop(token, None)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._tick_s):
            now = time.monotonic()
            # Longer than two ticks means that we were not running either.
            elapsed_s = min(now - before, 2 * self._tick_s)
            before = now
            with self._lock:
                self._watched = {t: (doing, left_s - elapsed_s) for t, (doing, left_s) in self._watched.items()}
                late = [doing for doing, left_s in self._watched.values() if left_s <= 0]
            if late:
                self._expire(f"no answer for {self.limit_s:g} s while {late[0]}; leaving so as to be restarted")
                return
