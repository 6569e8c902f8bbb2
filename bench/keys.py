"""
Memory under a million distinct keys: ``series.max_series`` bounds what is resident, the rest waits on the local disk.

    python bench/keys.py [--keys N] [--most N]

Each step brings new keys and some that were seen at any time before, so that series leave and return. The peer in
the same run is the same stream without a bound, for as long as ``--unbounded`` keys.
"""

import argparse
import gc
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from streamlstm.cli.device import prepare_device
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.records.batch import Range, RecordBatch, SeriesId
from streamlstm.recovery.stored import Room, TieredEngine

PER_STEP, RETURNING = 2000, 100


def config(most: int) -> Config:
    """A small network: it is the keys that count."""
    return Config.model_validate(
        {
            "runtime": {"device": "cpu"},
            "source": {"type": "files"},
            "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
            "series": {"interval": "10s", "max_series": most},
            "model": {"hidden_size": 8, "horizons": 2},
            "training": {"k1": 4, "k2": 8},
        }
    )


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def cut(number: int, fresh: int, rng: np.random.Generator) -> RecordBatch:
    """New keys, and some that were seen long ago."""
    new = np.arange(number * fresh, (number + 1) * fresh)
    old = rng.integers(0, max(1, number * fresh), RETURNING) if number else np.empty(0, np.int64)
    keys = np.unique(np.r_[new, old])
    count, start = len(keys), number * (fresh + RETURNING)
    return RecordBatch(
        cut=(Range("bench", 0, start, start + count),),
        series=tuple(SeriesId("bench", 0, f"key-{key:08d}") for key in keys.tolist()),
        code=np.arange(count, dtype=np.int32),
        range_index=np.zeros(count, np.int32),
        offset=np.arange(start, start + count),
        row=np.zeros(count, np.int32),
        time_ns=np.full(count, (number + 1) * 10_000_000_000),
        broker_ns=np.full(count, -1, np.int64),
        target=rng.normal(size=count),
    )


def run(most: int, keys: int, directory: Path) -> None:
    """Step through all keys, and say what is resident at each tenth."""
    engine = TieredEngine(Engine.create(config(most), "cpu"), Room(directory))
    rng, fresh = np.random.default_rng(1), PER_STEP - RETURNING
    told, began, report = 0, time.perf_counter(), None
    for number in range(-(-keys // fresh)):
        report = engine.step(cut(number, fresh, rng))
        seen = min(keys, (number + 1) * fresh)
        if seen * 10 // keys > told:
            told = seen * 10 // keys
            gc.collect()
            rate = (number + 1) * PER_STEP / (time.perf_counter() - began)
            stored = sum(path.stat().st_size for path in directory.glob("*.sqlite*")) / 1e6
            print(
                f"{seen:>9,} keys {report.series_total:>9,} in memory {report.series_stored:>9,} stored "
                f"{resident_mb():8.0f} MB resident {stored:8.0f} MB on disk {rate:8,.0f} records/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--most", type=int, default=20_000)
    parser.add_argument("--unbounded", type=int, default=100_000)
    asked = parser.parse_args()
    prepare_device(config(asked.most))  # as `streamlstm run` does
    with TemporaryDirectory() as directory:
        print(f"max_series {asked.most:,}")
        run(asked.most, asked.keys, Path(directory))
        gc.collect()
        print("no bound")
        run(10_000_000, asked.unbounded, Path(directory))


if __name__ == "__main__":
    main()
