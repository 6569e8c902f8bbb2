"""
How fast ``Engine.step`` takes records, on one core, ready in memory as columns.

    python bench/engine.py [--records N]

The peer in the same run is naive PyTorch: ``nn.LSTM``, autograd and ``optim.Adam``, with the same windows and hidden
size, forecasting every record and learning every k1 (one series at a time, as a plain online loop does it).
"""

import argparse
import time

import numpy as np
import torch
from torch import nn

from streamlstm.cli.device import prepare_device
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.records.batch import Range, RecordBatch, SeriesId

HORIZONS, HIDDEN, K1, K2 = 24, 64, 16, 48


def config() -> Config:
    return Config.model_validate(
        {
            "runtime": {"device": "cpu"},
            "source": {"type": "files"},
            "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
            "series": {"interval": "10s"},
            "model": {"horizons": HORIZONS, "hidden_size": HIDDEN},
            "training": {"k1": K1, "k2": K2},
        }
    )


def batches(series: int, records: int, per_step: int) -> list[RecordBatch]:
    rng = np.random.default_rng(1)
    names = tuple(SeriesId("bench", 0, f"s{i}") for i in range(series))
    level = np.zeros(series)
    out: list[RecordBatch] = []
    for start in range(0, records, per_step):
        n = np.arange(start, min(records, start + per_step))
        code = (n % series).astype(np.int32)
        noise = rng.normal(size=len(n))
        target = np.empty(len(n))
        for i, (q, e) in enumerate(zip(code.tolist(), noise.tolist(), strict=True)):
            level[q] = 0.95 * level[q] + e
            target[i] = level[q]
        held = min(series, len(n))
        order = code[:held]
        rank = np.empty(series, np.int32)
        rank[order] = np.arange(held)
        out.append(
            RecordBatch(
                cut=(Range("bench", 0, int(n[0]), int(n[-1]) + 1),),
                series=tuple(names[q] for q in order),
                code=rank[code],
                range_index=np.zeros(len(n), np.int32),
                offset=n.astype(np.int64),
                row=np.zeros(len(n), np.int32),
                time_ns=(n // series * 10_000_000_000).astype(np.int64),
                broker_ns=np.full(len(n), -1, np.int64),
                target=target,
            )
        )
    return out


def ours(series: int, records: int, per_step: int) -> float:
    """Records per second after a warm-up of 64 records a series."""
    engine = Engine.create(config(), "cpu")
    warm = max(64 * series, per_step)
    for batch in batches(series, warm, per_step):
        engine.step(batch)
    engine = Engine.create(config(), "cpu")
    work = batches(series, warm + records, per_step)
    cut = -(-warm // per_step)
    for batch in work[:cut]:
        engine.step(batch)
    start = time.perf_counter()
    done = sum(len(engine.step(batch).forecasts) for batch in work[cut:])
    return done / (time.perf_counter() - start)


def naive(records: int) -> float:
    """A plain online loop over one series."""
    lstm, head = nn.LSTM(7, HIDDEN, batch_first=True), nn.Linear(HIDDEN, HORIZONS)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()])
    x = torch.randn(1, records + K2, 7)
    y = torch.randn(1, records + K2, HORIZONS)
    carry = None
    start = time.perf_counter()
    for i in range(K2, K2 + records):
        with torch.no_grad():
            h, carry = lstm(x[:, i : i + 1], carry)
            head(h)
        if i % K1 == 0:
            h, _ = lstm(x[:, i - K2 : i])
            loss = nn.functional.huber_loss(head(h), y[:, i - K2 : i])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*lstm.parameters(), *head.parameters()], 1.0)
            optimizer.step()
    return records / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=0, help="timed records; default: enough for a few seconds")
    wanted = parser.parse_args().records
    prepare_device(config())  # as `streamlstm run` does; for the peer too
    print(f"torch {torch.__version__}, 1 thread, hidden {HIDDEN}, H={HORIZONS}, k1={K1}, k2={K2}; records/s")
    peer = naive(wanted or 4_000)
    print(f"{'naive PyTorch, 1 series':<34}{peer:>10,.0f}")
    for series, records, per_step in (
        (1, 8_000, 2_000),
        (16, 40_000, 2_000),
        (1_000, 200_000, 2_000),
        (1_000, 200_000, 16_000),
    ):
        rate = ours(series, wanted or records, per_step)
        print(f"{f'step, {series} series, {per_step} a step':<34}{rate:>10,.0f}   {rate / peer:6.1f} x naive")


if __name__ == "__main__":
    main()
