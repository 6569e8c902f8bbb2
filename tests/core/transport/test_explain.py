"""What the client's exceptions mean."""

import re

import pytest
from kafka import errors as kafka_errors

from streamlstm.errors import ConfigError, DataError, NotAuthorised, StreamlstmError, Temporary
from streamlstm.transport.interfaces import Fenced
from streamlstm.transport.kafka.explain import explain


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (kafka_errors.ProducerFencedError(), Fenced),
        (kafka_errors.InvalidProducerEpochError(), Fenced),
        (kafka_errors.KafkaError("in vain", kafka_errors.ProducerFencedError()), Fenced),
        (kafka_errors.TopicAuthorizationFailedError({"t"}), NotAuthorised),
        (kafka_errors.TransactionalIdAuthorizationFailedError(), NotAuthorised),
        (kafka_errors.SaslAuthenticationFailedError("no"), NotAuthorised),
        (kafka_errors.MessageSizeTooLargeError(), DataError),
        (kafka_errors.InvalidTimestampError(), DataError),
        (kafka_errors.InvalidRecordError(), DataError),
        (kafka_errors.CorruptRecordError("crc"), DataError),
        (kafka_errors.UnsupportedCodecError("Libraries for zstd compression codec not found"), DataError),
        (kafka_errors.UnknownTopicOrPartitionError(), DataError),
        (kafka_errors.UnsupportedVersionError(), ConfigError),
        (kafka_errors.KafkaTimeoutError("late"), Temporary),
        (kafka_errors.NotEnoughReplicasError(), Temporary),
        (kafka_errors.OutOfOrderSequenceNumberError(), Temporary),
        (kafka_errors.InvalidTxnStateError(), Temporary),
        (RuntimeError("what nobody thought of"), Temporary),
    ],
)
def test_each_error_ends_the_process_as_its_kind_does(error: Exception, meaning: type[StreamlstmError]) -> None:
    explained = explain(error, "testing")
    assert type(explained) is meaning
    assert "while testing" in str(explained)
    assert "\n" not in str(explained)


def test_a_codec_that_is_missing_names_the_package() -> None:
    error = kafka_errors.UnsupportedCodecError("Libraries for snappy compression codec not found")
    assert "install python-snappy" in str(explain(error, "reading"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (kafka_errors.SaslAuthenticationFailedError("no"), "renew those in source.security"),
        (kafka_errors.TransactionalIdAuthorizationFailedError(), "grant our user WRITE on the transactional id"),
        (kafka_errors.TopicAuthorizationFailedError({"t"}), "grant our user READ on input .*{'t'}"),
        (kafka_errors.GroupAuthorizationFailedError("g"), "grant our user the right to it .*: g"),
    ],
)
def test_what_was_refused_is_told_with_what_to_do(error: Exception, told: str) -> None:
    assert re.search(told, str(explain(error, "testing")))


def test_what_is_ours_stays_as_it_is() -> None:
    ours = NotAuthorised("no")
    assert explain(ours, "testing") is ours
