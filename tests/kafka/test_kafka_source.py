"""The source that takes turns, against a real broker."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from broker import Cluster, Scripted, wait_until
from deployment import Deployment
from kafka import errors as kafka_errors
from kafka.structs import TopicPartition

from streamlstm.errors import ConfigError, DataError, LogGap, TopicChanged
from streamlstm.records.batch import Messages, Range
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
    with pytest.raises(LogGap, match=rf"{deployment.input}/0: offset 10 .*50 to 100.*deleted 40"):
        drain(source, 1000)


def test_a_recorded_cut_that_retention_deleted_is_a_gap(deployment: Deployment) -> None:
    deployment.fill(0, numbered(100))
    with deployment.admin() as admin:
        admin.delete_records({TopicPartition(deployment.input, 0): 50})
    source = deployment.source()
    with pytest.raises(LogGap, match=r"offset 30 .*50 to 100"):
        source.read((Range(deployment.input, 0, 30, 60),), 10)


def test_a_position_beyond_the_end_is_a_gap_too(deployment: Deployment) -> None:
    deployment.fill(0, numbered(10))
    source = deployment.source()
    source.seek([Position(deployment.input, 0, 99), Position(deployment.input, 1, 0)])
    with pytest.raises(LogGap, match=r"offset 99 .*0 to 10.*made anew"):
        drain(source, 1000)


def test_a_recorded_cut_beyond_the_end_is_a_gap(deployment: Deployment) -> None:
    deployment.fill(0, numbered(10))
    source = deployment.source()
    with pytest.raises(LogGap, match=r"offset 20 .*0 to 10"):
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
    values = [v for m in drain(source, 5) for v in m.value]
    assert values == numbered(5, "w")


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
