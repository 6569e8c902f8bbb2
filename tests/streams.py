"""Random streams for the engine's laws: many series, and everything that can happen to a record."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.report import StepReport
from streamlstm.engine.state import EngineState
from streamlstm.records.batch import Range, RecordBatch, Rejected, SeriesId
from streamlstm.series.table import Rows

SECOND = 1_000_000_000


def small_config(**sections: dict[str, Any]) -> Config:
    """A configuration small enough that thousands of records take a second."""
    base: dict[str, dict[str, Any]] = {
        "source": {"type": "files"},
        "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
        "series": {"gap_reset": "400s"},
        "model": {"hidden_size": 5, "horizons": 3, "season": 4},
        "training": {"k1": 4, "k2": 10, "batch_series": 5, "max_wait": 40},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)


def random_batch(seed: int, count: int, series: int, kind: str) -> RecordBatch:
    """
    ``count`` records of ``series`` series in one partition.

    ``kind`` is how they take turns: ``lockstep``, ``runs``, ``skewed`` or ``mixed``. Some come late or twice, some have
    no value, some jump, some leave a gap, some lie in the future, some offsets were rejected by decoding, and some hold
    tombstones that reset a series.
    """
    rng = np.random.default_rng(seed)
    if kind == "lockstep":
        code = np.arange(count) % series
    elif kind == "runs":
        code = np.repeat(rng.integers(0, series, count), rng.integers(1, 30, count))[:count]
    elif kind == "skewed":
        code = np.minimum(series - 1, rng.zipf(1.3, count) - 1)
    else:
        code = np.where(rng.random(count) < 0.5, np.arange(count) % series, rng.integers(0, series, count))
    interval = rng.integers(5, 20, series)
    now = np.full(series, 10**6)
    time = np.zeros(count, np.int64)
    for i, q in enumerate(code):
        now[q] += interval[q] * (1 if rng.random() < 0.93 else rng.integers(2, 9)) + rng.integers(-1, 2)
        now[q] += 1000 if rng.random() < 0.01 else 0
        back = interval[q] * rng.integers(0, 4) if rng.random() < 0.05 else 0
        time[i] = now[q] - back
    target = np.cumsum(rng.normal(size=count))
    target[rng.random(count) < 0.02] += 300
    target[rng.random(count) < 0.03] = np.nan
    broker = time * SECOND
    broker[rng.random(count) < 0.02] -= 2 * 86_400 * SECOND
    lost = rng.random(count) < 0.03
    gone = ~lost & (rng.random(count) < 0.03)
    return batch_of(code, time * SECOND, target, broker, np.arange(count), lost, gone)


def batch_of(
    code: NDArray[Any],
    time_ns: NDArray[Any],
    target: NDArray[Any],
    broker_ns: NDArray[Any] | None = None,
    offset: NDArray[Any] | None = None,
    lost: NDArray[np.bool_] | None = None,
    gone: NDArray[np.bool_] | None = None,
) -> RecordBatch:
    """One record per offset of one partition; ``lost`` were rejected by decoding, ``gone`` are tombstones."""
    count = len(code)
    offset = np.arange(count) if offset is None else offset
    lost = np.zeros(count, np.bool_) if lost is None else lost
    gone = np.zeros(count, np.bool_) if gone is None else gone
    broker_ns = np.full(count, -1) if broker_ns is None else broker_ns
    kept = np.flatnonzero(~lost & ~gone)
    names, first, inverse = np.unique(code[kept], return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    start, end = (int(offset[0]), int(offset[-1]) + 1) if count else (0, 0)
    series = [SeriesId("in", 0, f"s{names[q]}") for q in order]
    resets = [SeriesId("in", 0, f"s{code[at]}") for at in np.flatnonzero(gone)]
    series = list(dict.fromkeys((*series, *resets)))
    return RecordBatch(
        cut=(Range("in", 0, start, end),),
        series=tuple(series),
        code=rank[inverse].astype(np.int32),
        range_index=np.zeros(len(kept), np.int32),
        offset=offset[kept].astype(np.int64),
        row=np.zeros(len(kept), np.int32),
        time_ns=time_ns[kept].astype(np.int64),
        broker_ns=broker_ns[kept].astype(np.int64),
        target=target[kept].astype(np.float64),
        rejected=tuple(Rejected("in", 0, int(at), 0, "decode", "", "not JSON") for at in offset[lost]),
        skipped=int(gone.sum()),
        reset_at=np.searchsorted(kept, np.flatnonzero(gone)).astype(np.int32),
        reset_code=np.array([series.index(one) for one in resets], np.int32),
    )


def part(batch: RecordBatch, start: int, end: int) -> RecordBatch:
    """The records at offsets ``start … end - 1`` of a one-partition batch, as their own cut."""
    # Of a tombstone only its place among the records is known; anywhere between them is as good.
    after = np.r_[batch.cut[0].start - 1, batch.offset][batch.reset_at] + 1
    rejected = tuple(r for r in batch.rejected if start <= r.offset < end)
    here = (batch.offset >= start) & (batch.offset < end)
    return chosen(batch, here, (after >= start) & (after < end), Range("in", 0, start, end), rejected)


def chosen(
    batch: RecordBatch,
    records: NDArray[np.bool_],
    resets: NDArray[np.bool_],
    cut: Range,
    rejected: tuple[Rejected, ...] = (),
) -> RecordBatch:
    """Some of a batch's records and tombstones."""
    here, code, reset_code = np.flatnonzero(records), batch.code[records], batch.reset_code[resets]
    first = {q: i for i, q in enumerate(dict.fromkeys((*code.tolist(), *reset_code.tolist())))}
    return RecordBatch(
        cut=(cut,),
        series=tuple(batch.series[q] for q in first),
        code=np.array([first[q] for q in code.tolist()], np.int32),
        range_index=np.zeros(len(here), np.int32),
        offset=batch.offset[here],
        row=batch.row[here],
        time_ns=batch.time_ns[here],
        broker_ns=batch.broker_ns[here],
        target=batch.target[here],
        rejected=rejected,
        skipped=int(resets.sum()),
        reset_at=np.r_[0, np.cumsum(records)][batch.reset_at[resets]].astype(np.int32),
        reset_code=np.array([first[q] for q in reset_code.tolist()], np.int32),
    )


def run(
    config: Config, batch: RecordBatch, cuts: list[int], resumes: frozenset[int] = frozenset(), kind: Any = Engine
) -> tuple[Any, list[StepReport]]:
    """Feed the batch in steps that end at ``cuts``; after the steps in ``resumes`` a restored engine goes on."""
    engine = kind.create(config, "cpu")
    reports: list[StepReport] = []
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        reports.append(engine.step(part(batch, start, end)))
        if i in resumes:
            engine = kind.restore(config, "cpu", engine.state())
    return engine, reports


class Shelf:
    """Series beyond memory, in a dictionary. See :class:`~streamlstm.engine.state.Stored`."""

    origin, until = "", None

    def __init__(self, held: dict[SeriesId, Rows]) -> None:
        self.held = held

    def places(self) -> list[tuple[str, int]]:
        return sorted({(one.topic, one.partition) for one in self.held})

    def rows(self, topic: str, partition: int) -> Iterator[Rows]:
        return (rows for one, rows in self.held.items() if (one.topic, one.partition) == (topic, partition))

    def close(self) -> None:
        pass


class Shelved:
    """An engine whose series leave for a shelf, and come back when they have a record."""

    def __init__(self, engine: Engine, held: dict[SeriesId, Rows]) -> None:
        self.engine, self.held = engine, held
        self.left = self.returned = 0

    @classmethod
    def create(cls, config: Config, device: str) -> "Shelved":
        return cls(Engine.create(config, device), {})

    @classmethod
    def restore(cls, config: Config, device: str, state: EngineState) -> "Shelved":
        held = dict(state.stored.held) if isinstance(state.stored, Shelf) else {}
        return cls(Engine.restore(config, device, state), held)

    def step(self, batch: RecordBatch) -> StepReport:
        back = [self.held.pop(one) for one in self.engine.absent(batch) if one in self.held]
        returning = None
        if back:
            columns = {name: torch.cat([rows.columns[name] for rows in back]) for name in back[0].columns}
            returning = Rows(tuple(one for rows in back for one in rows.series), columns)
        report = self.engine.step(batch, returning)
        if leaving := self.engine.evict():
            self.held |= {one: leaving.pick(np.array([i])) for i, one in enumerate(leaving.series)}
        until = self.engine.forgets_until
        if until is not None:
            seen = {one: int(rows.columns["seen_ns"]) for one, rows in self.held.items()}
            self.held = {one: rows for one, rows in self.held.items() if seen[one] > until}
        self.left += len(leaving or ())
        self.returned += len(back)
        return report

    def state(self) -> EngineState:
        return dataclasses.replace(self.engine.state(), stored=Shelf(dict(self.held)))


def outputs(reports: list[StepReport]) -> dict[str, bytes]:
    """Everything that was published, concatenated over steps: bytes, so that NaN equals NaN."""
    columns: dict[str, list[bytes]] = {}
    for report in reports:
        f = report.forecasts
        for name, values in (
            ("outcome", report.outcome_N),
            ("offset", report.batch.offset),
            ("forecast_offset", report.batch.offset[f.record_M]),
            ("clock", f.clock_M),
            ("age", f.age_M),
            ("interval", f.interval_ns_M),
            ("update", f.update_M),
            ("yhat", f.yhat_MK),
            ("settled_error", f.settled_error_MXK),
            ("settled_offset", f.settled_offset_MK),
        ):
            columns.setdefault(name, []).append(np.ascontiguousarray(values).tobytes())
    joined = {name: b"".join(parts) for name, parts in columns.items()}
    joined["updates"] = repr([update for report in reports for update in report.updates]).encode()
    joined["rejected"] = repr([rejected for report in reports for rejected in report.rejected]).encode()
    return joined
