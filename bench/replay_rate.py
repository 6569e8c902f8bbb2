"""
How fast recorded steps are computed again, beside how fast they were made: by a start after kill -9, and by `verify`.

    python bench/replay_rate.py BOOTSTRAP [--records 200000] [--series 1000] [--partitions 4] [--poll 2000]

The daemon reads a full topic as fast as it can, with no checkpoint but generation 0, is killed at the end of it, and
has to compute all of it again when it starts; then `verify --from 0` does the same. The ratios are to the live rate of
the same run.
"""

import argparse
import json
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from driving import (
    CONFIG,
    STREAMLSTM,
    accounted,
    create_topics,
    follow,
    make_topics,
    metrics,
    produce,
    start,
    write_records,
)


def consume(daemon: subprocess.Popen[bytes], port: int, records: int, log: Path) -> float:
    """Records a second from the first that was seen to the last."""
    first: tuple[float, float] | None = None
    for now, seen in follow(daemon, port, log, 0.1):
        done = accounted(seen)
        first = first or ((now, done) if done else None)
        if done >= records:
            break
    return (done - first[1]) / (now - first[0])


def resumed(port: int, log: Path) -> tuple[float, float]:
    """Seconds in which recorded steps were computed again, and how many they were."""
    while '"ready"' not in log.read_text():
        time.sleep(0.2)
    seen = metrics(port)
    seconds = next(v for k, v in seen.items() if re.match(r'streamlstm_resume_duration_seconds{.*"replay"', k))
    return seconds, seen["streamlstm_replayed_steps_total"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bootstrap")
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--series", type=int, default=1_000)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--poll", type=int, default=2_000, help="source.poll.max_records: how long a live step is")
    parser.add_argument("--port", type=int, default=9179)
    parser.add_argument("--keep", type=Path, help="a directory to leave configuration and state in, to measure again")
    a = parser.parse_args()
    prefix = f"replay-{int(time.time())}"
    with tempfile.TemporaryDirectory() as folder:
        base = a.keep or Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        write_records(base / "records.ndjson", a.records, a.series)
        config, log = base / "c.yaml", base / "log"
        text = CONFIG.format(
            name=prefix, bootstrap=a.bootstrap, topic=f"{prefix}.raw", state=base / "state", port=a.port
        )
        text = text.replace("checkpoint: {", "checkpoint: {every: {time: 7d, records: 1000000000}, ")
        text = text.replace("source: {", f"source: {{poll: {{max_records: {a.poll}}}, ")
        config.write_text(text + "logging: {format: json}\n")
        make_topics(a.bootstrap, a.partitions, f"{prefix}.raw")
        create_topics(config)
        produce(a.bootstrap, f"{prefix}.raw", base / "records.ndjson")

        daemon = start(config, log)
        live = consume(daemon, a.port, a.records, log)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        print(f"live     {live:>10,.0f} records/s")

        daemon = start(config, log)
        seconds, steps = resumed(a.port, log)
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(timeout=60)
        rate = a.records / seconds
        print(f"restart  {rate:>10,.0f} records/s, {rate / live:.1f} x live ({steps:,.0f} steps)")

        verify = [*STREAMLSTM, "verify", "-c", str(config), "--from", "0", "--json"]
        told = json.loads(subprocess.run(verify, check=True, stdout=subprocess.PIPE).stdout)
        rate = told["messages_per_second"]
        print(f"verify   {rate:>10,.0f} records/s, {rate / live:.1f} x live; holds: {told['holds']}")


if __name__ == "__main__":
    main()
