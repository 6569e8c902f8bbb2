"""
Forecasts to JSON: records/s of the template encoder against msgspec.json.encode of dicts, in one run, on one core.

python bench/encode.py
"""

import sys
import time
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np

from streamlstm.engine.report import EXPERTS, Forecasts, StepReport
from streamlstm.records.batch import Range, RecordBatch, SeriesId
from streamlstm.service.encode import ForecastEncoder

_START_NS = 1_795_075_200 * 10**9
_HASH = "deadbeef" * 8


def report(records: int, series: int, horizons: int, jitter_ns: int) -> StepReport:
    rng = np.random.default_rng(17)
    n = np.arange(records)
    time_ns = _START_NS + n // series * 10 * 10**9 + rng.integers(0, jitter_ns + 1, records)
    batch = RecordBatch(
        cut=(Range("metrics.raw", 3, 0, records),),
        series=tuple(SeriesId("metrics.raw", 3, f"host-{i}|cpu") for i in range(series)),
        code=(n % series).astype(np.int32),
        range_index=np.zeros(records, np.int32),
        offset=n,
        row=np.zeros(records, np.int32),
        time_ns=time_ns,
        broker_ns=time_ns,
        target=rng.normal(40, 10, records),
    )
    forecasts = Forecasts(
        record_M=n.astype(np.int32),
        clock_M=n,
        age_M=n,
        interval_ns_M=np.full(records, 10 * 10**9),
        update_M=n // 500,
        warming_M=np.zeros(records, bool),
        yhat_MK=rng.normal(40, 10, (records, horizons)),
        settled_error_MXK=np.full((records, len(EXPERTS), horizons), np.nan),
        settled_offset_MK=np.full((records, horizons), -1),
    )
    return StepReport(1, batch, np.zeros(records, np.uint8), (), forecasts, (), {}, series, 0)


def naive(r: StepReport) -> list[bytes]:
    encode, out, batch = msgspec.json.Encoder().encode, r.forecasts, r.batch
    values = []
    for i in range(len(out)):
        k = int(out.record_M[i])
        cutoff = datetime.fromtimestamp(int(batch.time_ns[k]) / 1e9, UTC)
        spacing = timedelta(seconds=int(out.interval_ns_M[i]) / 1e9)
        forecasts = [
            {"horizon": j, "ds": cutoff + j * spacing, "yhat": y} for j, y in enumerate(out.yhat_MK[i].tolist(), 1)
        ]
        values.append(
            encode(
                {
                    "schema": 1,
                    "series_id": batch.series[batch.code[k]].key,
                    "cutoff": cutoff,
                    "y": float(batch.target[k]),
                    "status": "ready",
                    "forecasts": forecasts,
                    "model": {"version": "0.1.0", "config": _HASH[:8], "revision": 0, "update": int(out.update_M[i])},
                    "source": {
                        "topic": "metrics.raw",
                        "partition": 3,
                        "offset": int(batch.offset[k]),
                        "row": int(batch.row[k]),
                    },
                }
            )
        )
    return values


def rate(f, records: int) -> float:
    best = min(_timed(f) for _ in range(5))
    return records / best


def _timed(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main() -> int:
    records = 2000
    print(f"{'horizons':>8} {'series':>6} {'times':>12} {'ours /s':>10} {'dicts /s':>10} {'ratio':>6}")
    for horizons, series, jitter_ns, label in (
        (24, 1000, 0, "whole s"),
        (24, 1, 0, "whole s"),
        (24, 1000, 10**9, "ns"),
        (1, 1000, 0, "whole s"),
        (1000, 100, 0, "whole s"),
    ):
        r = report(records, series, horizons, jitter_ns)
        encoder = ForecastEncoder(_HASH, horizons)
        ours = rate(lambda e=encoder, r=r: e.encode_forecasts(r), records)
        dicts = rate(lambda r=r: naive(r), records)
        print(f"{horizons:8d} {series:6d} {label:>12} {ours:10,.0f} {dicts:10,.0f} {ours / dicts:6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
