"""How the process is asked to stop: signals set flags, and a watchdog sees that it ends in time."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_SIGNAL_S = 0.5
"""One request may arrive twice: `timeout` and some supervisors signal the process and its group."""


class Stop:
    """A request to end, set by a signal and read by the loop."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._asked_at_s = 0.0

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self._asked.is_set()

    def request(self) -> None:
        """Ask. From any thread, but not from a signal handler: it may have interrupted :meth:`wait`."""
        if not self._asked.is_set():
            self._asked_at_s = time.monotonic()
            self._asked.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep, or be woken by the request."""
        return self._asked.wait(timeout_s)

    def left_s(self, timeout_s: float) -> float:
        """What is left of ``timeout_s`` since the request; all of it while there was none."""
        return timeout_s - (time.monotonic() - self._asked_at_s) if self.requested else timeout_s


@contextmanager
def signals_stop(stop: Stop, timeout_s: float, leave: Callable[[str], object]) -> Generator[None, None, None]:
    """
    Inside, SIGTERM or SIGINT asks to stop; a second one, or ``timeout_s`` later, calls ``leave`` to end the process.

    That is safe at any instruction. Signals are taken by a thread through a pipe, so that a main thread that hangs in
    a call cannot hold up the second one. To be used in the main thread.
    """
    receiving, sending = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            left_s = stop.left_s(timeout_s)
            if left_s <= 0:
                leave(
                    f"not finished {timeout_s:g} s after the signal; nothing is lost, the next start replays the rest"
                )
                return
            readable, _, _ = select.select([receiving], [], [], min(left_s, 0.2))
            for number in os.read(receiving, 64) if readable else b"":
                if number not in SIGNALS:
                    continue
                if stop.requested and timeout_s - stop.left_s(timeout_s) > SAME_SIGNAL_S:
                    leave("a second signal: leaving now; nothing is lost, the next start replays the rest")
                    return
                stop.request()

    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(receiving)
        os.close(sending)
