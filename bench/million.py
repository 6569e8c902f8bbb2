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
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

STREAMLSTM = [sys.executable, "-m", "streamlstm.cli.main"]
CONFIG = """
name: million
source: {{bootstrap_servers: ["{bootstrap}"], topics: [{prefix}.raw]}}
decode:
  series_id: [$.host, $.name]
  timestamp: {{path: $.timestamp, unit: s}}
  target: $.value
series: {{interval: 10s}}
checkpoint: {{url: {state}}}
sink: {{forecasts: {{topic: {prefix}.forecast}}}}
http: {{listen: "127.0.0.1:{port}"}}
"""


def write_records(path: Path, records: int, series: int) -> None:
    rng = np.random.default_rng(1)
    level, season = np.zeros(series), rng.uniform(0, 6.28, series)
    with path.open("w") as out:
        for start in range(0, records, series):
            n = start // series
            level = 0.95 * level + rng.normal(size=series)
            values = 50 + 10 * np.sin(season + n / 20) + level
            time_s = 1_790_000_000 + 10 * n
            out.writelines(
                f'{{"host":"host-{q // 10}","name":"metric-{q % 10}","timestamp":{time_s},"value":{v:.3f}}}\n'
                for q, v in enumerate(values[: records - start].tolist())
            )


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {m[1]: float(m[2]) for line in lines if (m := re.match(r"^(\S+) (\S+)$", line))}


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def run_daemon(config: Path, port: int, records: int, log: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds until all records are accounted for, peak MiB, and the last metrics."""
    with log.open("w") as err:
        daemon = subprocess.Popen([*STREAMLSTM, "run", "-c", str(config)], stderr=err)
    try:
        began, seen, peak = 0.0, {}, 0.0
        while True:
            time.sleep(0.5)
            if daemon.poll() is not None:
                sys.exit(f"the daemon ended with {daemon.returncode}:\n{log.read_text()[-2000:]}")
            try:
                seen = metrics(port)
            except OSError:
                continue
            done = sum(v for k, v in seen.items() if k.startswith("streamlstm_records_total"))
            began = began or (time.perf_counter() if done else 0.0)
            peak = peak_mib(daemon.pid)
            lag = sum(v for k, v in seen.items() if k.startswith("streamlstm_source_lag_records"))
            if done >= records and lag == 0:
                return time.perf_counter() - began, peak, seen
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
        config.write_text(CONFIG.format(bootstrap=a.bootstrap, prefix=prefix, state=base / "state", port=a.port))
        admin = KafkaAdminClient(bootstrap_servers=a.bootstrap)
        admin.create_topics([NewTopic(f"{prefix}.raw", a.partitions, 1), NewTopic(f"{prefix}.peer", a.partitions, 1)])
        admin.close()
        subprocess.run([*STREAMLSTM, "topics", "create", "-c", str(config)], check=True, stdout=subprocess.DEVNULL)
        began = time.perf_counter()
        produce = [*STREAMLSTM, "produce", "--to", f"{prefix}.raw", "--from", str(base / "records.ndjson")]
        subprocess.run([*produce, "--bootstrap", a.bootstrap, "--key", "$.host"], check=True, stdout=subprocess.DEVNULL)
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
