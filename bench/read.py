"""
What a broker sends to columns: processor time a record of the source against kafka-python alone, on the same bytes.

python bench/read.py
"""

import statistics
import struct
import time
from collections.abc import Callable
from types import SimpleNamespace

from kafka.consumer.fetcher import Fetcher
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.memory_records import MemoryRecords
from kafka.structs import TopicPartition

from streamlstm.transport.kafka.batches import read_batches
from streamlstm.transport.kafka.waiting import Waiting

_TP = TopicPartition("metrics.raw", 0)
_RECORDS = 40_000
_A_POLL = 2_000
_FETCH_BYTES = 1 << 20
_TRACE = [("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("source", b"edge-17")]
_LZ4 = 3


def batch(first: int, records: int, codec: int, headers: list[tuple[str, bytes]]) -> bytes:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=codec,
        is_transactional=False,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 26,
    )
    for at in range(records):
        i = first + at
        host, name = divmod(i % 1000, 10)
        value = b'{"host":"host-%d","name":"metric-%d","timestamp":%d,"value":%.3f}' % (
            host,
            name,
            1_790_000_000 + i,
            i,
        )
        builder.append(at, 1_790_000_000_000 + at, b"host-%d" % host, value, headers)
    built = bytearray(builder.build())
    struct.pack_into(">q", built, 0, first)
    return bytes(built)


def fetches(records: int, codec: int, headers: list[tuple[str, bytes]]) -> list[tuple[int, bytes]]:
    """All the batches, in what a fetch brings of a partition, and where each begins."""
    made: list[tuple[int, bytes]] = []
    held, begin = b"", 0
    for first in range(0, _RECORDS, records):
        held += batch(first, records, codec, headers)
        if len(held) >= _FETCH_BYTES or first + records >= _RECORDS:
            made.append((begin, held))
            held, begin = b"", first + records
    return made


def ours(made: list[tuple[int, bytes]]) -> int:
    """Out of what was fetched, into what waits, and out again a step at a time."""
    fetcher = SimpleNamespace()
    read_batches(SimpleNamespace(_fetcher=fetcher), 64 << 20, lambda *_: False)
    waiting, seen = Waiting(), 0
    for begin, data in made:
        part = fetcher.PartitionRecords(begin, _TP, MemoryRecords(data), isolation_level=IsolationLevel.READ_COMMITTED)
        while part:
            for records in part.take(_A_POLL):
                waiting.add(records)
            seen += sum(map(len, waiting.take(len(waiting))))
    return seen


def alone(made: list[tuple[int, bytes]]) -> int:
    """What every consumer of kafka-python pays before it sees a record."""
    seen = 0
    for begin, data in made:
        part = Fetcher.PartitionRecords(begin, _TP, MemoryRecords(data), isolation_level=IsolationLevel.READ_COMMITTED)
        while part:
            seen += len(part.take(_A_POLL))
    return seen


def cost_us(run: Callable[[list[tuple[int, bytes]]], int], made: list[tuple[int, bytes]]) -> float:
    """Of a record; the median of five passes."""
    took: list[float] = []
    for _ in range(5):
        begun = time.process_time()
        if run(made) != _RECORDS:
            raise SystemExit("records are missing")
        took.append(time.process_time() - begun)
    return 1e6 * statistics.median(took) / _RECORDS


def main() -> None:
    print(f"{'':28}{'ours':>8}{'kafka-python':>16}   µs a record")
    for title, records, codec, headers in (
        ("batches of 1", 1, 0, []),
        ("batches of 5", 5, 0, []),
        ("batches of 100", 100, 0, []),
        ("batches of 1 000", 1000, 0, []),
        ("batches of 1 000, lz4", 1000, _LZ4, []),
        ("batches of 100, two headers", 100, 0, _TRACE),
    ):
        made = fetches(records, codec, headers)
        print(f"{title:28}{cost_us(ours, made):8.2f}{cost_us(alone, made):16.2f}")


if __name__ == "__main__":
    main()
