"""kafka-python's three clients, opened and closed within bounds."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient
from kafka.record.default_records import DefaultRecordBatch
from kafka.structs import OffsetAndMetadata, TopicPartition

from streamlstm.config.model import Config, Source
from streamlstm.errors import Unavailable
from streamlstm.transport.kafka.explain import explained
from streamlstm.transport.kafka.settings import admin_settings, consumer_settings, quieten

# Untyped, because the stubs that pyright brings along are those of kafka-python 2.
Admin: TypeAlias = Any
Consumer: TypeAlias = Any
Producer: TypeAlias = Any

CLOSE_TIMEOUT_S = 2.0
_RECONNECT_PAUSE_S = 0.05


class PatientClient(KafkaNetClient):
    """
    A network client that answers "not ready" where kafka-python 3.0.12's own raises.

    Its one caller, the producer's sender, is written for that answer and puts the request back in its queue. On the
    exception it forgets the request, and then a coordinator that was away for a second leaves every transaction
    waiting for ever: for its partitions to be added, or, worse, for the end of a commit.
    """

    def await_ready(self, node_id: object, timeout_ms: int = 30_000) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride], because False is the point
        """Whether the node could be connected to."""
        try:
            return bool(super().await_ready(node_id, timeout_ms))
        except kafka_errors.KafkaConnectionError:
            time.sleep(_RECONNECT_PAUSE_S)  # the caller tries again at once
            return False


def open_consumer(config: Config, **settings: object) -> Consumer:
    """A consumer with nothing assigned. Raises :class:`~streamlstm.errors.Unavailable` when no broker answers."""
    consumer = _open(KafkaConsumer, {**consumer_settings(config), **settings})
    _mend_resume(consumer)
    return consumer


def open_checked_producer(settings: Mapping[str, Any]) -> Producer:
    """A producer whose every result is waited for. Raises :class:`~streamlstm.errors.Unavailable` without a broker."""
    return _open(KafkaProducer, {**settings, "kafka_client": PatientClient})


def open_producer(settings: Mapping[str, Any]) -> Producer:
    """Any other producer."""
    return _open(KafkaProducer, settings)


class News(NamedTuple):
    """
    What the client was told last of the topics that it reads; nobody is asked.

    ``told_ms`` moves on with each time. ``awaited`` says that the client has a reason to ask again and has no answer
    yet. ``ids`` lacks a topic that was not there, and ``partitions`` is empty for it.
    """

    told_ms: float
    awaited: bool
    ids: Mapping[str, str]
    partitions: Mapping[str, frozenset[int]]


def news(consumer: Consumer, topics: Iterable[str]) -> News:
    """The client's metadata, refreshed after ``metadata_max_age_ms`` and whenever a request meets an error."""
    cluster = consumer._cluster  # noqa: SLF001, because the public methods may block
    ids = {topic: ident for topic in topics if (ident := cluster.topic_id(topic)) is not None and ident.int}
    return News(
        told_ms=cluster._last_successful_refresh_ms,  # noqa: SLF001, because see above
        awaited=cluster.need_update,
        ids={topic: str(ident) for topic, ident in ids.items()},
        partitions={topic: frozenset(cluster.partitions_for_topic(topic) or ()) for topic in topics},
    )


def seek_after(consumer: Consumer, tp: TopicPartition, offset: int, leader_epoch: int) -> None:
    """Seek to where a message of this leader epoch was the last one read; the client then checks that it still is."""
    consumer._subscription.seek(tp, OffsetAndMetadata(offset, "", leader_epoch))  # noqa: SLF001, because the public method takes no epoch


@contextmanager
def admin(source: Source) -> Generator[Admin, None, None]:
    """An admin client for the length of the block."""
    client = _open(KafkaAdminClient, admin_settings(source))
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):
            client.close()


def close_consumer(consumer: Consumer) -> None:
    """Close it. Never raises: there is nothing in it that must be saved."""
    with contextlib.suppress(Exception):
        consumer.close(autocommit=False, timeout_ms=int(1000 * CLOSE_TIMEOUT_S))


def close_producer(producer: Producer) -> None:
    """
    Close it without waiting for what is still unsent. Never raises.

    ``close`` begins with a flush, which raises when something is unsent and leaves the sender thread at work, so that
    one is stopped first. What was not committed is aborted by the broker.
    """
    with contextlib.suppress(Exception):
        producer._sender.force_close()  # noqa: SLF001, because close() does not get there
    with contextlib.suppress(Exception):
        producer.close(timeout=0)


def _mend_resume(consumer: Consumer) -> None:
    """
    Let a resumed partition be read again.

    What was fetched of a paused partition is parked, and taken up again when the slot for the records in hand is
    ``None``. kafka-python 3.0.12 leaves a drained, empty object there instead, and the partition never moves again.
    """
    fetcher = consumer._fetcher  # noqa: SLF001, because nothing public reaches the slot
    take = fetcher.fetched_records

    def fetched_records(*args: object, **kwargs: object) -> object:
        if not fetcher._next_partition_records:  # noqa: SLF001, because see above
            fetcher._next_partition_records = None  # noqa: SLF001, because see above
        return take(*args, **kwargs)

    fetcher.fetched_records = fetched_records


class _Lenient(bytes):
    """Bytes whose slices decode whatever they hold: what is not UTF-8 is escaped."""

    __slots__ = ()

    def __getitem__(self, at: Any) -> Any:  # noqa: ANN401, because it is an index or a slice
        found = super().__getitem__(at)
        return _Lenient(found) if isinstance(found, bytes) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


def _mend_header_names(batch: Any) -> None:  # noqa: ANN401, because see above
    """
    Let a header's name be any bytes.

    Kafka says that it is text, and no broker checks it. kafka-python 3.0.12 raises in the middle of the batch, which
    then cannot be told from a damaged one, and is met again at every start.
    """
    strict = batch._read_msg  # noqa: SLF001, because nothing public reads one record

    def read_msg(self: Any) -> Any:  # noqa: ANN401, because see above
        try:
            return strict(self)
        except UnicodeDecodeError:
            # Where the record begins is still known: the position moves at a record's end.
            self._buffer = _Lenient(self._buffer)
            return strict(self)

    batch._read_msg = read_msg  # noqa: SLF001, because see above


_mend_header_names(DefaultRecordBatch)


def _open(kind: Callable[..., Any], settings: Mapping[str, Any]) -> Any:  # noqa: ANN401, because see above
    quieten()
    with explained("connecting"):
        try:
            return kind(**settings)
        except kafka_errors.KafkaTimeoutError as error:
            # The preflight says why; this is for a broker that went away since.
            raise Unavailable(f"none of {', '.join(settings['bootstrap_servers'])} answers") from error
