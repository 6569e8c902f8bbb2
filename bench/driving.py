"""What benchmarks that run the daemon share: a topic full of records, the daemon over it, and what its metrics say."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

STREAMLSTM = [sys.executable, "-m", "streamlstm.cli.main"]
CONFIG = """
name: {name}
source: {{bootstrap_servers: ["{bootstrap}"], topics: [{topic}]}}
decode:
  series_id: [$.host, $.name]
  timestamp: {{path: $.timestamp, unit: s}}
  target: $.value
series: {{interval: 10s}}
checkpoint: {{url: {state}}}
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


def make_topics(bootstrap: str, partitions: int, *names: str) -> None:
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    admin.create_topics([NewTopic(name, partitions, 1) for name in names])
    admin.close()


def produce(bootstrap: str, topic: str, records: Path) -> None:
    command = [*STREAMLSTM, "produce", "--to", topic, "--from", str(records), "--bootstrap", bootstrap]
    subprocess.run([*command, "--key", "$.host"], check=True, stdout=subprocess.DEVNULL)


def create_topics(config: Path) -> None:
    """Those of the deployment."""
    subprocess.run([*STREAMLSTM, "topics", "create", "-c", str(config)], check=True, stdout=subprocess.DEVNULL)


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as err:
        return subprocess.Popen([*STREAMLSTM, "run", "-c", str(config)], stderr=err)


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {m[1]: float(m[2]) for line in lines if (m := re.match(r"^(\S+) (\S+)$", line))}


def follow(
    daemon: subprocess.Popen[bytes], port: int, log: Path, every_s: float
) -> Iterator[tuple[float, dict[str, float]]]:
    """Its metrics, again and again, and when they were read. A daemon that ends, ends the benchmark."""
    while True:
        time.sleep(every_s)
        if daemon.poll() is not None:
            sys.exit(f"the daemon ended with {daemon.returncode}:\n{log.read_text()[-2000:]}")
        try:
            seen = metrics(port)
        except OSError:
            continue
        yield time.perf_counter(), seen


def accounted(seen: dict[str, float]) -> float:
    """Records of any outcome."""
    return sum(v for k, v in seen.items() if k.startswith("streamlstm_records_total"))
