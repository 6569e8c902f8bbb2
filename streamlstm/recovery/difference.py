"""How two stored states differ, to the bit: where they stand, what made them, what they learnt and keep per series."""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamlstm.engine.state import EngineState, digest_rows
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.fingerprint import compare_fingerprints
from streamlstm.recovery.generations import Loaded
from streamlstm.recovery.inspection import ChangedKey, changed_keys, counters_of
from streamlstm.recovery.progress import Value
from streamlstm.recovery.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Pair:
    """What a thing is in each of the two; ``None`` where it is not there."""

    name: str
    a: Value
    b: Value


@dataclass(frozen=True, slots=True)
class Count:
    """How many there are in each of the two."""

    a: int
    b: int


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """
    One named tensor that is not the same bits in both.

    ``elements`` differ, by ``max_abs`` at most (``inf`` where only one of two is finite or NaN); both are ``None`` when
    ``a`` and ``b``, shape and type, differ already.
    """

    name: str
    a: str | None
    b: str | None
    elements: int | None
    max_abs: float | None


@dataclass(frozen=True, slots=True)
class SeriesDifference:
    """
    Series only ``b`` has, only ``a`` has, in both with other bits, and with the same; in memory or beyond it.

    ``in_memory`` and ``stored`` is how many are where. ``columns`` counts the series that differ, by column, of those
    that both have in memory; ``only`` are the columns that one of the two has.
    """

    added: tuple[SeriesId, ...]
    gone: tuple[SeriesId, ...]
    changed: tuple[SeriesId, ...]
    same: int
    in_memory: Count
    stored: Count
    columns: Mapping[str, int]
    only: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """
    What differs between two generations; ``equal`` says whether the states are the same bits.

    ``provenance`` is who made them, and is no part of that; nor are positions, configuration and fingerprint.
    """

    equal: bool
    provenance: tuple[Pair, ...]
    positions: tuple[Pair, ...]
    counters: tuple[Pair, ...]
    config: tuple[ChangedKey, ...]
    fingerprint: tuple[str, ...]
    weights: tuple[TensorDifference, ...]
    training: tuple[TensorDifference, ...]
    series: SeriesDifference


def compare(a: Loaded, b: Loaded) -> Difference:
    """What differs from ``a`` to ``b``."""
    then, now = a.generation.provenance, b.generation.provenance
    weights = tuple(_compare_tensors(a.state.weights, b.state.weights))
    training = tuple(_compare_tensors(a.state.training, b.state.training))
    series = _compare_series(a, b)
    same_meta = a.state.meta == b.state.meta and a.state.step == b.state.step
    return Difference(
        equal=same_meta and a.state.digests() == b.state.digests(),
        provenance=tuple(
            _pairs({"step": a.generation.step, **_makers(then)}, {"step": b.generation.step, **_makers(now)})
        ),
        positions=tuple(
            _pairs(
                {f"{p.topic}-{p.partition}": p.next_offset for p in then.positions},
                {f"{p.topic}-{p.partition}": p.next_offset for p in now.positions},
            )
        ),
        counters=tuple(_pairs(counters_of(a.state.meta), counters_of(b.state.meta))),
        config=tuple(changed_keys(then.settings, now.settings)),
        fingerprint=tuple(compare_fingerprints(then.fingerprint, now.fingerprint)),
        weights=weights,
        training=training,
        series=series,
    )


def _makers(made: Provenance) -> dict[str, Value]:
    return {"lineage": made.lineage, "revision": made.revision, "incarnation": made.incarnation}


def _pairs(a: Mapping[str, Value], b: Mapping[str, Value]) -> Iterator[Pair]:
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name] != b[name]:
            yield Pair(name, a.get(name), b.get(name))


def _compare_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[TensorDifference]:
    for name in sorted(a.keys() | b.keys()):
        then, now = a.get(name), b.get(name)
        if then is None or now is None or then.shape != now.shape or then.dtype != now.dtype:
            yield TensorDifference(name, _kind(then), _kind(now), None, None)
        elif (differs := _bits_differ(then.reshape(-1, 1), now.reshape(-1, 1))).any():
            elements = int(differs.sum())
            yield TensorDifference(name, _kind(then), _kind(now), elements, _largest(then, now))


def _kind(tensor: Tensor | None) -> str | None:
    return None if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _bits_differ(a: Tensor, b: Tensor) -> Tensor:
    """For each row whether any bit differs: two NaN are equal when their bits are, and 0.0 is not -0.0."""
    rows = len(a)
    if not a.numel():
        return torch.zeros(rows, dtype=torch.bool)
    then, now = (t.contiguous().reshape(-1).view(torch.uint8).reshape(rows, -1) for t in (a, b))
    return (then != now).any(dim=1)


def _largest(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; two NaN, or two equal infinities, differ by nothing."""
    then, now = a.double(), b.double()
    gap = torch.where((then == now) | (then.isnan() & now.isnan()), 0.0, (then - now).abs())
    return float(torch.where(gap.isnan(), torch.inf, gap).max())


def _compare_series(one: Loaded, other: Loaded) -> SeriesDifference:
    a, b = one.state, other.state
    row_a = {series: i for i, series in enumerate(a.series)}
    row_b = {series: i for i, series in enumerate(b.series)}
    both = sorted(row_a.keys() & row_b.keys())
    elsewhere_a, elsewhere_b = (_digests_but(state, set(both)) for state in (a, b))
    here = torch.tensor([row_a[series] for series in both], dtype=torch.int64)
    there = torch.tensor([row_b[series] for series in both], dtype=torch.int64)
    differs = torch.zeros(len(both), dtype=torch.bool)
    columns: dict[str, int] = {}
    only: list[str] = []
    for name in sorted(a.columns.keys() | b.columns.keys()):
        if bool(a.columns.get(name)) != bool(b.columns.get(name)):
            only.append(name)
            continue
        if not both or not a.columns[name]:
            continue
        then, now = a.column(name)[here], b.column(name)[there]
        if then.shape != now.shape or then.dtype != now.dtype:
            only.append(name)
            continue
        differ = _bits_differ(then, now)
        if differ.any():
            columns[name] = int(differ.sum())
            differs |= differ
    moved = elsewhere_a.keys() & elsewhere_b.keys()
    changed = {series for series, differ in zip(both, differs.tolist(), strict=True) if differ}
    changed |= {series for series in moved if elsewhere_a[series] != elsewhere_b[series]}
    return SeriesDifference(
        added=tuple(sorted(elsewhere_b.keys() - moved)),
        gone=tuple(sorted(elsewhere_a.keys() - moved)),
        changed=tuple(sorted(changed)),
        same=len(both) + len(moved) - len(changed),
        in_memory=Count(len(a.series), len(b.series)),
        stored=Count(one.generation.stored, other.generation.stored),
        columns=columns,
        only=tuple(only),
    )


def _digests_but(state: EngineState, but: AbstractSet[SeriesId]) -> dict[SeriesId, bytes]:
    """A digest of every series, in memory or beyond it, but of these."""
    found: dict[SeriesId, bytes] = {}
    for rows in state.rows():
        others = rows.pick(np.flatnonzero([series not in but for series in rows.series]))
        if others.series:
            found.update(zip(others.series, digest_rows(others), strict=True))
    return found
