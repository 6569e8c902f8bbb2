"""The source that takes turns, against a real broker."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from broker import Cluster, Scripted, wait_until
from deployment import Deployment
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import TopicPartition

from streamlstm.errors import ConfigError, DataError, LogCutBack, LogGap, Temporary, TopicChanged
from streamlstm.records.batch import Messages, Range
from streamlstm.service.replay import feed_merged
from streamlstm.transport.interfaces import Position
from streamlstm.transport.kafka.group import GroupOffsets
from streamlstm.transport.kafka.source import CUT_BYTES, KafkaSource


def numbered(count: int, mark: str = "v") -> list[bytes]:
    return [b"%s%d" % (mark.encode(), i) for i in range(count)]


def drain(source: KafkaSource, messages: int, most: int = 1000) -> list[Messages]:
    """Poll until so many messages came."""
    polled: list[Messages] = []

    def enough() -> bool:
        if (got := source.poll(most, 0.2)) is not None:
            polled.append(got)
        return sum(map(len, polled)) >= messages

    wait_until(enough, 20, f"{messages} messages came")
    return polled


def assert_same(a: Messages, b: Messages) -> None:
    assert a.cut == b.cut
    for name in ("range_index", "offset", "broker_ns"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.key, a.value, a.headers) == (b.key, b.value, b.headers)


def test_partitions_take_turns_in_every_cut(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    deployment = deploy(cluster).with_topics(partitions=3)
    for partition in range(3):
        deployment.fill(partition, numbered(300))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    assert source.poll(30, 5.0) is not None
    wait_until(
        lambda: source._fill(0.1) or all(p.records for p in source._partitions), 10, "all partitions are buffered"
    )
    for messages in drain(source, 700, most=30)[:20]:
        taken = np.bincount(messages.range_index)
        assert [r.partition for r in messages.cut] != [messages.cut[0].partition] * len(messages.cut)
        assert taken.tolist() == [10, 10, 10]


def test_each_range_starts_where_the_last_one_of_its_partition_ended(deployment: Deployment) -> None:
    deployment.fill(0, numbered(100))
    deployment.fill(1, numbered(7))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    polled = drain(source, 107, most=10)
    for partition, count in ((0, 100), (1, 7)):
        ranges = [r for m in polled for r in m.cut if r.partition == partition]
        assert ranges[0].start == 0
        assert all(before.end == after.start for before, after in pairwise(ranges))
        assert ranges[-1].end == count


def test_a_message_carries_key_value_headers_and_time(deployment: Deployment) -> None:
    producer = deployment.producer()
    producer.send(deployment.input, b"v", key=b"k", headers=[("h", b"x")], partition=0, timestamp_ms=1_700_000_000_123)
    producer.send(deployment.input, None, key=b"gone", partition=0, timestamp_ms=1_700_000_000_124).get(10)
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    (messages,) = drain(source, 2)
    assert messages.key == [b"k", b"gone"]
    assert messages.value == [b"v", None]
    assert messages.headers == [[("h", b"x")], []]
    assert messages.broker_ns.tolist() == [1_700_000_000_123_000_000, 1_700_000_000_124_000_000]
    assert messages.cut[0] == Range(deployment.input, 0, 0, 2)


def test_a_header_with_a_name_that_is_no_text_does_not_stop_the_stream(deployment: Deployment) -> None:
    """kafka-python only writes names that are text, so a short one is made invalid on its way out."""

    class Name(str):
        __slots__ = ()

        def encode(self, *_: object) -> bytes:
            return b"\xff\xfe" + str(self)[2:].encode()

    producer = deployment.producer()
    for value, name in ((b"1", "good"), (b"2", Name("..bad")), (b"3", "gut\u00e4")):
        producer.send(deployment.input, value, key=b"k", headers=[(name, b"x")], partition=0)
    producer.flush()
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    polled = drain(source, 3)
    assert [v for m in polled for v in m.value] == [b"1", b"2", b"3"]
    assert [type(v) for m in polled for v in m.value + m.key] == [bytes] * 6
    names = [name for m in polled for headers in m.headers or [] for name, _ in headers]
    assert names == ["good", r"\xff\xfebad", "gut\u00e4"]


def test_a_cut_is_bounded_by_bytes_too(deployment: Deployment) -> None:
    large = bytes(400_000)
    deployment.fill(0, [large] * 6)
    deployment.fill(1, [*numbered(5), bytes(CUT_BYTES - 500)])
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    polled = drain(source, 12)
    sizes = [sum(len(v or b"") for v in m.value) for m in polled]
    assert max(sizes) <= CUT_BYTES
    assert len(polled) < 12
    for partition, end in ((0, 6), (1, 6)):
        ranges = [r for m in polled for r in m.cut if r.partition == partition]
        assert [r.start for r in ranges] == [0, *(r.end for r in ranges[:-1])]
        assert ranges[-1].end == end


def test_recorded_cuts_are_read_back_exactly_and_polling_goes_on_after_them(deployment: Deployment) -> None:
    for partition in (0, 1):
        deployment.fill(partition, numbered(250), key=b"k", headers=[("h", b"x")])
    live = deployment.source()
    live.seek(live.resolve_start("earliest"))
    polled = drain(live, 500, most=33)
    again = deployment.source()
    again.seek(again.resolve_start("earliest"))
    for messages in polled[:-2]:
        assert_same(again.read(messages.cut, 10), messages)
    rest = drain(again, sum(map(len, polled[-2:])))
    assert sum(len(m) for m in rest) == sum(map(len, polled[-2:]))
    assert [r.start for r in rest[0].cut if r.partition == 0] in (
        [],
        [max(r.end for m in polled[:-2] for r in m.cut if r.partition == 0)],
    )


def test_cuts_can_be_read_in_any_order(deployment: Deployment) -> None:
    deployment.fill(0, numbered(60))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    cuts = [(Range(deployment.input, 0, start, start + 20),) for start in (40, 0, 20)]
    values = [source.read(cut, 10).value for cut in cuts]
    assert values == [numbered(60)[40:], numbered(60)[:20], numbered(60)[20:40]]


def test_aborted_transactions_and_markers_are_consumed_but_not_seen(deployment: Deployment) -> None:
    producer = deployment.producer(transactional_id=f"{deployment.name}-writer")
    producer.init_transactions()
    for attempt, commit in enumerate((True, False, True, False)):
        producer.begin_transaction()
        for i in range(5):
            producer.send(deployment.input, b"%d.%d" % (attempt, i), partition=0).get(10)
        (producer.commit_transaction if commit else producer.abort_transaction)()
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    end = source.end_offsets()
    assert end[0].next_offset == 24  # 20 records and 4 markers
    seen: list[Messages] = []

    def at_the_end() -> bool:
        if (got := source.poll(3, 0.2)) is not None:
            seen.append(got)
        return any(r.end == 24 for m in seen for r in m.cut)

    wait_until(at_the_end, 20, "the last marker is consumed too")
    assert [v for m in seen for v in m.value] == [b"%d.%d" % (a, i) for a in (0, 2) for i in range(5)]
    ranges = [r for m in seen for r in m.cut]
    assert all(before.end == after.start for before, after in pairwise(ranges))
    assert source.lag()[deployment.input, 0] == 0
    again = deployment.source()
    again.seek(again.resolve_start("earliest"))
    for messages in seen:
        assert_same(again.read(messages.cut, 10), messages)


def test_lag_counts_what_is_buffered_and_reaches_zero(deployment: Deployment) -> None:
    deployment.fill(0, numbered(100))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    first = source.poll(40, 5.0)
    assert first is not None
    assert source.lag()[deployment.input, 0] == 100 - len(first)
    drain(source, 100 - len(first))
    assert source.lag()[deployment.input, 0] == 0


def test_nothing_new_is_none(deployment: Deployment) -> None:
    source = deployment.source()
    source.seek(source.resolve_start("latest"))
    assert source.poll(10, 0.1) is None


def test_memory_is_bounded_however_much_waits(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    deployment = deploy(cluster, poll={"max_records": 50}).with_topics(partitions=2)
    deployment.fill(0, numbered(5000))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    held = []
    total = 0
    while total < 5000:
        got = source.poll(50, 5.0)
        assert got is not None
        total += len(got)
        held.append(sum(len(p.records) for p in source._partitions))
    assert max(held) <= 100
    assert total == 5000


def test_a_start_is_resolved_for_every_partition_in_order(deployment: Deployment) -> None:
    producer = deployment.producer()
    for i in range(10):
        producer.send(deployment.input, b"v", partition=0, timestamp_ms=1_700_000_000_000 + 1000 * i)
    producer.flush()
    source = deployment.source()
    at = lambda *offsets: [Position(deployment.input, p, offset) for p, offset in enumerate(offsets)]  # noqa: E731, because it reads better here
    assert source.resolve_start("earliest") == at(0, 0)
    assert source.resolve_start("latest") == at(10, 0)
    assert source.resolve_start("timestamp:2023-11-14T22:13:24.500Z") == at(5, 0)
    assert source.resolve_start("timestamp:2043-01-01T00:00:00Z") == at(10, 0)


def test_a_position_that_retention_deleted_is_a_gap_with_its_offsets(deployment: Deployment) -> None:
    deployment.fill(0, numbered(100))
    with deployment.admin() as admin:
        admin.delete_records({TopicPartition(deployment.input, 0): 50})
    source = deployment.source()
    source.seek([Position(deployment.input, 0, 10), Position(deployment.input, 1, 0)])
    with pytest.raises(LogGap, match=rf"{deployment.input}/0: offset 10 .*50 to 100.*deleted 40") as caught:
        drain(source, 1000)
    assert caught.value.gaps == ((deployment.input, 0, 10, 50),)


def test_a_recorded_cut_that_retention_deleted_is_a_gap(deployment: Deployment) -> None:
    deployment.fill(0, numbered(100))
    with deployment.admin() as admin:
        admin.delete_records({TopicPartition(deployment.input, 0): 50})
    source = deployment.source()
    with pytest.raises(LogGap, match=r"offset 30 .*50 to 100") as caught:
        source.read((Range(deployment.input, 0, 30, 60),), 10)
    assert caught.value.gaps == ((deployment.input, 0, 30, 50),)


def test_a_log_whose_beginning_is_deleted_under_the_reader_goes_on_behind_the_gap(deployment: Deployment) -> None:
    """What ``source.on_gap: skip`` does with it."""
    deployment.fill(0, numbered(100))
    source = deployment.source()
    with deployment.admin() as admin:
        admin.delete_records({TopicPartition(deployment.input, 0): 50})
    source.seek([Position(deployment.input, 0, 10), Position(deployment.input, 1, 0)])
    with pytest.raises(LogGap) as caught:
        drain(source, 1000)
    ((topic, partition, _, end),) = caught.value.gaps
    source.seek([Position(topic, partition, end), Position(deployment.input, 1, 0)])
    assert [v for m in drain(source, 50) for v in m.value] == numbered(100)[50:]


def test_a_position_beyond_the_end_is_a_log_that_was_cut_back(deployment: Deployment) -> None:
    deployment.fill(0, numbered(10))
    source = deployment.source()
    source.seek([Position(deployment.input, 0, 99), Position(deployment.input, 1, 0)])
    with pytest.raises(LogCutBack, match=r"read up to offset 99, .* cut back at offset 10") as caught:
        drain(source, 1000)
    assert caught.value.ends == {(deployment.input, 0): 10}


def test_a_recorded_cut_beyond_the_end_is_a_log_that_was_cut_back(deployment: Deployment) -> None:
    deployment.fill(0, numbered(10))
    source = deployment.source()
    with pytest.raises(LogCutBack, match=r"offset 20.*at offset 10"):
        source.read((Range(deployment.input, 0, 5, 20),), 1.0)


def test_a_topic_made_anew_has_another_id(deployment: Deployment) -> None:
    source = deployment.source()
    before = source.topic_ids()
    with deployment.admin() as admin:
        admin.delete_topics([deployment.input])
        gone = lambda: admin.describe_topics([deployment.input])[0]["error_code"] != 0  # noqa: E731, because it reads better here
        wait_until(gone, 10, "the topic is gone")
    deployment.make_topic(deployment.input, 2)
    assert source.topic_ids().keys() == before.keys()
    assert source.topic_ids() != before


def remade(deployment: Deployment, records: Sequence[bytes]) -> None:
    """The input deleted, made again and filled."""
    with deployment.admin() as admin:
        admin.delete_topics([deployment.input])
        gone = lambda: admin.describe_topics([deployment.input])[0]["error_code"] != 0  # noqa: E731, because it reads better here
        wait_until(gone, 10, "the topic is gone")
    deployment.make_topic(deployment.input, 2)
    deployment.fill(0, records)


@pytest.mark.parametrize("records", [5, 10, 25])
def test_a_topic_made_anew_between_two_polls_is_found_out_before_any_of_it_is_read(
    deployment: Deployment, records: int
) -> None:
    """Shorter than what was read, just as long, or longer."""
    deployment.fill(0, numbered(10))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    drain(source, 10)
    remade(deployment, numbered(records, "w"))
    seen: list[Messages] = []
    with pytest.raises(TopicChanged, match=rf"{deployment.input}: re-created while it was read .*run --fresh"):
        wait_until(lambda: bool(seen.extend(filter(None, [source.poll(10, 0.1)]))), 20, "it is found out")
    assert sum(map(len, seen)) == 0


def test_a_topic_that_is_deleted_is_gone(deployment: Deployment) -> None:
    deployment.fill(0, numbered(10))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    drain(source, 10)
    with deployment.admin() as admin:
        admin.delete_topics([deployment.input])
    with pytest.raises(TopicChanged, match=rf"{deployment.input}: deleted while it was read"):
        wait_until(lambda: source.poll(10, 0.1) is not None, 30, "it is found out")


def test_a_log_cut_back_while_we_were_away_is_found_out_by_the_leader_epoch(
    deploy: Callable[..., Deployment], own_broker: Cluster
) -> None:
    """It has other records, and more than before: offsets alone say nothing."""
    assert isinstance(own_broker, Scripted)
    deployment = deploy(own_broker).with_topics(partitions=1)
    deployment.fill(0, numbered(20))
    deployment.fill(0, numbered(30))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    drain(source, 50)
    known = source.leader_epochs()
    assert known.keys() == {(deployment.input, 0)}
    source.close()

    own_broker.do("stop")
    data = own_broker.directory / "data-1"
    (segment,) = data.glob(f"{deployment.input}-0/*.log")
    whole = segment.read_bytes()
    first = 12 + int.from_bytes(whole[8:12], "big")
    while int.from_bytes(whole[first : first + 8], "big") < 20:
        first += 12 + int.from_bytes(whole[first + 8 : first + 12], "big")
    segment.write_bytes(whole[:first])
    for stale in (*segment.parent.glob("*.*index"), *segment.parent.glob("*.snapshot"), *data.glob(".kafka_clean*")):
        stale.unlink()
    own_broker.do("start")

    deployment.fill(0, numbered(40, "w"))
    again = deployment.source()
    assert again.end_offsets()[0].next_offset == 60
    again.seek([Position(deployment.input, 0, 50)], known)
    with pytest.raises(LogCutBack, match=r"read up to offset 50, .* cut back at offset 20") as caught:
        drain(again, 10)
    assert caught.value.ends == {(deployment.input, 0): 20}

    # Before the point where the two logs part, all is well.
    again.seek([Position(deployment.input, 0, 20)], known)
    assert [v for m in drain(again, 40) for v in m.value] == numbered(40, "w")


def test_compacted_transactional_and_aborted_input_is_read_by_position(
    deploy: Callable[..., Deployment], cluster: Cluster
) -> None:
    """Half of the keys written over, and every other transaction aborted: lag, positions and recorded cuts hold."""
    deployment = deploy(cluster).with_topics(
        partitions=1, min_cleanable_dirty_ratio="0.01", segment_ms="100", max_compaction_lag_ms="200"
    )
    producer = deployment.producer(transactional_id=f"{deployment.name}-writer")
    producer.init_transactions()
    for attempt in range(20):
        producer.begin_transaction()
        for i in range(5):
            producer.send(deployment.input, b"%d.%d" % (attempt, i), key=b"k%d" % (i % 3), partition=0).get(10)
        (producer.abort_transaction if attempt % 2 else producer.commit_transaction)()
    live = deployment.source()
    live.seek(live.resolve_start("earliest"))
    end = live.end_offsets()[0].next_offset
    assert end == 120
    before: list[Messages] = []

    def at_the_end(source: KafkaSource, seen: list[Messages]) -> bool:
        if (got := source.poll(7, 0.2)) is not None:
            seen.append(got)
        return any(r.end >= end for m in seen for r in m.cut)

    wait_until(lambda: at_the_end(live, before), 20, "the last marker is consumed too")
    assert [v for m in before for v in m.value] == [b"%d.%d" % (a, i) for a in range(0, 20, 2) for i in range(5)]
    assert live.lag()[deployment.input, 0] == 0

    with deployment.admin() as admin:
        policy = ConfigResource(ConfigResourceType.TOPIC, deployment.input, {"cleanup.policy": "compact"})
        admin.alter_configs([policy])

    def compacted() -> bool:
        deployment.fill(0, [b"new"], key=b"other")
        source = deployment.source()
        source.seek(source.resolve_start("earliest"))
        seen: list[Messages] = []
        wait_until(lambda: at_the_end(source, seen), 20, "the end is reached over the holes")
        ranges = [r for m in seen for r in m.cut]
        assert ranges[0].start == 0
        assert all(left.end == right.start for left, right in pairwise(ranges))
        source.close()
        return sum(map(len, seen)) < 40

    wait_until(compacted, 60, "the log is compacted")
    # The same cuts again: fewer records, no hole unread, and reading goes on behind them.
    again = deployment.source()
    again.seek(again.resolve_start("earliest"))
    replayed = [again.read(m.cut, 10) for m in before]
    assert sum(map(len, replayed)) < sum(map(len, before))
    kept = {offset for m in replayed for offset in m.offset.tolist()}
    assert kept <= {offset for m in before for offset in m.offset.tolist()}


def test_a_bomb_comes_as_one_message_for_its_offsets(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    """72 MiB in a batch that the topic takes."""
    deployment = deploy(cluster).with_topics(partitions=1)
    producer = deployment.producer(
        compression_type="gzip", max_request_size=1 << 28, batch_size=1 << 28, linger_ms=5000
    )
    deployment.fill(0, numbered(3))
    bomb = [producer.send(deployment.input, bytes(1 << 23), partition=0) for _ in range(9)]
    producer.flush()
    offsets = [future.get(60).offset for future in bomb]
    deployment.fill(0, numbered(3, "w"))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    seen = drain(source, 7)
    values = [v for m in seen for v in m.value]
    assert values == [*numbered(3), None, *numbered(3, "w")]
    unread = [one for m in seen for one in m.unread.values()]
    assert [one[:3] for one in unread] == [(offsets[0], offsets[-1], 9)]
    assert "of gzip hold more than 67108864 bytes" in unread[0].why
    ranges = [r for m in seen for r in m.cut]
    assert all(left.end == right.start for left, right in pairwise(ranges))
    assert ranges[-1].end == 15


def with_a_bomb(deploy: Callable[..., Deployment], cluster: Cluster, before: int, **poll: int) -> Deployment:
    """So many messages, a batch of 10 offsets that is too large once unpacked, and 200 messages."""
    deployment = deploy(
        cluster, poll=poll, decode={"max_bytes": 1 << 18, "max_batch_bytes": 1 << 20}
    ).with_topics(partitions=1)  # fmt: skip
    deployment.fill(0, numbered(before))
    producer = deployment.producer(
        compression_type="gzip", max_request_size=1 << 28, batch_size=1 << 28, linger_ms=5000
    )
    bomb = [producer.send(deployment.input, bytes(1 << 18), partition=0) for _ in range(10)]
    producer.flush()
    assert bomb[-1].get(60).offset == before + 9
    deployment.fill(0, numbered(200, "w"))
    return deployment


def test_a_cut_that_ends_with_a_bomb_ends_behind_it(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    """The client hands over no more than it is asked for: its position must be right when the bomb was the last."""
    source = with_a_bomb(deploy, cluster, 3, max_records=4).source()
    source.seek(source.resolve_start("earliest"))
    seen = drain(source, 12, most=4)
    assert (seen[0].offset.tolist(), seen[0].cut[0].end) == ([0, 1, 2, 12], 13)
    for m in seen:
        again = source.read(m.cut, 10)
        assert (again.offset.tolist(), again.unread) == (m.offset.tolist(), m.unread)


def test_a_bomb_that_lies_in_two_reads_of_a_merged_replay_counts_once_and_wholly(
    deploy: Callable[..., Deployment], cluster: Cluster
) -> None:
    """A partition is read 2000 offsets at a time."""
    source = with_a_bomb(deploy, cluster, 1995).source()
    starts, ends = source.beginning_offsets(), source.end_offsets()
    source.seek(starts)
    seen = [fed.messages for fed in feed_merged(source, starts, ends, 10, 500)]
    assert [one[:3] for m in seen for one in m.unread.values()] == [(1995, 2004, 10)]
    assert sum(map(len, seen)) == 1995 + 1 + 200
    ranges = [r for m in seen for r in m.cut]
    assert all(left.end == right.start for left, right in pairwise(ranges))
    assert (ranges[0].start, ranges[-1].end) == (0, 2205)


@pytest.mark.parametrize("stamp", [0, 1, 2**53, 2**63 - 1])
def test_a_timestamp_may_be_any_number(deploy: Callable[..., Deployment], cluster: Cluster, stamp: int) -> None:
    """One that is no time of this world counts as none."""
    deployment = deploy(cluster).with_topics(
        partitions=1, message_timestamp_after_max_ms=str(2**63 - 1), message_timestamp_before_max_ms=str(2**63 - 1)
    )
    deployment.fill(0, [b"a", b"b"], timestamp_ms=stamp)
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    (messages,) = drain(source, 2)
    assert messages.broker_ns.tolist() == [stamp * 10**6 if stamp < 2**43 else -1] * 2


def test_a_topic_that_does_not_exist_is_named(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    deployment = deploy(cluster)
    with pytest.raises(ConfigError, match=rf"{deployment.input}: no such topic"):
        deployment.source()


def test_positions_of_other_partitions_are_refused(deployment: Deployment) -> None:
    source = deployment.source()
    with pytest.raises(TopicChanged, match=rf"new: {deployment.input}/1; gone: {deployment.input}/2"):
        source.seek([Position(deployment.input, 0, 0), Position(deployment.input, 2, 0)])


def test_a_partition_that_is_added_meanwhile_is_noticed(deploy: Callable[..., Deployment], cluster: Cluster) -> None:
    deployment = deploy(cluster, properties={"metadata_max_age_ms": 300}).with_topics()
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    assert source.poll(10, 0.1) is None
    with deployment.admin() as admin:
        admin.create_partitions({deployment.input: 4})
    new = f"new: {deployment.input}/2, {deployment.input}/3"
    with pytest.raises(TopicChanged, match=new):
        wait_until(lambda: source.poll(10, 0.1) is not None, 15, "the new partitions are noticed")


def test_group_offsets_are_there_for_lag_tools(deployment: Deployment) -> None:
    source = deployment.source()
    for offset in (1, 2, 3):
        source.commit_group_offsets([Position(deployment.input, 0, offset)])
    with deployment.admin() as admin:

        def is_there() -> bool:
            with suppress(kafka_errors.RetriableError):  # a young cluster has no coordinator yet
                offsets = admin.list_group_offsets(deployment.name)[deployment.name]
                return [o.offset for o in offsets.values()] == [3]
            return False

        wait_until(is_there, 20, "the newest position is committed")


def test_group_offsets_survive_what_nobody_thought_of(deployment: Deployment) -> None:
    class Surprised(GroupOffsets):
        surprises = 1

        def _commit(self, client: object, positions: Sequence[Position]) -> None:
            if self.surprises:
                self.surprises -= 1
                raise RuntimeError("what nobody thought of")
            super()._commit(client, positions)

    group = Surprised(deployment.config)
    group.offer([Position(deployment.input, 0, 1)])
    wait_until(lambda: group._committed != (), 20, "it is committed after all")
    group.close()


def test_the_last_group_offsets_are_committed_on_the_way_out(deployment: Deployment) -> None:
    source = deployment.source()
    source.commit_group_offsets([Position(deployment.input, 0, 1)])
    wait_until(lambda: source._group._committed != (), 20, "the first is committed")
    source.commit_group_offsets([Position(deployment.input, 0, 2)])
    source.close()
    with deployment.admin() as admin:
        offsets = admin.list_group_offsets(deployment.name)[deployment.name]
    assert offsets[TopicPartition(deployment.input, 0)].offset == 2


def test_a_broker_that_goes_away_and_comes_back_is_waited_for(
    deploy: Callable[..., Deployment], own_broker: Cluster
) -> None:
    deployment = deploy(own_broker).with_topics()
    deployment.fill(0, numbered(10))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    drain(source, 10)
    own_broker.do("kill")
    assert source.poll(10, 0.3) is None
    assert source.poll(10, 0.3) is None
    own_broker.do("start")
    deployment.fill(0, numbered(5, "w"))
    values: list[bytes | None] = []

    def all_came() -> bool:
        # As the service does: while it is away, or slow to come back, the source may say so at any poll.
        with suppress(Temporary):
            values.extend(v for m in [source.poll(1000, 0.2)] if m is not None for v in m.value)
        return len(values) >= 5

    wait_until(all_came, 20, "the records written since came")
    assert values == numbered(5, "w")


def test_a_broker_that_is_gone_is_noticed_whatever_waits_in_memory(
    deploy: Callable[..., Deployment], own_broker: Cluster
) -> None:
    deployment = deploy(own_broker).with_topics()
    deployment.fill(0, numbered(500))
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    assert source.poll(10, 5.0) is not None
    own_broker.do("kill")

    def noticed() -> bool:
        try:
            source.poll(1, 0.1)
        except Temporary:
            return True
        return False

    wait_until(noticed, 40, "the broker is missed")


def test_a_damaged_batch_stops_the_stream(deploy: Callable[..., Deployment], own_broker: Cluster) -> None:
    """A wrong checksum is no bad record to be put aside: nobody knows what was there."""
    assert isinstance(own_broker, Scripted)
    deployment = deploy(own_broker).with_topics(partitions=1)
    deployment.fill(0, numbered(50))
    own_broker.do("stop")
    (segment,) = own_broker.directory.glob(f"data-1/{deployment.input}-0/*.log")
    damaged = bytearray(segment.read_bytes())
    damaged[damaged.rindex(b"v49") + 1] ^= 1
    segment.write_bytes(damaged)
    own_broker.do("start")
    source = deployment.source()
    source.seek(source.resolve_start("earliest"))
    with pytest.raises(DataError, match="damaged"):
        drain(source, 50)
