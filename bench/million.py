"""
One million JSON records of 1 000 series over 4 partitions: produce, run, and count everything.

    python bench/million.py BOOTSTRAP [--records 1000000] [--series 1000] [--partitions 4]

Prints rates, the records by outcome, whether each forecast appears exactly once under read_committed, the lag at the
end and the peak memory of the daemon. The peer in the same run does without thinking what the daemon does with
thought: it polls the same topic and produces messages of the same size in transactions.
"""

import argparse
import json
import os
import re
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from driving import CONFIG, accounted, create_topics, follow, make_topics, produce, start, write_records
from kafka import KafkaConsumer, KafkaProducer, TopicPartition


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def run_daemon(config: Path, port: int, records: int, log: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds until all records are accounted for, peak MiB, and the last metrics."""
    daemon = start(config, log)
    try:
        began = 0.0
        for now, seen in follow(daemon, port, log, 0.5):
            done = accounted(seen)
            began = began or (now if done else 0.0)
            lag = sum(v for k, v in seen.items() if k.startswith("streamlstm_source_lag_records"))
            if done >= records and lag == 0:
                return now - began, peak_mib(daemon.pid), seen
    finally:
        daemon.send_signal(signal.SIGTERM)
        print(f"SIGTERM → exit {daemon.wait(timeout=30)}")


def count_forecasts(bootstrap: str, topic: str) -> tuple[int, int, int]:
    """Messages under read_committed, distinct input coordinates among them, and their mean size."""
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False, group_id=None
    )
    parts = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(parts)
    consumer.seek_to_beginning()
    ends = consumer.end_offsets(parts)
    found: Counter[tuple[int, int]] = Counter()
    size = 0
    pattern = re.compile(rb'"partition":(\d+),"offset":(\d+)')
    while any(consumer.position(p) < ends[p] for p in parts):
        for batch in consumer.poll(500, max_records=20_000).values():
            for message in batch:
                partition, offset = pattern.search(message.value).groups()
                found[int(partition), int(offset)] += 1
                size += len(message.value)
    consumer.close()
    total = sum(found.values())
    return total, len(found), size // max(1, total)


def unthinking(bootstrap: str, topic: str, out: str, size: int, records: int) -> float:
    """Records per second of polling and transactionally producing as many bytes, every result checked."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, group_id=None)
    parts = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(parts)
    consumer.seek_to_beginning()
    producer = KafkaProducer(
        bootstrap_servers=bootstrap,
        transactional_id="unthinking",
        compression_type="lz4",
        linger_ms=5,
        batch_size=1 << 18,
        retry_backoff_ms=20,
    )
    producer.init_transactions()
    payload = os.urandom(size // 2).hex().encode()
    done, began = 0, time.perf_counter()
    while done < records:
        batches = consumer.poll(500, max_records=2_000)
        producer.begin_transaction()
        sent = [producer.send(out, payload, key=m.key) for batch in batches.values() for m in batch]
        producer.flush()
        for future in sent:
            future.get(30)
        producer.commit_transaction()
        done += len(sent)
    rate = done / (time.perf_counter() - began)
    producer.close()
    consumer.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bootstrap")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--series", type=int, default=1_000)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--port", type=int, default=9178)
    a = parser.parse_args()
    prefix = f"million-{int(time.time())}"
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_records(base / "records.ndjson", a.records, a.series)
        config = base / "million.yaml"
        text = CONFIG.format(
            name=prefix, bootstrap=a.bootstrap, topic=f"{prefix}.raw", state=base / "state", port=a.port
        )
        config.write_text(f"{text}sink: {{forecasts: {{topic: {prefix}.forecast}}}}\n")
        make_topics(a.bootstrap, a.partitions, f"{prefix}.raw", f"{prefix}.peer")
        create_topics(config)
        began = time.perf_counter()
        produce(a.bootstrap, f"{prefix}.raw", base / "records.ndjson")
        print(f"produce          {a.records / (time.perf_counter() - began):>10,.0f} records/s")
        seconds, peak, seen = run_daemon(config, a.port, a.records, base / "daemon.log")
        print(f"run              {a.records / seconds:>10,.0f} records/s, peak memory {peak:,.0f} MiB")
        for name, value in seen.items():
            if name.startswith(("streamlstm_records_total", "streamlstm_source_lag", "streamlstm_updates_total")):
                print(f"  {name} {value:,.0f}")
        total, distinct, size = count_forecasts(a.bootstrap, f"{prefix}.forecast")
        print(f"read_committed   {total:,} forecasts of {distinct:,} coordinates, {size:,} bytes each")
        peer = unthinking(a.bootstrap, f"{prefix}.raw", f"{prefix}.peer", size, min(200_000, a.records))
        print(f"unthinking peer  {peer:>10,.0f} records/s; run is {a.records / seconds / peer:.0%} of it")
        print(json.dumps({"accounted": total == distinct == a.records}))


if __name__ == "__main__":
    main()
