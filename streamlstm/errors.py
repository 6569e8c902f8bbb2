"""
Every way the program can end, as a tree of exceptions with their exit codes.

::

    StreamlstmError            1   failure
    ├── DataError             65   bad input data, or a log that cannot be used
    │   ├── LogGap                 a needed offset is no longer retained
    │   ├── LogCutBack             what was consumed is not what the log holds now
    │   ├── TopicChanged           a topic was re-created or its partitions changed
    │   ├── CheckpointError        no generation can be used
    │   └── ProgressError          the progress chain is torn, forked or not ours
    ├── Unavailable           69   broker unreachable
    ├── CheckpointNotWritten  74   a checkpoint cannot be made durable
    ├── Temporary             75   restart me
    │   └── StartOver              a transaction failed: start-up over again may do
    ├── Superseded            76   another process has taken this shard over: do not restart
    ├── NotAuthorised         77   the broker refuses us
    └── ConfigError           78   configuration

Bad input is a value (:class:`streamlstm.records.batch.Rejected`); these are for broken promises.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar


class StreamlstmError(Exception):
    """The root. Its message is one line for the operator: what happened, where, and what to do."""

    exit_code: ClassVar[int] = 1


class DataError(StreamlstmError):
    """Bad input data or an unusable log."""

    exit_code = 65


class LogGap(DataError):
    """
    A needed offset is no longer retained.

    ``gaps`` are the ranges (topic, partition, start, end) that may be passed over; empty where nothing may.
    """

    def __init__(self, message: str, gaps: Sequence[tuple[str, int, int, int]] = ()) -> None:
        super().__init__(message)
        self.gaps = tuple(gaps)


class LogCutBack(DataError):
    """
    What was consumed is no longer what the log holds: it was cut back by an unclean leader election.

    ``ends`` says up to which offset each (topic, partition) is still as it was; 0 where nobody knows.
    """

    def __init__(self, message: str, ends: Mapping[tuple[str, int], int]) -> None:
        super().__init__(message)
        self.ends = dict(ends)


class TopicChanged(DataError):
    """A topic was re-created, or its partitions are not those the state was made from."""


class CheckpointError(DataError):
    """No checkpoint generation can be used."""


class ProgressError(DataError):
    """The progress chain is torn, forked, or belongs to something else."""


class Unavailable(StreamlstmError):
    """The broker cannot be reached."""

    exit_code = 69


class CheckpointNotWritten(StreamlstmError):
    """A checkpoint could not be made durable."""

    exit_code = 74


class Temporary(StreamlstmError):
    """Something that a restart mends."""

    exit_code = 75


class StartOver(Temporary):
    """
    A transaction failed, and whether any of it was committed is not known.

    Start-up finds out from the progress log; doing it over in the same process is enough. What was computed since the
    last commit is thrown away with the engine that did.
    """


class Superseded(StreamlstmError):
    """Another process owns this shard now."""

    exit_code = 76


class NotAuthorised(StreamlstmError):
    """The broker refuses the credentials or the operation."""

    exit_code = 77


class ConfigError(StreamlstmError):
    """The configuration cannot be used; the message lists every problem."""

    exit_code = 78
