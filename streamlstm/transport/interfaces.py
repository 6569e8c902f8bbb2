"""What the service asks of a transport: a source, live or not, a publisher, a progress log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from streamlstm.errors import Temporary
from streamlstm.records.batch import Cut, Headers, Messages, Range


class Fenced(Temporary):
    """
    The broker refuses our producer: somebody newer has the name, or our transaction took too long.

    Kafka says the same for both (error 90), so only the progress log can tell: an incarnation newer than ours means
    :class:`~streamlstm.errors.Superseded`, otherwise a restart mends it.
    """


class Position(NamedTuple):
    """Where reading goes on."""

    topic: str
    partition: int
    next_offset: int


class OutMessage(NamedTuple):
    """One message to publish. ``timestamp_ms`` is ``None`` for the broker's own time."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one commit publishes: a transaction, where there are transactions."""

    forecasts: Sequence[OutMessage]
    dead_letters: Sequence[OutMessage]
    progress: bytes


class Frozen(NamedTuple):
    """The state of one part of the shell as a value: JSON, and arrays that nobody writes to."""

    values: Any
    arrays: Mapping[str, NDArray[Any]] = {}


LeaderEpochs = Mapping[tuple[str, int], int]
"""By (topic, partition)."""


class Source(Protocol):
    """Messages by position. It takes turns between partitions, with a bounded quantum."""

    def seek(self, positions: Sequence[Position]) -> None:
        """Go on from these positions; buffered messages are forgotten."""
        ...

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:
        """
        The next cut, or ``None`` when nothing came within ``timeout_s`` (0 = do not wait).

        A cut may hold no message at all: offsets that hold no record (transaction markers, compaction) are
        consumed like any others, so that no position falls behind what is retained.
        """
        ...

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        """
        Exactly the messages of a recorded cut.

        Raises :class:`~streamlstm.errors.LogGap` when some of it is no longer retained.
        """
        ...

    def close(self) -> None:
        """Give everything back. Never raises."""
        ...


class LiveSource(Source, Protocol):
    """A source that grows while it is read."""

    def seek(self, positions: Sequence[Position], leader_epochs: LeaderEpochs = MappingProxyType({})) -> None:
        """
        As :meth:`Source.seek`.

        ``leader_epochs`` are what :meth:`leader_epochs` said at just these positions: a log that was cut back since
        is found out by them.
        """
        ...

    def leader_epochs(self) -> LeaderEpochs:
        """Under which leader the last message before each position was written, as far as known. Does not block."""
        ...

    def topic_ids(self) -> "TopicIds":
        """The ids of the input topics as they are now."""
        ...

    def resolve_start(self, start: str) -> list[Position]:
        """Every partition's position for ``earliest``, ``latest`` or ``timestamp:ISO``, in the configured order."""
        ...

    def pass_over(self, ranges: Sequence[Range]) -> None:
        """
        These offsets will not be used, so a batch of them that cannot be read is no reason to stop: it comes as one
        :class:`~streamlstm.records.batch.Unread` message.
        """
        ...

    def lag(self) -> Mapping[tuple[str, int], int]:
        """Offsets from the last cut to the end of the log, by (topic, partition), as far as known. Does not block."""
        ...

    def commit_group_offsets(self, positions: Sequence[Position]) -> None:
        """Tell lag tools where we are. Nothing reads it back. Never blocks, never raises."""
        ...


class Publisher(Protocol):
    """The checked commit."""

    def begin_session(self) -> None:
        """Take ownership: whoever published under this name before, as far as it can be told, cannot any more."""
        ...

    def commit(self, outputs: Outputs) -> int:
        """
        Make ``outputs`` visible and return the progress record's offset. It has happened when this returns; when it
        raises, nobody knows, and only the progress log can tell: a record that is in it counts. By transactions its
        outputs are then visible too, all or nothing; without them they are to be published again. Raises
        :class:`Fenced`, :class:`~streamlstm.errors.NotAuthorised`, :class:`~streamlstm.errors.DataError` (a message is
        larger than the topic allows), :class:`~streamlstm.errors.CheckpointNotWritten` (a progress log on a disk that
        fails), :class:`~streamlstm.errors.StartOver` or another :class:`~streamlstm.errors.Temporary`; after any of
        them nothing can be published until a new session has begun.
        """
        ...

    def close(self) -> None:
        """Give everything back. Never raises."""
        ...


class ProgressEntry(NamedTuple):
    """One record of the progress log."""

    offset: int
    value: bytes


class ProgressLog(Protocol):
    """The chain of committed steps, oldest first."""

    def read(self, start: int = 0) -> list[ProgressEntry]:
        """All committed entries at offset ``start`` and later that are still retained."""
        ...

    def trim(self, before: int) -> None:
        """Forget entries below this offset."""
        ...


class DurableLog(Protocol):
    """Where a progress record is safe before anything of its step is published."""

    def open(self) -> None:
        """Go on after the last record that was acknowledged."""
        ...

    def append(self, value: bytes) -> int:
        """Make a record durable; its offset. Raises :class:`~streamlstm.errors.CheckpointNotWritten`, then for ever."""
        ...

    def close(self) -> None:
        """Append no more. Never raises."""
        ...


TopicIds = Mapping[str, str]
"""Topic name → the id Kafka gave it when it was made."""
