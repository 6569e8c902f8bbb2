"""
What a step says happened: columns of facts on which the shell acts.

Axes: N records of the batch, M fresh records (those that were forecast), K horizons, X experts.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from streamlstm.records.batch import F64, I32, I64, RecordBatch, Rejected

EXPERTS = ("lstm", "last_value", "seasonal_naive")
"""The X axis of :attr:`Forecasts.settled_error_MXK`."""


class Outcome(IntEnum):
    """What a record ended as: exactly one of these."""

    FORECAST = 0
    WARMING = 1
    LATE = 2
    DUPLICATE = 3
    SKIPPED = 4
    DEAD = 5


@dataclass(frozen=True, slots=True)
class Forecasts:
    """
    One row per fresh record, in the batch's order.

    ``record_M`` is its index in the batch. ``clock_M`` is the series' own n, ``age_M`` its m.
    ``interval_ns_M`` is the learnt spacing, 0 where there is none (then no forecast has a ``ds``); horizon j speaks
    about ``time_ns + j * interval_ns``. ``yhat_MK`` is NaN only while a series has had no value at all.
    ``update_M`` numbers the weights that were used. ``settled_error_MXK[i, x, j-1]`` is the truth of record i
    minus what expert x had forecast for it j intervals earlier, NaN where nothing was; that forecast was issued by
    the record at ``settled_offset_MK[i, j-1]`` of the same partition (-1: none).
    """

    record_M: I32
    clock_M: I64
    age_M: I64
    interval_ns_M: I64
    update_M: I64
    warming_M: NDArray[np.bool_]
    yhat_MK: F64
    settled_error_MXK: F64
    settled_offset_MK: I64

    def __len__(self) -> int:
        return len(self.record_M)


@dataclass(frozen=True, slots=True)
class Update:
    """
    One optimizer step, or one that was skipped because loss or gradient were not finite.

    ``rule`` is the letter of the queue's rule that fired. ``windows`` were queued, ``used`` of them learnt from.
    ``lag_ns`` is how far the newest truth learnt from lies behind the newest record of the step.
    """

    number: int
    rule: str
    windows: int
    used: int
    loss: float
    gradient_norm: float
    clipped: bool
    skipped: bool
    rolled_back: bool
    lag_ns: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """
    The facts of one step.

    ``rejected`` holds what is to be a dead letter, by cut order: decoding's rejections and the engine's own
    (``future``, ``late`` by policy). ``outcome_N`` covers the batch's records; each decoding rejection is one more
    record, which ended as ``undecoded``: ``DEAD``, or ``SKIPPED`` by policy and then not in ``rejected``.
    ``resets`` counts carries that start from zero, by reason: after a ``gap``, after a tombstone (``control``), or
    because they were ``non_finite``.
    ``series_total`` and ``series_warming`` are states in memory after the step, ``series_stored`` those outside it.
    ``evictions`` counts states that left memory, by reason (``capacity``: stored; ``ttl``: forgotten).
    """

    step: int
    batch: RecordBatch
    outcome_N: NDArray[np.uint8]
    rejected: tuple[Rejected, ...]
    forecasts: Forecasts
    updates: tuple[Update, ...]
    resets: Mapping[str, int]
    series_total: int
    series_warming: int
    series_stored: int = 0
    evictions: Mapping[str, int] = field(default_factory=dict[str, int])
    undecoded: Outcome = Outcome.DEAD

    def counts(self) -> dict[Outcome, int]:
        """Records by outcome; they add up to all records of the cut."""
        per = np.bincount(self.outcome_N, minlength=len(Outcome))
        counts = {outcome: int(per[outcome]) for outcome in Outcome}
        counts[self.undecoded] += sum(r.records for r in self.batch.rejected)
        counts[Outcome.SKIPPED] += self.batch.skipped
        return counts

    def digest(self) -> bytes:
        """
        SHA-256 of the outputs: outcomes, forecasts and rejections in a fixed layout, sorted by coordinates.

        Not of encoded bytes: a new field in the JSON must not break every progress chain.
        """
        return _digest(self.batch, self.outcome_N, self.forecasts, self.rejected)

    def digests(self, lengths: Sequence[int]) -> list[bytes]:
        """
        What :meth:`digest` would have been of each of the steps that this one was joined from: ``lengths`` of its
        ranges were the cut of the first, and so on.
        """
        if len(lengths) == 1:
            return [self.digest()]
        batch, out = self.batch, self.forecasts
        end_S = np.cumsum(lengths)
        end_N = np.searchsorted(batch.range_index, end_S)
        end_M = np.searchsorted(out.record_M, end_N)
        rejected = self._rejected_by_part(end_S)
        digests: list[bytes] = []
        r = n = m = 0
        for part, (to_r, to_n, to_m) in enumerate(zip(end_S.tolist(), end_N.tolist(), end_M.tolist(), strict=True)):
            cut = replace(
                batch,
                cut=batch.cut[r:to_r],
                code=batch.code[n:to_n],
                range_index=batch.range_index[n:to_n] - r,
                offset=batch.offset[n:to_n],
                row=batch.row[n:to_n],
            )
            made = replace(
                out,
                record_M=out.record_M[m:to_m] - n,
                clock_M=out.clock_M[m:to_m],
                interval_ns_M=out.interval_ns_M[m:to_m],
                update_M=out.update_M[m:to_m],
                warming_M=out.warming_M[m:to_m],
                yhat_MK=out.yhat_MK[m:to_m],
            )
            digests.append(_digest(cut, self.outcome_N[n:to_n], made, rejected[part]))
            r, n, m = to_r, to_n, to_m
        return digests

    def _rejected_by_part(self, end_S: I64) -> list[list[Rejected]]:
        parts: list[list[Rejected]] = [[] for _ in end_S]
        if self.rejected:
            part_R = np.searchsorted(end_S, np.arange(len(self.batch.cut)), side="right").tolist()
            ranges: dict[tuple[str, int], list[tuple[int, int]]] = {}
            for part, r in zip(part_R, self.batch.cut, strict=True):
                ranges.setdefault((r.topic, r.partition), []).append((r.end, part))
            for found in self.rejected:
                within = ranges[found.topic, found.partition]
                parts[within[bisect_right(within, (found.offset, len(parts)))][1]].append(found)
        return parts


def _digest(batch: RecordBatch, outcome_N: NDArray[np.uint8], out: Forecasts, rejected: Sequence[Rejected]) -> bytes:
    place_R = _places(batch)
    order_N = _by_coordinates(batch, place_R, np.arange(len(batch), dtype=np.int32))
    order_M = _by_coordinates(batch, place_R, out.record_M)
    sha = hashlib.sha256()
    for topic, partition in sorted({(r.topic, r.partition) for r in batch.cut}):
        sha.update(f"{topic}\0{partition}\n".encode())
    for code in batch.code[order_N].tolist():
        key = batch.series[code].key.encode(errors="surrogatepass")
        sha.update(b"%d:%b" % (len(key), key))
    for name, column in (
        ("place", place_R[batch.range_index[order_N]]),
        ("outcome", outcome_N[order_N]),
        ("offset", batch.offset[order_N]),
        ("row", batch.row[order_N]),
        ("record_offset", batch.offset[out.record_M][order_M]),
        ("record_row", batch.row[out.record_M][order_M]),
        ("clock", out.clock_M[order_M]),
        ("interval", out.interval_ns_M[order_M]),
        ("update", out.update_M[order_M]),
        ("warming", out.warming_M[order_M]),
        ("yhat", out.yhat_MK[order_M]),
    ):
        sha.update(f"{name}:{column.dtype.str}:{column.shape};".encode())
        sha.update(np.ascontiguousarray(column).tobytes())
    for r in sorted(rejected):
        sha.update(f"{r.topic}\0{r.partition}\0{r.offset}\0{r.row}\0{r.reason}\n".encode())
    return sha.digest()


def _places(batch: RecordBatch) -> NDArray[np.int64]:
    """For each range of the cut, the rank of its (topic, partition)."""
    rank = {place: i for i, place in enumerate(sorted({(r.topic, r.partition) for r in batch.cut}))}
    return np.array([rank[r.topic, r.partition] for r in batch.cut], np.int64)


def _by_coordinates(batch: RecordBatch, place_R: NDArray[np.int64], record: I32) -> NDArray[np.intp]:
    """The order of these records by (topic, partition, offset, row)."""
    return np.lexsort((batch.row[record], batch.offset[record], place_R[batch.range_index[record]]))
