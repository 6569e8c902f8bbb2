"""What the client's exceptions mean to us."""

from collections.abc import Generator
from contextlib import contextmanager

from kafka import errors as kafka_errors

from streamlstm.errors import ConfigError, DataError, NotAuthorised, StreamlstmError, Temporary
from streamlstm.transport.interfaces import Fenced

_PACKAGE = {"snappy": "python-snappy", "lz4": "lz4", "zstd": "zstandard"}

_MEANING: tuple[tuple[tuple[type[Exception], ...], type[StreamlstmError], str], ...] = (
    (
        (kafka_errors.ProducerFencedError, kafka_errors.InvalidProducerEpochError),
        Fenced,
        "fenced while {doing}: another producer took over, or the transaction timed out ({what})",
    ),
    (
        (kafka_errors.SaslAuthenticationFailedError,),
        NotAuthorised,
        "the broker refuses our credentials while {doing}: renew those in source.security ({what})",
    ),
    (
        (kafka_errors.TransactionalIdAuthorizationFailedError,),
        NotAuthorised,
        (
            "the broker refuses us transactions while {doing}: grant our user WRITE on the transactional id, "
            "`name` with -0 after it ({what})"
        ),
    ),
    (
        (kafka_errors.TopicAuthorizationFailedError,),
        NotAuthorised,
        (
            "the broker refuses us a topic while {doing}: grant our user READ on input and progress, WRITE on "
            "forecasts, dead letters and progress ({what})"
        ),
    ),
    (
        (kafka_errors.AuthorizationError,),
        NotAuthorised,
        "the broker refuses us while {doing}: grant our user the right to it ({what})",
    ),
    (
        (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError),
        DataError,
        "a message is larger than its topic allows, while {doing}: raise the topic's max.message.bytes ({what})",
    ),
    (
        (kafka_errors.InvalidTimestampError, kafka_errors.InvalidRecordError),
        DataError,
        (
            "its topic refuses a message, most likely for its timestamp, while {doing}: widen its settings "
            "message.timestamp.before.max.ms and message.timestamp.after.max.ms ({what})"
        ),
    ),
    (
        (kafka_errors.UnsupportedCodecError,),
        DataError,
        "a batch is compressed with a codec that cannot be read, while {doing}: install {package} ({what})",
    ),
    (
        (kafka_errors.CorruptRecordError,),
        DataError,
        "a batch is damaged (its checksum or structure is wrong), while {doing}: {what}",
    ),
    (
        (kafka_errors.UnknownTopicOrPartitionError, kafka_errors.UnknownTopicIdError),
        DataError,
        "a topic or partition is gone, while {doing}: {what}",
    ),
    (
        (kafka_errors.UnsupportedVersionError, kafka_errors.UnrecognizedBrokerVersion),
        ConfigError,
        "the broker is too old for what is needed, while {doing}: {what}",
    ),
    ((kafka_errors.KafkaConfigurationError,), ConfigError, "source.properties, while {doing}: {what}"),
)


def explain(error: BaseException, doing: str) -> StreamlstmError:
    """
    The exception to raise for one of the client's, with one line for the operator.

    What is not known to need somebody's hand is :class:`~streamlstm.errors.Temporary`: a restart begins again from
    what is committed, and is never wrong. ``doing`` completes "while …".

    >>> explain(kafka_errors.KafkaError("failed", kafka_errors.ProducerFencedError()), "committing").exit_code
    75
    >>> explain(kafka_errors.TopicAuthorizationFailedError({"t"}), "reading").exit_code
    77
    """
    if isinstance(error, StreamlstmError):
        return error
    cause = _innermost(error)
    what = f"{type(cause).__name__}: {_one_line(cause)}"
    package = next((package for codec, package in _PACKAGE.items() if codec in what), "its package")
    for types, meaning, text in _MEANING:
        if isinstance(cause, types):
            return meaning(text.format(doing=doing, what=what, package=package))
    return Temporary(f"the broker failed while {doing}: {what}")


@contextmanager
def explained(doing: str) -> Generator[None, None, None]:
    """Inside, the client's exceptions come out as ours."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise explain(error, doing) from error


def _innermost(error: BaseException) -> BaseException:
    """kafka-python wraps the reason as an argument of a bare ``KafkaError``."""
    for arg in error.args:
        if isinstance(arg, BaseException):
            return _innermost(arg)
    return error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
