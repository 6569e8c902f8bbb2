"""Records read many at once are those that kafka-python reads one by one, and where it refuses, so do we."""

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from kafka import codec as codecs
from kafka.errors import CorruptRecordError
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.memory_records import MemoryRecords
from kafka.record.util import calc_crc32c, encode_varint
from kafka.structs import TopicPartition

import streamlstm.transport.kafka.clients  # noqa: F401, because it lets the name of a header be any bytes
from streamlstm.errors import DataError
from streamlstm.transport.kafka import columns
from streamlstm.transport.kafka.batches import read_batches
from streamlstm.transport.kafka.columns import FEW, Run, broker_ns

TP = TopicPartition("in", 3)
LIMIT = 1 << 24
HEADER = struct.Struct(">qiibIhiqqqhii")
ENCODE: dict[int, Callable[[bytes], bytes]] = {
    0: bytes,
    1: codecs.gzip_encode,
    2: codecs.snappy_encode,
    3: codecs.lz4_encode,
    4: codecs.zstd_encode,
}
NOW_MS = 1_790_000_000_000


class Row(NamedTuple):
    offset: int
    broker_ns: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    leader_epoch: int


def rows_of(found: Any) -> list[Row]:
    assert found.payload == [len(k or b"") + len(v or b"") for k, v in zip(found.key, found.value, strict=True)]
    assert all(type(text) is bytes for text in (*found.key, *found.value) if text is not None)
    headers = found.headers or [[]] * len(found)
    rows = zip(found.offset.tolist(), found.broker_ns.tolist(), found.key, found.value, headers, strict=True)
    return [Row(*row, found.leader_epoch) for row in rows]


def one_by_one(data: bytes) -> tuple[list[Row], bool]:
    """What kafka-python makes of it, and whether it read it to the end."""
    rows: list[Row] = []
    try:
        for batch in MemoryRecords(data):
            rows += (
                Row(r.offset, broker_ns(r.timestamp), r.key, r.value, [(n, v or b"") for n, v in r.headers], epoch)
                for epoch in [batch.leader_epoch]
                for r in batch
            )
    except CorruptRecordError:
        return rows, False
    return rows, True


def part_of(data: bytes, start: int = -(1 << 63)) -> Any:
    fetcher: Any = SimpleNamespace()
    read_batches(SimpleNamespace(_fetcher=fetcher), LIMIT, lambda *_: False)
    return fetcher.PartitionRecords(start, TP, MemoryRecords(data), isolation_level=IsolationLevel.READ_COMMITTED)


def taken(part: Any, sizes: Iterator[int]) -> tuple[list[Row], bool]:
    rows: list[Row] = []
    try:
        while part:
            n = next(sizes)
            some = part.take(n)
            for found in some:
                rows += rows_of(found)
                assert part.next_fetch_offset > rows[-1].offset or not part
    except DataError:
        assert not part
        return rows, False
    return rows, True


def at_most(*sizes: int) -> Iterator[int]:
    while True:
        yield from sizes


def bytes_up_to(rng: random.Random, most: int) -> bytes | None:
    size = int(most ** rng.random())
    return rng.choice((rng.randbytes(size),) * 8 + (bytes(size), None))


def some_headers(rng: random.Random) -> list[tuple[str, bytes | None]]:
    names = ("", "n", "n", "traceparent", "\N{GREEK SMALL LETTER PI}", "x" * 200)
    return [(rng.choice(names), bytes_up_to(rng, 200)) for _ in range(rng.randrange(1, 4))]


def payload(rng: random.Random, count: int) -> bytearray:
    """So many records, with gaps between their offsets, timestamps that go back, nulls and maybe headers."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=False,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 26,
    )
    with_headers, largest, offset = rng.random() < 0.3, rng.choice((1, 80, 80, 20_000)), 0
    for _ in range(count):
        some = some_headers(rng) if with_headers and rng.random() < 0.5 else []
        stamp = NOW_MS + rng.randrange(-(10 ** rng.randrange(1, 12)), 10 ** rng.randrange(1, 12))
        builder.append(offset, stamp, bytes_up_to(rng, 40), bytes_up_to(rng, largest), some)
        offset += 1 if rng.random() < 0.9 else rng.randrange(1, 10_000)
    return builder.build()[HEADER.size :]


def batch(
    text: bytes,
    count: int,
    *,
    base: int = 0,
    codec: int = 0,
    first_ms: int = NOW_MS,
    epoch: int = 7,
    append: bool = False,
) -> bytes:
    """A batch with a right checksum, whatever is in it."""
    body = ENCODE[codec](bytes(text))
    attributes = codec | 8 * append
    length = HEADER.size - 12 + len(body)
    last = max(0, count - 1)
    built = bytearray(
        HEADER.pack(base, length, epoch, 2, 0, attributes, last, first_ms, first_ms, -1, -1, -1, count) + body
    )
    struct.pack_into(">I", built, 17, calc_crc32c(memoryview(built)[21:]))
    return bytes(built)


def opened(data: bytes) -> Any:
    found = MemoryRecords(data).next_batch()
    found._maybe_uncompress()
    return found


def log(rng: random.Random) -> bytes:
    """Some batches as one fetch brings them."""
    batches, base, epoch = [], rng.choice((0, 1 << 40)), 3
    for _ in range(rng.randrange(1, 12)):
        count = rng.choice((1, 1, 2, 5, 30, 120))
        stamp = rng.choice((NOW_MS,) * 9 + (0, -1, 1 << 61, (1 << 63) - 1, -(1 << 63)))
        epoch += rng.random() < 0.1
        batches.append(
            batch(
                payload(rng, count), count, base=base, codec=rng.choice((0, 0, 0, 1, 2, 3, 4)), first_ms=stamp,
                epoch=epoch, append=rng.random() < 0.1,
            )
        )  # fmt: skip
        base += 10_000 * count
    return b"".join(batches)


@pytest.mark.parametrize("seed", range(150))
def test_what_is_read_at_once_is_what_is_read_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    data = log(rng)
    expected, sound = one_by_one(data)
    assert sound
    for sizes in ((2000,), (50,), (1,), (7, 500, 26)):
        part = part_of(data)
        assert taken(part, at_most(*sizes)) == (expected, True)
        assert part.leader_epoch == expected[-1].leader_epoch


@pytest.mark.parametrize("seed", range(20))
def test_reading_begins_at_any_offset(seed: int) -> None:
    rng = random.Random(seed)
    data = log(rng)
    expected, _ = one_by_one(data)
    for start in (rng.choice(expected).offset + rng.randrange(2) for _ in range(5)):
        assert taken(part_of(data, start), at_most(100)) == ([r for r in expected if r.offset >= start], True)


@pytest.mark.parametrize("codec", [0, 3])
def test_what_producers_write_is_read_at_once(codec: int) -> None:
    """Else nobody would notice that all of it is read one by one."""
    for seed in range(50):
        rng = random.Random(seed)
        text = payload(rng, FEW)
        found = columns._columns([Run(opened(batch(text, FEW, codec=codec)), FEW, whole=True)])
        assert rows_of(found) == one_by_one(batch(text, FEW, codec=codec))[0]


def harmed(rng: random.Random, text: bytearray) -> bytes:
    """Bits flipped, bytes cut out, put in or written over, and numbers that go beyond all bounds."""
    harm = bytearray(text)
    for _ in range(rng.choice((1, 1, 1, 3))):
        at = rng.randrange(len(harm))
        what = rng.randrange(6)
        if what == 0:
            harm[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del harm[at : at + rng.randrange(1, 4)]
        elif what == 2:
            harm[at:at] = rng.randbytes(rng.randrange(1, 4))
        elif what == 3:
            harm[at] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
        elif what == 4:
            harm[at : at + 1] = rng.choice((b"\xff" * 4, b"\x80" * 9, b"\xff" * 10)) + bytes([rng.randrange(256)])
        elif at:
            del harm[at:]
    return bytes(harm)


@pytest.mark.parametrize("seed", range(300))
def test_what_is_damaged_is_read_as_far_as_one_by_one_and_refused_there(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        count = rng.choice((3, FEW, 30, 60))
        text = payload(rng, count)
        told = count if rng.random() < 0.8 else rng.choice((0, -1, count - 1, count + 1, 1 << 30))
        bad = batch(harmed(rng, text), told, base=1000, codec=rng.choice((0, 0, 1, 4)))
        data = batch(payload(rng, 30), 30) + bad + batch(payload(rng, 2), 2, base=9000)
        assert taken(part_of(data), at_most(rng.choice((10, 45, 2000)))) == one_by_one(data)


def number(rng: random.Random, value: int) -> bytes:
    """In zigzag, sometimes in more bytes than it takes."""
    out = bytearray()
    encode_varint(value, out.append)
    for _ in range(rng.randrange(1, 8) if rng.random() < 0.02 else 0):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def sized(rng: random.Random, text: bytes | None, odds: float) -> bytes:
    """A text behind its length, or behind a lie."""
    size = -1 if text is None else len(text)
    if rng.random() < odds:
        size = rng.choice((size + 1, size - 1, -5, 0, 1000, 1 << 31, (1 << 62) - 1, -(1 << 62)))
    return number(rng, size) + (text or b"")


def odd_record(rng: random.Random, at: int, odds: float, *, headers: bool = False) -> bytes:
    """A record in which any field may be any number, in a length that is mostly right."""

    def maybe(value: int) -> int:
        far = rng.choice((1 << 31, (1 << 55) + 1, (1 << 61) - 1, (1 << 63) - 1, 1))
        return rng.choice((far, -far, value + far)) % (1 << 64) - (1 << 63) if rng.random() < odds else value

    names = (b"n", b"", b"\xff\xfe", "\u00e4".encode())
    named = [(rng.choice(names), bytes_up_to(rng, 20)) for _ in range(rng.choice((0, 0, 0, 1, 2)))] if headers else []
    body = number(rng, maybe(0)) + number(rng, maybe(at * 10)) + number(rng, maybe(at))
    body += sized(rng, bytes_up_to(rng, 20), odds) + sized(rng, bytes_up_to(rng, 100), odds)
    body += number(rng, len(named) if rng.random() >= odds else rng.choice((0, -1, len(named) + 1, 1 << 40)))
    for name, value in named:
        body += sized(rng, name, odds) + sized(rng, value, odds)
    body += b"\0" * (rng.random() < odds)
    return (
        number(rng, len(body) if rng.random() >= odds else rng.choice((len(body) + 1, -len(body) - 1, 0, -1, 1 << 40)))
        + body
    )


@pytest.mark.parametrize("odds", [0, 0.001, 0.003, 0.02])
def test_records_whose_fields_lie_are_read_as_far_as_one_by_one(odds: float) -> None:
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        count = rng.choice((FEW, 40, 80))
        headers = rng.random() < 0.5
        text = b"".join(odd_record(rng, at, odds, headers=headers) for at in range(count))
        data = batch(text, count, base=500, codec=rng.choice((0, 3))) + batch(payload(rng, 30), 30, base=9000)
        expected = one_by_one(data)
        in_bounds = [r.offset for r in expected[0] if -(1 << 63) <= r.offset < 1 << 63]
        if len(in_bounds) == len(expected[0]):
            assert taken(part_of(data), at_most(rng.choice((10, 45, 2000)))) == expected
        refused += not expected[1]
    assert refused == 0 if odds == 0 else refused > 10


def test_a_header_that_leads_back_is_refused() -> None:
    """A name of -1 bytes, whose length is read again as that of a value which is not there."""
    body = bytes([0, 0, 0, 1, 1, 2, 1])
    data = batch(bytes([2 * len(body), *body]) * FEW, FEW)
    assert one_by_one(data) == taken(part_of(data), at_most(2000)) == ([], False)


@pytest.mark.parametrize("told", [30, 100])
def test_a_batch_that_is_cut_anywhere_is_read_up_to_there(told: int) -> None:
    text = numbered([b"v%d" % i for i in range(30)])
    for end in range(len(text)):
        data = batch(text[:end], told)
        assert taken(part_of(data), at_most(29)) == one_by_one(data)


def test_an_offset_beyond_64_bits_is_damage() -> None:
    rng = random.Random(1)
    text = b"".join(odd_record(rng, at, 0) for at in range(FEW))
    rows, sound = taken(part_of(batch(text, FEW, base=(1 << 63) - 5)), at_most(100))
    assert ([r.offset for r in rows], sound) == ([(1 << 63) - 5 + at for at in range(5)], False)


def tiny(count: int) -> bytes:
    """Records of 7 bytes, all at the first offset: there can be no more of them in as many bytes."""
    return bytes([12, 0, 0, 0, 1, 1, 0]) * count


@pytest.mark.parametrize("codec", [0, 4])
def test_a_large_batch_comes_in_parts(codec: int) -> None:
    """Else a record of 7 bytes costs a hundred while all of them are read."""
    part = part_of(batch(tiny(1_000_000), 1_000_000, codec=codec))
    tracemalloc.start()
    try:
        assert [len(part.take(2000)) for _ in range(5)] == [2000] * 5
        assert len(part.take(1_000_000)) < 10_000
        assert tracemalloc.get_traced_memory()[1] < (20 << 20 if codec == 4 else 10 << 20)
    finally:
        tracemalloc.stop()


def numbered(values: Sequence[bytes]) -> bytes:
    rng = random.Random(0)
    bodies = [bytes(3) + sized(rng, None, 0) + sized(rng, value, 0) + b"\0" for value in values]
    return b"".join(sized(rng, body, 0) for body in bodies)


def test_large_records_are_not_copied_many_at_once() -> None:
    part = part_of(batch(numbered([bytes(100_000)] * 50), 50))
    assert [len(part.take(2000)) for _ in range(5)] == [10] * 5


def test_small_batches_are_read_at_once_but_not_across_leaders() -> None:
    """The position holds the epoch of the last record that was handed out, and not of one that was looked at."""
    first = [batch(numbered([b"a"] * 3), 3, base=10 * i, epoch=4) for i in range(20)]
    then = [batch(numbered([b"b"] * 3), 3, base=10 * i, epoch=5) for i in range(20, 30)]
    part = part_of(b"".join((*first, *then)))
    (found,) = part.take(2000)
    assert (found.value, found.leader_epoch, part.leader_epoch, part.next_fetch_offset) == ([b"a"] * 60, 4, 4, 191)
    (found,) = part.take(2000)
    assert (found.value, found.leader_epoch, part.leader_epoch, part.next_fetch_offset) == ([b"b"] * 30, 5, 5, 293)
    assert not part


def test_what_is_sound_comes_before_the_error_and_the_error_comes_again() -> None:
    sound = batch(numbered([b"a"] * 30), 30)
    damaged = bytearray(batch(numbered([b"b"]), 1, base=30))
    damaged[-1] ^= 1
    part = part_of(sound + damaged)
    (found,) = part.take(2000)
    assert (len(found), part.next_fetch_offset, bool(part)) == (30, 1, True)
    with pytest.raises(DataError, match="offsets 30 to 30 is damaged: its checksum"):
        part.take(2000)
    # What is left of the fetch is dropped, so that the client fetches again, from the position that it has.
    assert not part
