"""
What transactions cost: the same records through the same broker with ``sink.delivery`` exactly_once and idempotent.

    python bench/delivery.py BOOTSTRAP [--records 150000] [--series 1000] [--partitions 4] [--runs 5]

First commits alone: one process commits 1 000 forecasts now by a transaction and now by the journal, forty times each.
Then the service. The runs take turns, because a machine is not the same from one minute to the next; what counts is the
ratio of the medians. Beside the rate: the process's CPU time a record, which a busy machine changes least, how long a
commit took on average, and how many records were in one.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from driving import CONFIG, accounted, create_topics, follow, make_topics, produce, start, write_records

from streamlstm.config.model import Config
from streamlstm.recovery.journal import Journal
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import OutMessage, Outputs
from streamlstm.transport.kafka.idempotent import IdempotentPublisher
from streamlstm.transport.kafka.publisher import KafkaPublisher
from streamlstm.transport.kafka.topics import create_topics as create_output_topics

MODES = ("exactly_once", "idempotent")


class Run(NamedTuple):
    """Of one process."""

    records_s: float
    cpu_us: float
    commit_ms: float
    records_a_commit: float


def cpu_s(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(config: Path, port: int, records: int, log: Path) -> Run:
    """From the first commit that was seen to the last."""
    daemon = start(config, log)
    try:
        first: tuple[float, float, float] | None = None
        for now, seen in follow(daemon, port, log, 0.05):
            done = accounted(seen)
            if first is None and done:
                first = now, done, cpu_s(daemon.pid)
            if first and done >= records:
                commits = seen['streamlstm_step_duration_seconds_count{stage="publish"}']
                spent_s = seen['streamlstm_step_duration_seconds_sum{stage="publish"}']
                here = records - first[1]
                used_us = 1e6 * (cpu_s(daemon.pid) - first[2]) / here
                return Run(here / (now - first[0]), used_us, 1000 * spent_s / commits, records / commits)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(timeout=60)


def commit_in_turn(bootstrap: str, prefix: str, folder: Path) -> None:
    """What a commit takes and costs when nothing else is done; on a busy machine the quickest says most."""
    config = Config.model_validate({
        "name": f"{prefix}.commits",
        "source": {"bootstrap_servers": [bootstrap], "topics": [f"{prefix}.raw"]},
        "decode": {"series_id": ["@key"], "timestamp": {"path": "$.ts"}, "target": "$.value"},
    })  # fmt: skip
    create_output_topics(config)
    deadline = Deadline(60.0)
    publishers = {
        "exactly_once": KafkaPublisher(config, deadline),
        "idempotent": IdempotentPublisher(config, Journal(folder / "journal"), deadline),
    }
    forecasts = [OutMessage(b"host-%d" % (i % 100), os.urandom(500).hex().encode(), [], None) for i in range(1000)]
    wall: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu: dict[str, list[float]] = {mode: [] for mode in MODES}
    for publisher in publishers.values():
        publisher.begin_session()
    for turn in range(44):
        for mode in MODES if turn % 2 else MODES[::-1]:
            began_s, cpu_s = time.perf_counter(), time.process_time()
            publishers[mode].commit(Outputs(forecasts, [], b"x" * 3000))
            wall[mode].append(1000 * (time.perf_counter() - began_s))
            cpu[mode].append(1000 * (time.process_time() - cpu_s))
            time.sleep(0.02)
    for mode in MODES:
        publishers[mode].close()
        ms = wall[mode][4:]
        print(
            f"{mode:<13} commits of 1 000: median {statistics.median(ms):.1f} ms, quickest {min(ms):.1f} ms, "
            f"CPU {statistics.median(cpu[mode][4:]):.1f} ms",
            flush=True,
        )
    deadline.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bootstrap")
    parser.add_argument("--records", type=int, default=150_000)
    parser.add_argument("--series", type=int, default=1_000)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    a = parser.parse_args()
    prefix = f"delivery-{int(time.time())}"
    found: dict[str, list[Run]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_records(base / "records.ndjson", a.records, a.series)
        make_topics(a.bootstrap, a.partitions, f"{prefix}.raw")
        produce(a.bootstrap, f"{prefix}.raw", base / "records.ndjson")
        commit_in_turn(a.bootstrap, prefix, base)
        for turn in range(a.runs):
            for mode in MODES if turn % 2 else MODES[::-1]:
                name, port = f"{prefix}.{mode}.{turn}", free_port()
                config = base / f"{name}.yaml"
                text = CONFIG.format(
                    name=name, bootstrap=a.bootstrap, topic=f"{prefix}.raw", state=base / name, port=port
                )
                config.write_text(f"{text}sink: {{delivery: {mode}, commit_every: 100ms}}\nlogging: {{format: json}}\n")
                create_topics(config)
                one = run(config, port, a.records, base / "daemon.log")
                found[mode].append(one)
                print(
                    f"{mode:<13} {one.records_s:>8,.0f} records/s, CPU {one.cpu_us:5.0f} us a record, "
                    f"a commit {one.commit_ms:6.1f} ms "
                    f"of {one.records_a_commit:6,.0f} records; load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
    median = {mode: statistics.median(r.records_s for r in runs) for mode, runs in found.items()}
    for mode, runs in found.items():
        cpu_us, commit_ms = (statistics.median(getattr(r, name) for r in runs) for name in ("cpu_us", "commit_ms"))
        told = f"CPU {cpu_us:.0f} us a record, a commit {commit_ms:.1f} ms"
        print(f"{mode:<13} median {median[mode]:,.0f} records/s, {told}")
    cost = 1 - median["exactly_once"] / median["idempotent"]
    print(json.dumps({"exactly_once_costs": round(cost, 3), "at_most": 0.15}))


if __name__ == "__main__":
    main()
