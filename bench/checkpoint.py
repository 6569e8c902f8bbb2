"""
What a checkpoint costs: how long steps stall while it is written, and write and load against the same bytes raw.

    python bench/checkpoint.py [--series N] [--directory DIR]

Live-like cuts of random series are stepped through the real engine on one thread, first with no checkpoint and then
while a background thread writes one; the stall is how much longer a step took than the median of those before, which
held the same number of records. The peers are in the same run: the same number of bytes written and fsynced by one
``write`` loop, and read back, each from the disk and not from what the kernel still holds of it; in blocks as long as
is quickest.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from streamlstm.cli import interpreter
from streamlstm.cli.device import prepare_device
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.records.batch import Range, RecordBatch, SeriesId
from streamlstm.recovery.background import in_a_thread
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.transport.interfaces import Position

PER_STEP = 500
WRITTEN_AT_ONCE = 256 << 10
READ_AT_ONCE = 1 << 20


def config() -> Config:
    """The defaults, but for a fixed interval."""
    return Config.model_validate(
        {
            "runtime": {"device": "cpu"},
            "source": {"type": "files"},
            "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
            "series": {"interval": "10s", "max_series": 1_000_000},
        }
    )


class Cuts:
    """Cuts of random series, each series' own time going on."""

    def __init__(self, series: int) -> None:
        self.names = [SeriesId("bench", 0, f"series-{i:07d}") for i in range(series)]
        self.seen = np.zeros(series, np.int64)
        self.rng = np.random.default_rng(1)
        self.offset = 0

    def of(self, chosen: np.ndarray) -> RecordBatch:
        """One record of each of these."""
        count = len(chosen)
        self.seen[chosen] += 1
        start, self.offset = self.offset, self.offset + count
        return RecordBatch(
            cut=(Range("bench", 0, start, start + count),),
            series=tuple(self.names[i] for i in chosen),
            code=np.arange(count, dtype=np.int32),
            range_index=np.zeros(count, np.int32),
            offset=np.arange(start, start + count),
            row=np.zeros(count, np.int32),
            time_ns=self.seen[chosen] * 10_000_000_000,
            broker_ns=np.full(count, -1, np.int64),
            target=self.rng.normal(size=count),
        )

    def random(self) -> RecordBatch:
        """As live: of whoever happens to have one."""
        return self.of(self.rng.choice(len(self.names), PER_STEP, replace=False))


def provenance() -> Provenance:
    return Provenance(
        "bench", "bench", (Position("bench", 0, 0),), {"bench": "id"}, None, Settings("bench", "", {}, {}), {}, 0
    )


def timed_steps(engine: Engine, cuts: Cuts, until) -> list[float]:
    """Seconds of each step, until asked to stop."""
    spent = []
    while not until(len(spent)):
        batch = cuts.random()
        began = time.perf_counter()
        engine.step(batch)
        spent.append(time.perf_counter() - began)
    return spent


def raw_write(path: Path, size: int) -> float:
    block = os.urandom(WRITTEN_AT_ONCE)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for left in range(size, 0, -WRITTEN_AT_ONCE):
            file.write(block[: min(left, WRITTEN_AT_ONCE)])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def raw_read(paths: list[Path]) -> float:
    began = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_AT_ONCE):
                pass
    return time.perf_counter() - began


def settle(size: int) -> None:
    """
    Let as much memory as all files together take be there for whoever comes next, ours or the peer.

    A virtual machine's host takes back what is free, and may wait for it to be asked for, page by page, ten times as
    long as the rest takes: then what is measured is which of the two came after a large file was removed.
    """
    touched = np.empty(3 * size, np.uint8)
    touched[::4096] = 1


def forget(paths: list[Path]) -> None:
    """Have the kernel drop what it holds of these files, as after a crash of the machine."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def told(name: str, values: list[float]) -> str:
    a, b, c = (float(np.quantile(values, q)) * 1e3 for q in (0.5, 0.99, 1.0))
    return f"{name:<44}{a:8.1f} {b:8.1f} {c:8.1f} ms"


def measure_disk(store: CheckpointStore, engine: Engine, cuts: Cuts, directory: Path) -> None:
    """Write and load, each beside its peer."""
    writes, raws = [], []
    size = store.verify(store.steps()[-1]).bytes
    for _ in range(3):
        engine.step(cuts.random())  # so that it is a new one, and removing an old one no part of it
        state = engine.state()
        settle(size)
        began = time.perf_counter()
        generation = store.write(state, provenance()).generation
        writes.append(time.perf_counter() - began)
        del state
        store.prune(Keep(last=1))
        settle(size)
        raws.append(raw_write(directory / "raw", generation.bytes))
        (directory / "raw").unlink()
    size = generation.bytes
    paths = sorted((directory / "state" / f"{generation.step:020d}").iterdir())
    reads, loads = [], []
    for _ in range(3):
        forget(paths)
        settle(size)
        reads.append(raw_read(paths))
        forget(paths)
        settle(size)
        began = time.perf_counter()
        store.load(generation.step)
        loads.append(time.perf_counter() - began)
    print(f"{size / 1e6:.0f} MB, {size / len(cuts.names):.0f} bytes a series")
    for what, ours, peer in (
        ("write + fsync", min(writes), min(raws)),
        ("load + verify, from the disk", min(loads), min(reads)),
    ):
        print(f"{what:<36} {ours:6.2f} s   raw {peer:6.2f} s   {ours / peer:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--series", type=int, default=100_000)
    parser.add_argument("--directory", type=Path, default=None)
    asked = parser.parse_args()
    interpreter.share_often()  # as `streamlstm run` does, and below
    engine, cuts = Engine.create(config(), prepare_device(config())), Cuts(asked.series)
    for _ in range(2):
        for start in range(0, asked.series, 2000):
            engine.step(cuts.of(np.arange(start, min(start + 2000, asked.series))))
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=asked.directory))
    store = open_store(directory / "state").open()
    print(f"torch {torch.__version__}, 1 thread, {asked.series} series, {PER_STEP} records of random series a step")
    print(f"{'':<44}{'median':>8} {'p99':>8} {'max':>11}")

    interpreter.freeze()
    quiet = timed_steps(engine, cuts, lambda n: n >= 150)
    began = time.perf_counter()
    state = engine.state()
    snapshot = time.perf_counter() - began
    done = threading.Event()
    results = []

    def write(state=state) -> None:
        began = time.perf_counter()
        results.append((store.write(state, provenance(), last=True), time.perf_counter() - began))
        done.set()

    del state
    in_a_thread(write)
    write.__defaults__ = ()
    busy = timed_steps(engine, cuts, lambda _: done.is_set())
    usual = statistics.median(quiet)
    print(told("step, nothing beside", quiet))
    print(told(f"step, checkpoint being written ({len(busy)} steps)", busy))
    print(told("stall, nothing beside", [max(0.0, s - usual) for s in quiet]))
    print(told("stall, checkpoint being written", [max(0.0, s - usual) for s in busy]))
    print(f"snapshot itself {snapshot * 1e3:.1f} ms; written beside {len(busy)} steps in {results[0][1]:.1f} s")

    measure_disk(store, engine, cuts, directory)
    store.close()
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
