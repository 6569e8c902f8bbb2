"""What a place must do in which generations live: a directory, or a prefix of an object store."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from streamlstm.recovery.generations import Files

CHECKPOINT_URL = "checkpoint.url"
"""The key that names the service's place."""


class Draft(Protocol):
    """A file that is being written. It counts only once :meth:`sync` has returned."""

    def write(self, data: bytes | memoryview, /) -> None:
        """All of ``data``, or an error."""
        ...

    def sync(self) -> None:
        """What was written survives the machine. Called once, last, and never again after an error."""
        ...


class Attempt(Protocol):
    """A generation that is being written, and is not there until :meth:`commit`."""

    @property
    def ident(self) -> str:
        """What the manifest must give as ``attempt``."""
        ...

    def create(self, name: str) -> AbstractContextManager[Draft]:
        """Begin a file; one that was not synced when it is left counts for nothing."""
        ...

    def link(self, step: int, attempt: str, name: str) -> None:
        """That file of another generation, whose manifest says ``attempt``, is in this one too."""
        ...

    def commit(self, manifest: bytes) -> None:
        """
        Make the generation be there, at one instant and durably, in place of one of the same step.

        Whatever goes wrong: either that one is still there or this one, and never none or half of one.
        """
        ...

    def discard(self) -> None:
        """Remove what an attempt that failed has left, as far as that can be done."""
        ...


class Place(Protocol):
    """
    Where generations are. All methods raise ``OSError`` with an ``errno``; reading in an object store that does not
    answer is :class:`~streamlstm.errors.Temporary`, for its silence says nothing about a generation.
    """

    @property
    def name(self) -> str:
        """As an operator knows it."""
        ...

    @property
    def directory(self) -> Path | None:
        """Where it is one of this machine."""
        ...

    @property
    def setting(self) -> str:
        """The key or the option by which the operator named it."""
        ...

    @property
    def needs(self) -> str:
        """What must be there before a start, for the operator."""
        ...

    def open(self) -> None:
        """Be the only one who writes here, as far as the place can tell, and sweep up what a killed process left."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...

    def leave(self) -> None:
        """Let go of it, and leave nothing behind where :meth:`open` made it and nothing has come to be in it."""
        ...

    def steps(self) -> list[int]:
        """The generations that are there, whole or not, oldest first."""
        ...

    def bad(self) -> list[str]:
        """The names of those that were put aside, oldest first."""
        ...

    def files(self, step: int) -> Files:
        """What a generation consists of."""
        ...

    def begin(self, step: int) -> Attempt:
        """Begin to write one."""
        ...

    def put_aside(self, step: int) -> str:
        """
        Take a bad generation out of :meth:`steps`, into :meth:`bad`; its name there.

        Raises ``FileNotFoundError`` where it is gone, or is another by now than the one that was read here.
        """
        ...

    def files_of_bad(self, name: str) -> Files:
        """What one consists of that was put aside under this name."""
        ...

    def bring_back(self, name: str) -> None:
        """Undo :meth:`put_aside`. Its step must not be there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a generation, by :func:`name_of`, or one that was put aside. A kill leaves it there, or swept up."""
        ...


def step_of_bad(name: str) -> int:
    """
    The step of one that was put aside.

    >>> step_of_bad("00000000000000000007.bad-1")
    7
    """
    return int(name.partition(".")[0])


def name_of(step: int) -> str:
    """
    What a generation is called.

    >>> name_of(7)
    '00000000000000000007'
    """
    return f"{step:020d}"
