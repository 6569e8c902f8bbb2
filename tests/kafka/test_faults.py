"""What a real broker does to a transaction, and what we make of it."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from broker import Cluster
from deployment import Deployment, coordinates, fill, outputs
from kafka.structs import OffsetAndMetadata, TopicPartition
from service import Service

from streamlstm.errors import StreamlstmError, Superseded, Temporary
from streamlstm.recovery.progress import Incarnation, Link, digest_record, encode_record
from streamlstm.recovery.standing import judge_fenced
from streamlstm.transport.interfaces import Fenced


class Interrupted:
    """A producer to which something happens when every send is done, and before the commit is asked for."""

    def __init__(self, producer: Any, happens: Callable[[], None]) -> None:
        self._producer_, self._happens = producer, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer_, name)

    def commit_transaction(self) -> None:
        self._happens()
        self._producer_.commit_transaction()


def test_a_broker_that_restarts_in_the_middle_of_a_transaction_shows_all_of_it_or_nothing(
    deploy: Callable[..., Deployment], own_broker: Cluster
) -> None:
    deployment = deploy(own_broker, deadline="30s").with_topics()
    publisher = deployment.publisher()
    for number in range(3):
        publisher.begin_session()
        before = [e.value for e in deployment.progress().read()]

        def restart() -> None:
            own_broker.do("kill")
            own_broker.do("start")

        publisher._producer = Interrupted(publisher._producer, restart)
        try:
            publisher.commit(outputs(b"step %d" % number, [b"%d a" % number, b"%d b" % number]))
            assert deployment.progress().read()[-1].value == b"step %d" % number
        except Temporary:
            publisher.begin_session()
        after = [e.value for e in deployment.progress().read()]
        assert after in (before, [*before, b"step %d" % number])
        if after == before:
            publisher.commit(outputs(b"step %d" % number, [b"%d a" % number, b"%d b" % number]))

    assert [e.value for e in deployment.progress().read()] == [b"step %d" % n for n in range(3)]
    expected = [b"%d %s" % (n, part) for n in range(3) for part in (b"a", b"b")]
    assert sorted(deployment.committed(deployment.config.forecast_topic)) == expected


def incarnation(ident: str, after: int) -> bytes:
    return encode_record(
        Incarnation(
            prev="",
            lineage="L",
            name="n",
            id=ident,
            after=after,
            checkpoint=0,
            rebased=False,
            config="",
            learning={},
            fingerprint={},
        )
    )


def test_a_transaction_that_merely_timed_out_is_told_from_one_that_was_taken_over(
    deploy: Callable[..., Deployment], cluster: Cluster
) -> None:
    deployment = deploy(cluster, deadline="1s").with_topics()
    publisher = deployment.publisher()
    publisher.begin_session()
    ours = incarnation("ours", 1)
    tip = Link(publisher.commit(outputs(ours)), digest_record(ours))
    # As long as a process that is stopped in here: the broker aborts the transaction, and says that we were fenced.
    publisher._producer = Interrupted(publisher._producer, lambda: time.sleep(13))
    try:
        with pytest.raises(StreamlstmError) as caught:
            publisher.commit(outputs(b"late", [b"late"]))
    finally:
        deployment.expired.clear()

    assert caught.value.exit_code == 75
    if isinstance(caught.value, Fenced):
        assert judge_fenced(caught.value, deployment.progress(), tip, "ours").exit_code == 75
    assert deployment.committed(deployment.config.forecast_topic) == []

    publisher.begin_session()
    publisher.commit(outputs(incarnation("theirs", 1)))
    assert isinstance(judge_fenced(Fenced("90"), deployment.progress(), tip, "ours"), Superseded)


def test_what_the_consumer_group_says_moves_nothing(deployment: Deployment, serve: Callable[..., Service]) -> None:
    """Its offsets are for lag tools: an operator who resets them, or a tool that does, costs and repeats nothing."""
    fill(deployment, 2000)
    service = serve(deployment)
    service.start()
    service.wait_ready()
    service.wait_committed(2000, 30)
    assert service.stop() == 0
    fill(deployment, 1000, first=2000)
    for offset in (0, 1_400):
        places = [TopicPartition(deployment.input, partition) for partition in (0, 1)]
        with deployment.admin() as admin:
            admin.alter_group_offsets(deployment.name, {place: OffsetAndMetadata(offset, "", -1) for place in places})
        service.start()
        service.wait_ready()
        service.wait_consumed(60)
        assert service.stop() == 0

    published = coordinates(deployment)
    assert len(published) == len(set(published)) == 3000
