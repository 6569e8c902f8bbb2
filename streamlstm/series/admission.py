"""
Admission: every record is placed on its own series' clock, or turned away.

All decisions come from timestamps in the log and from the configuration, in the order of the log. They are integers
only, so they can be taken for a whole batch before any forecast is computed.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from streamlstm.config.model import Config
from streamlstm.records.batch import I32, I64, RecordBatch
from streamlstm.series.table import Column, SeriesTable

GAPS = 8
"""Positive gaps from which ``interval: auto`` is learnt."""

_NS = 1_000_000_000

BEGINNING = -(1 << 63)
"""The watermark before any record."""

# Hostile timestamps must not overflow a clock: 2**61 ns are 73 years, and a leap of 2**32 intervals has long expired
# all that was open.
_LONGEST_GAP = 1 << 61
_LONGEST_LEAP = 1 << 32


class Verdict(IntEnum):
    """What admission says of a record."""

    FRESH = 0
    LATE = 1
    DUPLICATE = 2
    FUTURE = 3


@dataclass(frozen=True, slots=True)
class Rules:
    """
    The configuration's part of every decision. Times in ns; ``fixed_interval`` is 0 for none.

    A series is warming while its age is below ``warm_age``.
    """

    k2: int
    warm_age: int
    learn_interval: bool
    fixed_interval: int
    gap_reset: int | None
    max_ahead: int
    ttl: int | None = None

    @classmethod
    def of(cls, config: Config) -> "Rules":
        """From a configuration."""
        interval, gap, ttl = config.series.interval, config.series.gap_reset, config.series.ttl
        return cls(
            k2=config.k2,
            warm_age=max(config.k2, 2 * config.model.horizons),
            learn_interval=interval == "auto",
            fixed_interval=round(interval * _NS) if isinstance(interval, float) else 0,
            gap_reset=None if gap is None else round(gap * _NS),
            max_ahead=round(config.series.max_ahead * _NS),
            ttl=None if ttl is None else round(ttl * _NS),
        )


@dataclass(frozen=True, slots=True)
class Admitted:
    """
    N verdicts, and the M fresh records in the batch's order.

    ``clock_M`` is n, ``age_M`` is m. ``restart_M`` marks a record whose carry starts from zero: a new series, one
    that returns after ``gap_reset`` (``gap_resets`` of them), or after a tombstone (``control_resets`` series were told
    to); ``forgotten_M`` a new one that had a state before, which counts no more. ``interval_ns_M`` is 0 while it is not
    known. ``warming_change`` is how many more series are warming than before, ``watermark`` the shard's after these
    records.
    """

    verdict_N: NDArray[np.uint8]
    record_M: I32
    slot_M: I64
    clock_M: I64
    age_M: I64
    interval_ns_M: I64
    restart_M: NDArray[np.bool_]
    forgotten_M: NDArray[np.bool_]
    gap_resets: int
    control_resets: int
    warming_change: int
    watermark: int


def clock_columns(k2: int) -> list[Column]:
    """
    What a series' clock is made of: a ring of the times of its last k2 records, by m mod k2, among others.

    A series has a clock from its first record on: clock 0 says that none was seen, and that the rest means nothing.
    Age 0 on a running clock says that its next record starts anew.
    ``seen_ns`` is the watermark at its newest fresh record.
    """
    return [
        Column("time_ns", (), torch.int64, host=True),
        Column("clock", (), torch.int64, host=True),
        Column("age", (), torch.int64, host=True),
        Column("interval_ns", (), torch.int64, host=True),
        Column("gaps_ns", (GAPS,), torch.int64, host=True),
        Column("gap_count", (), torch.int64, host=True),
        Column("recent_ns", (k2,), torch.int64, host=True),
        Column("seen_ns", (), torch.int64, host=True),
    ]


def admit(  # noqa: C901, PLR0912, PLR0915, because it is one pass over the log, and its state is its locals
    table: SeriesTable, rules: Rules, batch: RecordBatch, watermark: int = BEGINNING
) -> Admitted:
    """
    Place the N records of a batch, in its order, and move the clocks of their series.

    A timestamp more than ``max_ahead`` past the broker's is refused before its series is looked at, or one bad record
    would block the series for a year. A duplicate is a timestamp still in the retained window; anything else not after
    the newest is late. ``n`` advances by max(1, round(Δt / interval)), half up; a gap longer than ``gap_reset``
    restarts the age and forgets window and interval, and counts as one interval. So does the first record after a
    tombstone of its series; a series that was never seen, or is to start anew already, has nothing to reset.

    The watermark is the running maximum of the broker's times, of event times where there are none. A series whose
    newest fresh record lies ``ttl`` or more behind it is forgotten at its next record, and starts as a new one.
    """
    slots = [table.slot_of.get(series, -1) for series in batch.series]
    known_Q = np.array([slot >= 0 for slot in slots], np.bool_)
    selection = table.select(np.array([slot for slot in slots if slot >= 0], np.int64))

    def load(name: str) -> NDArray[np.int64]:
        values = table.blank(name, len(slots)).numpy()
        values[known_Q] = table.gather(name, selection).numpy()
        return values

    gaps, recent = load("gaps_ns"), load("recent_ns")
    time, n, m = load("time_ns").tolist(), load("clock").tolist(), load("age").tolist()
    interval, gap_count, seen = load("interval_ns").tolist(), load("gap_count").tolist(), load("seen_ns").tolist()
    water_N = np.maximum.accumulate(np.r_[watermark, np.where(batch.broker_ns < 0, batch.time_ns, batch.broker_ns)])
    warming = _warming(n, m, rules.warm_age)

    verdicts = bytearray(len(batch))
    fresh: list[int] = []
    fresh_code: list[int] = []
    fresh_n: list[int] = []
    fresh_m: list[int] = []
    fresh_interval: list[int] = []
    restarts: list[bool] = []
    forgotten: list[bool] = []
    resets = controls = 0
    k2, max_ahead, gap_reset, learn = rules.k2, rules.max_ahead, rules.gap_reset, rules.learn_interval
    ttl = rules.ttl

    def reset(until: int) -> None:
        """Whatever tombstones stand before record ``until``."""
        nonlocal pending, controls
        while pending < len(reset_at) and reset_at[pending] <= until:
            q = reset_code[pending]
            controls += m[q] > 0
            m[q] = 0
            pending += 1

    reset_at, reset_code, pending = batch.reset_at.tolist(), batch.reset_code.tolist(), 0
    gap = 0
    for i, (q, t, broker, water) in enumerate(
        zip(batch.code.tolist(), batch.time_ns.tolist(), batch.broker_ns.tolist(), water_N[1:].tolist(), strict=True)
    ):
        if pending < len(reset_at):
            reset(i)
        if broker >= 0 and t > broker + max_ahead:
            verdicts[i] = Verdict.FUTURE
            continue
        newest = time[q]
        forget = ttl is not None and n[q] > 0 and water - seen[q] >= ttl
        if forget:
            n[q] = m[q] = gap_count[q] = 0
            gaps[q] = recent[q] = 0
        if not n[q]:
            if slots[q] < 0:
                slots[q] = table.add(batch.series[q])
            n[q] = m[q] = 1
            interval[q] = rules.fixed_interval
            restart = True
        else:
            if t <= newest:
                retained = recent[q] if m[q] >= k2 else recent[q, 1 : m[q] + 1]
                verdicts[i] = Verdict.DUPLICATE if (retained == t).any() else Verdict.LATE
                continue
            gap = min(t - newest, _LONGEST_GAP)
            silent = gap_reset is not None and gap > gap_reset
            restart = silent or not m[q]
            if restart:
                resets += bool(m[q])
                interval[q], gap_count[q] = rules.fixed_interval, 0
                gaps[q] = 0
                n[q] += 1
                m[q] = 1
            else:
                spacing = interval[q]
                n[q] += min(max(1, (2 * gap + spacing) // (2 * spacing)), _LONGEST_LEAP) if spacing else 1
                m[q] += 1
        fresh_interval.append(interval[q])
        if learn and not restart and not interval[q]:
            gaps[q, gap_count[q]] = gap
            gap_count[q] += 1
            if gap_count[q] == GAPS:
                interval[q] = int(np.sort(gaps[q])[(GAPS - 1) // 2])
        time[q] = t
        seen[q] = water
        recent[q, m[q] % k2] = t
        fresh.append(i)
        fresh_code.append(q)
        fresh_n.append(n[q])
        fresh_m.append(m[q])
        restarts.append(restart)
        forgotten.append(forget)
    reset(len(batch))

    slot_Q = np.array(slots, np.int64)
    known_Q = slot_Q >= 0
    selection = table.select(slot_Q[known_Q])
    for name, values in (
        ("time_ns", np.array(time, np.int64)),
        ("clock", np.array(n, np.int64)),
        ("age", np.array(m, np.int64)),
        ("interval_ns", np.array(interval, np.int64)),
        ("gaps_ns", gaps),
        ("gap_count", np.array(gap_count, np.int64)),
        ("recent_ns", recent),
        ("seen_ns", np.array(seen, np.int64)),
    ):
        table.scatter(name, selection, torch.from_numpy(values[known_Q]))
    return Admitted(
        verdict_N=np.frombuffer(bytes(verdicts), np.uint8),
        record_M=np.array(fresh, np.int32),
        slot_M=slot_Q[np.array(fresh_code, np.int64)] if fresh else np.empty(0, np.int64),
        clock_M=np.array(fresh_n, np.int64),
        age_M=np.array(fresh_m, np.int64),
        interval_ns_M=np.array(fresh_interval, np.int64),
        restart_M=np.array(restarts, np.bool_),
        forgotten_M=np.array(forgotten, np.bool_),
        gap_resets=resets,
        control_resets=controls,
        warming_change=_warming(n, m, rules.warm_age) - warming,
        watermark=int(water_N[-1]),
    )


def _warming(clocks: list[int], ages: list[int], warm_age: int) -> int:
    """How many of these series have begun and are not warm yet."""
    return sum(clock > 0 and age < warm_age for clock, age in zip(clocks, ages, strict=True))
