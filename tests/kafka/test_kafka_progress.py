"""The progress log, against a real broker."""

import threading
from typing import Any

import pytest
from broker import wait_until
from deployment import Deployment, outputs

from streamlstm.transport.interfaces import ProgressEntry
from streamlstm.transport.kafka import progress
from streamlstm.transport.kafka.clients import Consumer


def test_an_empty_log_is_empty(deployment: Deployment) -> None:
    assert deployment.progress().read() == []


def test_what_was_aborted_was_never_there(deployment: Deployment) -> None:
    producer = deployment.producer(transactional_id=f"{deployment.name}-0")
    producer.init_transactions()
    for value, commit in ((b"1", True), (b"torn", False), (b"2", True)):
        producer.begin_transaction()
        producer.send(deployment.config.progress_topic, value, partition=0).get(10)
        (producer.commit_transaction if commit else producer.abort_transaction)()
    assert [e.value for e in deployment.progress().read()] == [b"1", b"2"]


def test_a_transaction_that_is_open_is_waited_for(deployment: Deployment) -> None:
    producer = deployment.producer(transactional_id=f"{deployment.name}-0")
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(deployment.config.progress_topic, b"in the making", partition=0).get(10)
    found: list[list[ProgressEntry]] = []
    thread = threading.Thread(target=lambda: found.append(deployment.progress().read()))
    thread.start()
    thread.join(1.5)
    assert thread.is_alive(), "it ended before the transaction did"
    producer.commit_transaction()
    wait_until(lambda: bool(found), 10, "it ends with the transaction")
    thread.join()
    assert [e.value for e in found[0]] == [b"in the making"]


def test_trimming_forgets_what_is_older(deployment: Deployment) -> None:
    publisher = deployment.publisher()
    publisher.begin_session()
    offsets = [publisher.commit(outputs(b"%d" % i)) for i in range(4)]
    log = deployment.progress()
    log.trim(offsets[2])
    assert [e.value for e in log.read()] == [b"2", b"3"]
    assert [e.value for e in log.read(offsets[3])] == [b"3"]


def test_what_is_trimmed_while_it_is_read_is_not_there(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the service, while a replay reads beside it: between the question where the log begins and the first fetch."""
    publisher = deployment.publisher()
    publisher.begin_session()
    offsets = [publisher.commit(outputs(b"%d" % i)) for i in range(4)]
    log, opened = deployment.progress(), progress.open_consumer

    def slow(*args: object, **settings: object) -> Consumer:
        consumer = opened(*args, **settings)
        seek = consumer.seek

        def trimmed_first(*where: object) -> None:
            log.trim(offsets[2])
            seek(*where)

        consumer.seek = trimmed_first
        return consumer

    monkeypatch.setattr(progress, "open_consumer", slow)
    assert [e.value for e in log.read()] == [b"2", b"3"]
    assert [e.value for e in log.read(offsets[1])] == [b"2", b"3"]


def test_a_log_of_which_all_is_trimmed_while_it_is_read_goes_on_from_there(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that was suspended for long: what it knew to be the end is older than the beginning now."""
    publisher = deployment.publisher()
    publisher.begin_session()
    offsets = [publisher.commit(outputs(b"%d" % i)) for i in range(6)]
    log, opened = deployment.progress(), progress.open_consumer

    def suspended(*args: object, **settings: Any) -> Consumer:
        consumer = opened(*args, **settings, max_partition_fetch_bytes=1)  # one transaction at a time
        poll, seek = consumer.poll, consumer.seek
        empty = 0

        def poll_then_sleep(**how: Any) -> object:
            nonlocal empty
            if empty:
                empty -= 1
                return {}
            polled = poll(**how)
            if polled and len(offsets) == 6:
                offsets.extend(publisher.commit(outputs(b"%d" % i)) for i in range(6, 9))
                log.trim(offsets[7])
            return polled

        def seek_and_wait(*where: Any) -> None:
            nonlocal empty
            empty = 1  # the broker takes longer to answer than a poll waits
            seek(*where)

        consumer.poll, consumer.seek = poll_then_sleep, seek_and_wait
        return consumer

    monkeypatch.setattr(progress, "open_consumer", suspended)
    assert [e.value for e in log.read()] == [b"7", b"8"]


def test_a_trim_that_is_refused_is_told_once_and_raises_nothing(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    log = deployment.progress()
    log.trim(99)
    log.trim(99)
    told = [r for r in caplog.records if "not trimmed below offset 99" in r.getMessage() and r.levelname == "WARNING"]
    assert len(told) == 1


def test_a_log_that_ends_before_has_nothing_there(deployment: Deployment) -> None:
    """As one has that was made anew since a checkpoint stood on it."""
    publisher = deployment.publisher()
    publisher.begin_session()
    last = publisher.commit(outputs(b"1"))
    assert deployment.progress().read(last + 100) == []
