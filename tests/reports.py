"""Step reports made by hand: what an engine could have said, without one."""

from collections.abc import Sequence

import numpy as np

from streamlstm.engine.report import EXPERTS, Forecasts, Outcome, StepReport, Update
from streamlstm.records.batch import Messages, Range, RecordBatch, Rejected, SeriesId

SECOND_NS = 10**9
START_NS = 1_795_075_200 * SECOND_NS  # 2026-11-19T08:00:00Z


def make_report(
    *,
    keys: Sequence[str] = ("a", "b"),
    records: int = 4,
    horizons: int = 3,
    topic: str = "in",
    partition: int = 0,
    first_offset: int = 0,
    time_ns: Sequence[int] | None = None,
    broker_ns: Sequence[int] | None = None,
    interval_ns: Sequence[int] | int = 10 * SECOND_NS,
    target: Sequence[float] | None = None,
    yhat: np.ndarray | None = None,
    error: np.ndarray | None = None,
    settled_offset: np.ndarray | None = None,
    warming: Sequence[bool] | None = None,
    outcome: Sequence[Outcome] | None = None,
    undecoded: Sequence[Rejected] = (),
    refused: Sequence[Rejected] = (),
    updates: Sequence[Update] = (),
    step: int = 1,
) -> StepReport:
    """Records of these keys taking turns on one partition, all forecast unless ``outcome`` says otherwise."""
    n = np.arange(records)
    times = START_NS + n * SECOND_NS if time_ns is None else np.array(time_ns, np.int64)
    outcomes = np.zeros(records, np.uint8) if outcome is None else np.array(outcome, np.uint8)
    fresh = np.flatnonzero(outcomes <= Outcome.WARMING).astype(np.int32)
    m = len(fresh)
    batch = RecordBatch(
        cut=(Range(topic, partition, first_offset, first_offset + records + len(undecoded)),),
        series=tuple(SeriesId(topic, partition, key) for key in keys),
        code=(n % len(keys)).astype(np.int32),
        range_index=np.zeros(records, np.int32),
        offset=first_offset + n,
        row=np.zeros(records, np.int32),
        time_ns=times,
        broker_ns=times if broker_ns is None else np.array(broker_ns, np.int64),
        target=n.astype(np.float64) if target is None else np.array(target, np.float64),
        rejected=tuple(undecoded),
    )
    forecasts = Forecasts(
        record_M=fresh,
        clock_M=n[fresh],
        age_M=n[fresh],
        interval_ns_M=np.broadcast_to(np.array(interval_ns, np.int64), m).copy(),
        update_M=np.full(m, 7),
        warming_M=np.zeros(m, bool) if warming is None else np.array(warming, bool),
        yhat_MK=np.arange(m * horizons, dtype=np.float64).reshape(m, horizons) if yhat is None else yhat,
        settled_error_MXK=np.full((m, len(EXPERTS), horizons), np.nan) if error is None else error,
        settled_offset_MK=np.full((m, horizons), -1) if settled_offset is None else settled_offset,
    )
    return StepReport(
        step=step,
        batch=batch,
        outcome_N=outcomes,
        rejected=(*undecoded, *refused),
        forecasts=forecasts,
        updates=tuple(updates),
        resets={},
        series_total=len(keys),
        series_warming=0,
    )


def make_update(number: int, **changes: object) -> Update:
    """An update like any other."""
    facts = {
        "rule": "A",
        "windows": 2,
        "used": 2,
        "loss": 0.25,
        "gradient_norm": 0.5,
        "clipped": False,
        "skipped": False,
        "rolled_back": False,
        "lag_ns": 3 * SECOND_NS,
    }
    return Update(number=number, **{**facts, **changes})  # type: ignore[arg-type]  # because the values are mixed


def make_messages(values: Sequence[bytes | None], **changes: object) -> Messages:
    """Messages of one partition from offset 0."""
    n = len(values)
    facts = {
        "cut": (Range("in", 0, 0, n),),
        "range_index": np.zeros(n, np.int32),
        "offset": np.arange(n),
        "broker_ns": START_NS + np.arange(n) * SECOND_NS,
        "key": [None] * n,
        "value": list(values),
        "headers": None,
    }
    return Messages(**{**facts, **changes})  # type: ignore[arg-type]  # because the values are mixed
