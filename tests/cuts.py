"""Messages and decode sections for tests, short to write and to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamlstm.config.model import Decode
from streamlstm.records.batch import Headers, Messages, Range, RecordBatch
from streamlstm.records.decode import Decoder, compile_decoder

BROKER_NS = 1_795_161_600 * 10**9
"""2026-11-20T08:00:00Z"""


def decode_section(**keys: Any) -> Decode:
    base = {"series_id": ["$.id"], "timestamp": {"path": "$.t", "unit": "s"}, "target": "$.y"}
    return Decode.model_validate({**base, **keys})


def decoder(columns: Sequence[str] | None = None, **keys: Any) -> Decoder:
    return compile_decoder(decode_section(**keys), columns)


def messages(
    *values: bytes | None,
    keys: Sequence[bytes | None] | None = None,
    headers: list[Headers] | None = None,
    topic: str = "in",
    partition: int = 0,
    start: int = 0,
    broker_ns: int = BROKER_NS,
) -> Messages:
    """These values as one range."""
    count = len(values)
    return Messages(
        cut=(Range(topic, partition, start, start + count),),
        range_index=np.zeros(count, np.int32),
        offset=np.arange(start, start + count),
        broker_ns=np.full(count, broker_ns, np.int64),
        key=list(keys) if keys else [None] * count,
        value=list(values),
        headers=headers,
    )


def keys_of(batch: RecordBatch) -> list[str]:
    """The series key of each record."""
    return [batch.series[code].key for code in batch.code]


def reasons(batch: RecordBatch) -> list[tuple[int, int, str, str]]:
    """Each rejection's offset, row, reason and path."""
    return [(r.offset, r.row, r.reason, r.path) for r in batch.rejected]
