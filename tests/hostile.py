"""Messages that mean no good, as many as one likes, from a seed: everything that JSON and CSV let somebody say."""

import random
from collections.abc import Callable

import numpy as np

from streamlstm.records.batch import Headers, Messages, Range

SECOND_NS = 10**9
NOW_S = 1_795_161_600
YEAR_S = 365 * 86_400
PARTITIONS = 3

NUMBERS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e39", b"-1e39", b"3.4028235e38", b"3.4028236e38", b"1e400", b"-1e400",
    b"1e-400", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"1" * 400, b"0." + b"1" * 400,
    b"-0.0", b"5e-324", b"01", b"1.", b".5", b"+1", b"0x10", b"1_000", b"1e", b"--1",
)  # fmt: skip
VALUES = (
    b"true", b"false", b"null", b'""', b'"12"', b'"1e3"', b'"NaN"', b'"not a number"', b"[]", b"{}", b"[1,2]",
    b'{"a":1}', b'"\\ud800"', b'"\\u0000"', '"\N{ARABIC-INDIC DIGIT THREE}"'.encode(), b"\xff\xfe", b"\x00", b"",
)  # fmt: skip
TIMES = (
    b"0", b"-1", b"1e18", b"-1e18", b"1000000000000000000", b"-1000000000000000000", b"99999999999999999999", b"1e400",
    b"%d" % (NOW_S + YEAR_S), b"%d" % (NOW_S - YEAR_S), b'"2026-11-20T08:00:00Z"', b'"2026-13-40T25:61:61Z"',
    b'"0000-00-00"', b'"99999-01-01T00:00:00Z"', b'"now"', b'"2026-11-20T08:00:00+99:99"', b"null", b"true",
    b"[]", b'"%d"' % NOW_S,
)  # fmt: skip
WHOLE = (
    b"", b" ", b"{", b"}", b"[]", b"null", b"1", b'"text"', b"{}", b"[" * 20_000, b'{"a":' * 5_000, b"\xef\xbb\xbf{}",
    b'{"id":"s1"', b"\x00" * 50, b"{}{}", b"[" * 3 + b"]" * 3, b'{"id":"s1","t":1,"y":1,}', b"{'id':1}",
)  # fmt: skip


class Hostile:
    """Messages of one topic, cut by cut. About a third are well, so that there are series to do harm to."""

    def __init__(self, seed: int, body: Callable[["Hostile"], bytes]) -> None:
        self.rng = random.Random(seed)
        self.body = body
        self.now_s = NOW_S
        self.ends = [0] * PARTITIONS

    def messages(self, count: int) -> Messages:
        """The next cut: a range of every partition, with gaps, tombstones, odd keys, headers and broker's times."""
        rng = self.rng
        cut, index, offset = [], [], []
        for partition in range(PARTITIONS):
            start = self.ends[partition]
            held = [start + i for i in range(count // PARTITIONS + 10) if rng.random() > 0.05]
            self.ends[partition] = held[-1] + 1
            cut.append(Range("in", partition, start, held[-1] + 1))
            index += [partition] * len(held)
            offset += held
        size = len(offset)
        values = [self._message() for _ in range(size)]
        return Messages(
            cut=tuple(cut),
            range_index=np.array(index, np.int32),
            offset=np.array(offset, np.int64),
            broker_ns=np.array([self._broker_ns() for _ in range(size)], np.int64),
            key=[self._key() for _ in range(size)],
            value=values,
            headers=[self._headers() for _ in range(size)] if rng.random() < 0.3 else None,
        )

    def _message(self) -> bytes | None:
        rng = self.rng
        self.now_s += rng.random() < 0.05
        what = rng.random()
        if what < 0.02:
            return None
        if what < 0.1:
            return rng.choice(WHOLE)
        if what < 0.13:
            return rng.randbytes(rng.randrange(80))
        body = self.body(self)
        if what < 0.18 and body:
            at = rng.randrange(len(body))
            return body[:at] if what < 0.15 else body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
        return body + b" " * 300_000 if what > 0.9999 else body

    def _key(self) -> bytes | None:
        return self.rng.choice((None, b"", b"k", b"\xff\xfe", b"k" * 2000, b"a|b", b"%d" % self.rng.randrange(5)))

    def _headers(self) -> Headers:
        return [("n", b"v"), ("", b""), ("n", b"\xff")][: self.rng.randrange(4)]

    def _broker_ns(self) -> int:
        rng = self.rng
        return rng.choice((-1, 0, 2**63 - 1, self.now_s * SECOND_NS)) if rng.random() < 0.05 else self.now_s * SECOND_NS

    def number(self) -> bytes:
        rng = self.rng
        what = rng.random()
        if what < 0.7:
            return b"%.3f" % rng.gauss(0, 10 ** rng.randrange(-3, 6))
        return rng.choice(NUMBERS) if what < 0.85 else rng.choice(VALUES)

    def time(self) -> bytes:
        return b"%d" % (self.now_s - self.rng.randrange(3)) if self.rng.random() < 0.7 else self.rng.choice(TIMES)

    def name(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.85:
            return b'"s%d"' % rng.randrange(20)
        return rng.choice((*VALUES, b'"%s"' % (b"x" * 2_000), b'"s%d"' % rng.randrange(10**9), b"17"))


def flat(hostile: Hostile) -> bytes:
    """``{"id", "t", "y"}``, some of it missing, some of it twice."""
    rng = hostile.rng
    fields = [b'"id":' + hostile.name(), b'"t":' + hostile.time(), b'"y":' + hostile.number()]
    if rng.random() < 0.05:
        fields.append(rng.choice(fields))
    if rng.random() < 0.05:
        fields.append(b'"y":' + hostile.number())
    if rng.random() < 0.05:
        fields.pop(rng.randrange(len(fields)))
    if rng.random() < 0.1:
        rng.shuffle(fields)
    return b"{" + b",".join(fields) + b"}"


def exploded(hostile: Hostile) -> bytes:
    """``{"id", "obs": [{"t", "a", "b"}, …]}``, some of them no array, some of them long."""
    rng = hostile.rng
    rows = [
        b'{"t":%s,"a":%s,"b":%s}' % (hostile.time(), hostile.number(), hostile.number())
        if rng.random() < 0.95
        else rng.choice((*VALUES, *NUMBERS))
        for _ in range(rng.randrange(4) if rng.random() > 0.001 else 300)
    ]
    array = b"[" + b",".join(rows) + b"]" if rng.random() < 0.95 else rng.choice(VALUES)
    return b'{"id":%s,"obs":%s}' % (hostile.name(), array)


def line(hostile: Hostile) -> bytes:
    """A line of CSV, with quotes and fields too many or too few."""
    rng = hostile.rng
    name = b"s%d" % rng.randrange(20) if rng.random() < 0.9 else rng.choice((b'"s,1"', b'"open', b"", b"\xff"))
    fields = [name, hostile.time().strip(b'"'), hostile.number().strip(b'"')]
    if rng.random() < 0.05:
        fields.append(b"extra")
    if rng.random() < 0.05:
        fields.pop()
    return b",".join(fields)
