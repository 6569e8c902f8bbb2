"""
JSON messages to columns: records/s of the decoder against json.loads and bare msgspec per message, on one core.

python bench/decode.py
"""

import json
import time
from collections.abc import Callable

import msgspec
import numpy as np

from streamlstm.config.model import Decode, Timestamp
from streamlstm.records.batch import Messages, Range
from streamlstm.records.decode import compile_decoder

_CUT = 2000
_CUTS = 50
_SERIES = 1000


class Typed(msgspec.Struct):
    """What a hand-written consumer would declare."""

    host: str
    name: str
    timestamp: int
    value: float


def flat(i: int) -> object:
    host, name = divmod(i % _SERIES, 10)
    return {"host": f"host-{host}", "name": f"metric-{name}", "timestamp": 1_700_000_000_000 + i, "value": i * 0.37}


def nested(i: int) -> object:
    host, name = divmod(i % _SERIES, 10)
    tags = {"host": f"host-{host}", "region": "eu-west-1", "role": "db"}
    time_s = f"2026-11-20T08:{i // 60 % 60:02}:{i % 60:02}.{i % 1000:03}Z"
    return {"name": f"metric-{name}", "tags": tags, "fields": {"value": i * 0.37, "count": i}, "timestamp": time_s}


def wide(i: int) -> object:
    return {"device": f"device-{i % 50}", "ts": 1_700_000_000 + i, "m": {f"field-{f}": i * 0.1 + f for f in range(10)}}


def cuts(shape: Callable[[int], object]) -> list[Messages]:
    made: list[Messages] = []
    for start in range(0, _CUT * _CUTS, _CUT):
        ranges = tuple(Range("metrics.raw", p, start // 4, (start + _CUT) // 4) for p in range(4))
        made.append(
            Messages(
                cut=ranges,
                range_index=np.repeat(np.arange(4, dtype=np.int32), _CUT // 4),
                offset=np.tile(np.arange(start // 4, (start + _CUT) // 4), 4),
                broker_ns=np.full(_CUT, 1_700_000_000 * 10**9),
                key=[None] * _CUT,
                value=[msgspec.json.encode(shape(i)) for i in range(start, start + _CUT)],
            )
        )
    return made


def rate(run: Callable[[Messages], int], made: list[Messages]) -> float:
    """Records per second, the best of three passes."""
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        records = sum(run(messages) for messages in made)
        best = max(best, records / (time.perf_counter() - began))
    return best


def show(name: str, per_second: float) -> None:
    print(f"  {name:42} {per_second:12,.0f} records/s   {1e6 / per_second:6.2f} µs a record")


def main() -> None:
    time_path = Timestamp(path="$.timestamp")
    shapes: list[tuple[str, Callable[[int], object], Decode]] = [
        (
            "flat: host, name, timestamp ms, value",
            flat,
            Decode(series_id=["$.host", "$.name"], timestamp=time_path, target="$.value"),
        ),
        (
            "nested, ISO 8601, two targets",
            nested,
            Decode(
                series_id=["$.tags.host", "$.name"],
                timestamp=time_path,
                target={"value": "$.fields.value", "count": "$.fields.count"},
            ),
        ),
        (
            "ten numbers of $.m.*",
            wide,
            Decode(series_id=["$.device"], timestamp=Timestamp(path="$.ts"), target="$.m.*"),
        ),
    ]
    for title, shape, decode in shapes:
        made = cuts(shape)
        decoder = compile_decoder(decode)
        print(f"{title} ({len(made[0].value[0] or b'')} bytes, cuts of {_CUT})")
        show("ours: bytes to columns", rate(lambda m, d=decoder: len(d.decode(m)), made))
        untyped = msgspec.json.Decoder()
        show("json.loads alone", rate(lambda m: len([json.loads(v) for v in m.value if v]), made))
        show("msgspec alone, untyped", rate(lambda m, u=untyped: len([u.decode(v) for v in m.value if v]), made))
        if shape is flat:
            typed = msgspec.json.Decoder(Typed)
            show("msgspec alone, typed", rate(lambda m, t=typed: len([t.decode(v) for v in m.value if v]), made))


if __name__ == "__main__":
    main()
