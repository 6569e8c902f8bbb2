"""Batches as a broker sends them, without one: what is in them, what cannot be unpacked, and what it may cost."""

import gzip
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import codec as codecs
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.memory_records import MemoryRecords
from kafka.record.util import calc_crc32c
from kafka.structs import TopicPartition

from streamlstm.cli.reverting import parse_range
from streamlstm.errors import DataError
from streamlstm.records.batch import Headers, Unread
from streamlstm.transport.kafka.batches import read_batches
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.unpack import CannotUnpack, unpack

TP = TopicPartition("in", 3)
LIMIT = 1 << 20
ENCODE: dict[int, Callable[[bytes], bytes]] = {
    1: gzip.compress,
    2: codecs.snappy_encode,
    3: codecs.lz4_encode,
    4: codecs.zstd_encode,
}
HEADER = struct.Struct(">qiibIhiqqqhii")


def batch(
    values: Sequence[bytes | None], *, base: int = 100, codec: int = 0, epoch: int = 7, pid: int = -1
) -> bytearray:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=codec,
        is_transactional=pid >= 0,
        producer_id=pid,
        producer_epoch=0 if pid >= 0 else -1,
        base_sequence=0 if pid >= 0 else -1,
        batch_size=1 << 24,
    )
    for i, value in enumerate(values):
        builder.append(i, timestamp=1000 + i, key=b"k%d" % i, value=value, headers=[("h", b"x"), ("n", None)])
    built = bytearray(builder.build())
    struct.pack_into(">q", built, 0, base)
    struct.pack_into(">i", built, 12, epoch)
    return built


def packed(payload: bytes, attributes: int, *, records: int = 5, base: int = 100, pid: int = -1) -> bytearray:
    """A batch whose checksum is right, whatever its payload is."""
    length = HEADER.size - 12 + len(payload)
    header = HEADER.pack(base, length, 7, 2, 0, attributes, records - 1, 1000, 1004, pid, -1, -1, records)
    built = bytearray(header + payload)
    struct.pack_into(">I", built, 17, calc_crc32c(memoryview(built)[21:]))
    return built


def marker(base: int, pid: int, *, abort: bool) -> bytearray:
    """The control batch that ends a transaction."""
    key = struct.pack(">hh", 0, 0 if abort else 1)
    record = bytes([0, 0, 0, 2 * len(key)]) + key + bytes([1, 0])
    return packed(bytes([2 * len(record)]) + record, 0x30, records=1, base=base, pid=pid)


class Row(NamedTuple):
    """One record, as it came out; ``timestamp`` is in ms."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    leader_epoch: int
    unread: Unread | None


def read(
    data: bytes, *, start: int = 0, excluded: range = range(0), limit: int = LIMIT, aborted: Sequence[Any] = ()
) -> tuple[list[Row], int]:
    """The records, and where reading goes on."""
    fetcher: Any = SimpleNamespace()
    read_batches(
        SimpleNamespace(_fetcher=fetcher), limit, lambda _, first, last: first in excluded and last in excluded
    )
    part = fetcher.PartitionRecords(
        start,
        TP,
        MemoryRecords(data),
        isolation_level=IsolationLevel.READ_COMMITTED,
        aborted_transactions=aborted,
    )
    rows: list[Row] = []
    while part:
        for some in part.take(None):
            times_ms = (some.broker_ns // 1_000_000).tolist()
            headers = some.headers or [[]] * len(some)
            rest = (some.leader_epoch, some.unread)
            rows += [
                Row(*row, *rest)
                for row in zip(some.offset.tolist(), times_ms, some.key, some.value, headers, strict=True)
            ]
    return rows, part.next_fetch_offset


@pytest.mark.parametrize("codec", range(5))
def test_records_come_out_as_they_went_in(codec: int) -> None:
    records, position = read(batch([b"a", None, b"c"], codec=codec) + batch([b"d"], base=110, codec=codec))
    assert [(r.offset, r.timestamp, r.key, r.value) for r in records] == [
        (100, 1000, b"k0", b"a"),
        (101, 1001, b"k1", None),
        (102, 1002, b"k2", b"c"),
        (110, 1000, b"k0", b"d"),
    ]
    assert {r.leader_epoch for r in records} == {7}
    assert records[0].headers == [("h", b"x"), ("n", b"")]
    assert not any(r.unread for r in records)
    assert position == 111


def test_reading_may_begin_in_the_middle_of_a_batch() -> None:
    records, _ = read(batch([b"a", b"b", b"c"], codec=3), start=101)
    assert [r.value for r in records] == [b"b", b"c"]


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_batch_that_unpacks_to_more_than_the_limit_stands_for_all_its_offsets(codec: int) -> None:
    bomb = packed(ENCODE[codec](bytes(LIMIT + 1)), codec)
    (good, one, after), position = read(batch([b"a"], base=90) + bomb + batch([b"z"], base=105))
    assert (good.value, after.value, position) == (b"a", b"z", 106)
    assert one[:4] == (104, 1004, None, None)
    assert one.unread is not None
    assert one.unread[:3] == (100, 104, 5)
    assert str(LIMIT) in one.unread.why or "left of the limit" in one.unread.why


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_batch_of_just_the_limit_is_read(codec: int) -> None:
    assert len(unpack(codec, ENCODE[codec](bytes(LIMIT)), LIMIT)) == LIMIT
    with pytest.raises(CannotUnpack, match=r"limit|more than"):
        unpack(codec, ENCODE[codec](bytes(LIMIT)), LIMIT - 1)


def test_a_batch_of_an_unknown_codec_stands_for_all_its_offsets() -> None:
    ((_, _, _, _, _, _, unread),), _ = read(packed(b"whatever", 6))
    assert unread == Unread(100, 104, 5, "compressed with codec 6, which is not known")


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_bytes_that_are_not_of_the_codec_stand_for_all_their_offsets(codec: int) -> None:
    (one,), position = read(packed(b"\x99 no such thing", codec))
    assert one.unread is not None
    assert "not " in one.unread.why
    assert position == 105


@pytest.mark.parametrize("codec", [1, 2, 3])
def test_bytes_that_end_too_soon_cannot_be_unpacked(codec: int) -> None:
    whole = ENCODE[codec](bytes(range(256)) * 999)
    with pytest.raises(CannotUnpack):
        unpack(codec, whole[: len(whole) // 2], LIMIT)


def test_a_batch_read_from_its_middle_stands_for_the_rest_of_it() -> None:
    (one,), _ = read(packed(b"junk", 6), start=103)
    assert one.unread is not None
    assert one.unread[:3] == (103, 104, 2)


WITHOUT = """
import sys
sys.modules["zstandard"] = None
from kafka.errors import UnsupportedCodecError
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.unpack import unpack
try:
    unpack(4, b"", 1)
except UnsupportedCodecError as error:
    print(explain(error, "reading"))
"""


def test_a_library_that_is_missing_is_no_fault_of_the_batch() -> None:
    """What becomes of a record must not hang on what is installed: this stops, and is mended here."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=60)
    assert "install zstandard" in done.stdout


def test_a_wrong_checksum_stops_with_its_place_and_the_way_on() -> None:
    damaged = batch([b"abc"])
    damaged[-1] ^= 1
    records, _ = read(batch([b"a"], base=90))
    assert len(records) == 1
    with pytest.raises(DataError, match=r"in/3: the batch of offsets 100 to 100 .*checksum.*--exclude in:3:100-101"):
        read(damaged)


def test_what_the_message_says_to_exclude_lets_reading_go_on() -> None:
    damaged = packed(b"x", 0)
    damaged[-1] ^= 1
    with pytest.raises(DataError) as refused:
        read(damaged)
    told = re.search(r"checkpoint revert ID --exclude (\S+)`", str(refused.value))
    assert told is not None
    named = parse_range(told[1])
    assert (named.topic, named.partition) == TP
    source: Any = SimpleNamespace(_passed_over=[named])
    assert KafkaSource._is_passed_over(source, TP, 100, 104)
    assert not KafkaSource._is_passed_over(source, TP, 100, 105)
    records, position = read(damaged + batch([b"z"], base=105), excluded=range(named.start, named.end))
    assert ([r.value for r in records], position) == ([None, b"z"], 106)


@pytest.mark.parametrize("length", [3, 20])
def test_where_no_batch_begins_nothing_is_advised_that_would_not_help(length: int) -> None:
    torn = struct.pack(">qi", 101, length) + b"\2" * length
    with pytest.raises(DataError, match=r"^in/3: what is at offset 101 is no batch: .*; mend the log$"):
        read(batch([b"a"]) + torn, start=101)


ABORTED = [SimpleNamespace(producer_id=7, first_offset=100)]


def transactions() -> bytearray:
    """Aborted are 100 to 109, and 110 says so; committed are 111 to 113."""
    return (
        batch([b"no"] * 5, pid=7)
        + batch([b"no"] * 5, base=105, pid=7)
        + marker(110, 7, abort=True)
        + batch([b"a", b"b", b"c"], base=111, pid=7)
        + marker(114, 7, abort=False)
    )


@pytest.mark.parametrize(
    "excluded", [range(0), range(100, 111), range(100, 105), range(105, 111), range(110, 111), range(100, 110)]
)
def test_what_was_committed_after_an_aborted_transaction_that_is_passed_over_is_read(excluded: range) -> None:
    records, position = read(transactions(), excluded=excluded, aborted=ABORTED)
    assert [(r.offset, r.value) for r in records] == [(111, b"a"), (112, b"b"), (113, b"c")]
    assert position == 115


def test_a_marker_that_is_passed_over_may_be_damaged() -> None:
    data = transactions()
    at = data.index(marker(110, 7, abort=True))
    for i in range(HEADER.size, HEADER.size + 11):
        damaged = bytearray(data)
        damaged[at + i] ^= 0x7F
        records, _ = read(damaged, excluded=range(110, 111), aborted=ABORTED)
        assert [r.value for r in records] == [b"a", b"b", b"c"], i


def test_a_marker_of_a_wrong_structure_stops_with_its_place() -> None:
    with pytest.raises(DataError, match=r"offsets 100 to 100 is damaged: .*--exclude in:3:100-101"):
        read(packed(b"\x7f" * 9, 0x30, records=1, pid=7))


def test_records_of_a_wrong_structure_stop_with_their_place() -> None:
    with pytest.raises(DataError, match=r"in/3: the batch of offsets 100 to 104 is damaged"):
        read(packed(gzip.compress(b"\x7f" * 50), 1))


def test_a_message_format_that_is_too_old_stops_with_its_place() -> None:
    old = batch([b"a"])
    old[16] = 1
    with pytest.raises(DataError, match="offset 100 has the message format from before"):
        read(old)


@pytest.mark.parametrize("what", ["checksum", "codec", "bomb", "nothing"])
def test_what_is_passed_over_is_neither_checked_nor_unpacked(what: str) -> None:
    data = {
        "checksum": packed(b"x", 0),
        "codec": packed(b"x", 6),
        "bomb": packed(gzip.compress(bytes(2 * LIMIT)), 1),
        "nothing": packed(b"", 0),
    }[what]
    if what == "checksum":
        data[-1] ^= 1
    (one, after), position = read(data + batch([b"z"], base=105), excluded=range(100, 105))
    assert one.offset == 104
    assert one.unread == Unread(100, 104, 5, "excluded")
    assert (after.value, position) == (b"z", 106)


def test_a_batch_that_is_passed_over_in_part_is_read() -> None:
    records, _ = read(batch([b"a", b"b"]), excluded=range(100, 101))
    assert [r.value for r in records] == [b"a", b"b"]


def outcome(codec: int, data: bytes) -> bool:
    """Whether it ended as one of the two things it may end as."""
    try:
        return len(unpack(codec, data, 4096)) <= 4096
    except CannotUnpack as why:
        return 0 < len(str(why)) < 200


@settings(max_examples=300, deadline=None, derandomize=True)
@given(codec=st.integers(1, 7), data=st.binary(max_size=300), start=st.sampled_from([b"", b"\x82SNAPPY\0" + bytes(8)]))
def test_no_bytes_do_anything_but_unpack_or_not(codec: int, data: bytes, start: bytes) -> None:
    assert outcome(codec, start + data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(codec=st.sampled_from([1, 2, 3, 4]), at=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_one_wrong_byte_does_nothing_but_unpack_or_not(codec: int, at: int, flip: int) -> None:
    data = bytearray(ENCODE[codec](bytes(range(256)) * 8))
    data[at % len(data)] ^= flip
    assert outcome(codec, bytes(data))


def test_members_without_end_are_not_unpacked_one_by_one() -> None:
    for codec, data in ((1, gzip.compress(b"")), (3, codecs.lz4_encode(b""))):
        with pytest.raises(CannotUnpack, match="more than 64"):
            unpack(codec, data * 1000, LIMIT)
        assert unpack(codec, data * 10, LIMIT) == b""


BOMB = """
import resource, sys, zlib
from streamlstm.transport.kafka.source import KafkaSource
from streamlstm.transport.kafka.unpack import CannotUnpack, unpack
codec = int(sys.argv[1])
data = open(sys.argv[2], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    unpack(codec, data, 8 << 20)
except CannotUnpack as why:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_bomb_costs_no_more_than_the_limit_and_some_pieces(codec: int, tmp_path: Any) -> None:
    """128 MiB of zeros."""
    zeros = bytes(1 << 27)
    data = codecs.snappy_encode(zeros, xerial_compatible=False) if codec == 2 else ENCODE[codec](zeros)
    file = tmp_path / "bomb"
    file.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(codec), str(file)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) << 10 < 40 << 20
