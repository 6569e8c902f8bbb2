"""
One session after another: what a failed transaction costs is a start-up, not a process.

A session is all between taking over the transactional id and losing it. When its transaction fails for a reason that
may pass, nothing is mended: the producer and the engine are thrown away, and start-up begins again from what was
committed, in its own order. Reasons that need somebody's hand, a producer that was fenced and deadlines that passed
end the process instead.
"""

from typing import Protocol

from streamlstm.errors import StartOver, Temporary, Unavailable
from streamlstm.service.stopping import Stop

TRIES = 3
"""Sessions in a row that may end without a committed transaction; then the process ends (75), and is seen to."""

PAUSE_S = 1.0
"""Before the second try; twice as long before the third, and so on."""


class Session(Protocol):
    """The daemon, as far as it is started over."""

    @property
    def committed(self) -> bool:
        """Whether it has committed anything."""
        ...

    def run(self) -> None:
        """Until asked to stop."""
        ...

    def abandon(self) -> None:
        """Wait for what it does beside the loop. Raises :class:`~streamlstm.errors.Temporary` when it takes long."""
        ...


class Log(Protocol):
    """Of structlog, what is used here."""

    def warning(self, event: str, **facts: object) -> object:
        """What an operator should look at."""
        ...


class Begin(Protocol):
    """Start up, and have a session ready to run."""

    def __call__(self, *, first: bool) -> Session:
        """``first`` until one has begun: what the operator asked of this start is not asked of those after it."""
        ...


def run_sessions(begin: Begin, stop: Stop, log: Log) -> None:
    """
    ``begin`` and run sessions until one ends as asked.

    A :class:`~streamlstm.errors.StartOver` begins the next one; the last of :data:`TRIES` in a row without a commit
    is raised. Every other error is, but a broker that does not answer any more, having answered once, is
    :class:`~streamlstm.errors.Temporary`.
    """
    failed, first = 0, True
    while True:
        session: Session | None = None
        try:
            session = begin(first=first)
            first = False
            session.run()
        except StartOver as error:
            failed = 1 if session is not None and session.committed else failed + 1
            if failed == TRIES:
                raise
            log.warning("a transaction failed; starting over from what was committed", error=str(error))
            if session is not None:
                session.abandon()
            stop.wait(PAUSE_S * failed)
        except Unavailable as error:
            if not failed:
                raise
            raise Temporary(f"starting over after a failed transaction: {error}") from error
        else:
            return
