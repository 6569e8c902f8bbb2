"""
A state laid out for one (k1, k2), laid out for another: what a change of these learning keys does to it.

Rings are as long as k1 and k2 want them, and an entry's place follows from its age or clock, so each entry that both
layouts hold is carried to its new place. What the new one would need and the old one did not keep is missing: windows
that would start from a carry nobody saved are left out by selection, as after a reset, until new ones are saved, and so
are windows that were queued at another length. Weights, moments, carries, scores and clocks do not change.

Axes: S series of a chunk, R entries of a ring.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamlstm.engine.state import EngineState, RelaidStored
from streamlstm.series.ledger import NEVER
from streamlstm.series.table import Rows

_SERIES_AT_ONCE = 4096
_NO_TIME = -(1 << 63)
"""Where a retained timestamp is not known: no record has it."""


class Layout(NamedTuple):
    """What the shape of a state follows from, of the learning keys."""

    k1: int
    k2: int


class Relaid(NamedTuple):
    """The state in its new layout, and how many queued windows did not fit it."""

    state: EngineState
    windows_left_out: int


def relayout(state: EngineState, then: Layout, now: Layout) -> Relaid:
    """``state`` as an engine of the layout ``now`` takes it; itself where nothing changed. No tensor is written to."""
    if then == now:
        return Relaid(state, 0)
    chunks = [_relay_chunk(chunk, then, now) for chunk in _chunks_of(state) if chunk]
    columns = {name: [chunk[name] for chunk in chunks] for name in state.columns}
    training, meta, left_out = state.training, state.meta, 0
    if then.k2 != now.k2:
        queue = meta["queue"]
        left_out = len(queue["series"])
        training = {name: tensor for name, tensor in training.items() if not name.startswith("queue.")}
        meta = {**meta, "queue": {**queue, "series": [], "joined": [], "usable": [], "newest_ns": []}}
    relaid = EngineState(
        step=state.step,
        series=state.series,
        columns=columns,
        weights=state.weights,
        training=training,
        meta=meta,
        stored=RelaidStored(state.stored, lambda rows: Rows(rows.series, _relay_chunk(rows.columns, then, now)))
        if state.stored
        else None,
    )
    return Relaid(relaid, left_out)


def _chunks_of(state: EngineState) -> Iterator[dict[str, Tensor]]:
    """All columns of some series at a time, on the CPU; one piece without rows where there is no series."""
    for start in range(0, len(state.series), _SERIES_AT_ONCE):
        rows = np.arange(start, min(start + _SERIES_AT_ONCE, len(state.series)))
        yield {name: state.take(name, rows) for name in state.columns}
    if not state.series:
        yield {name: like for name in state.columns if (like := state.like(name)) is not None}


def _relay_chunk(chunk: Mapping[str, Tensor], then: Layout, now: Layout) -> dict[str, Tensor]:
    relaid = dict(chunk)
    age_S, clock_S = chunk["age"], chunk["clock"]
    ring_then, ring_now = then.k2 + then.k1, now.k2 + now.k1
    relaid["recent_ns"] = _by_age(chunk["recent_ns"], age_S, now.k2, _NO_TIME)
    for name in ("window_x", "window_y", "window_base", "window_scale", "window_clock"):
        relaid[name] = _by_age(chunk[name], age_S, ring_now, 0)
    relaid |= _saved(chunk, ring_then, now)
    # A ring kept by the clock is longer than what is looked up in it by k1 (see the ledger's ``block_rows``).
    for prefix in ("ledger", "season"):
        names = [name for name in chunk if name.startswith(f"{prefix}_") and name != f"{prefix}_clock"]
        if names:
            width = chunk[f"{prefix}_clock"].shape[1] - then.k1 + now.k1
            relaid |= _by_clock(chunk, f"{prefix}_clock", names, clock_S, width)
    return relaid


def _by_age(ring_SR: Tensor, age_S: Tensor, width: int, fill: int) -> Tensor:
    """The newest entries at their places in a ring of another length, ``fill`` where the old one had none."""
    age_SR = (age_S.unsqueeze(1) - torch.arange(width)).clamp(min=-1)
    held_SR = (age_SR >= 1) & (age_SR > age_S.unsqueeze(1) - ring_SR.shape[1])
    row, at = torch.nonzero(held_SR, as_tuple=True)
    age = age_SR[row, at]
    relaid = torch.full((len(ring_SR), width, *ring_SR.shape[2:]), fill, dtype=ring_SR.dtype, device=ring_SR.device)
    row = row.to(ring_SR.device)
    relaid[row, (age % width).to(row.device)] = ring_SR[row, (age % ring_SR.shape[1]).to(row.device)]
    return relaid


def _saved(chunk: Mapping[str, Tensor], ring_then: int, now: Layout) -> dict[str, Tensor]:
    """The saved carries that a window still to come will start from, and whose window is held from there on."""
    width = -(-now.k2 // now.k1) + 1
    saved_SR, age_S1 = chunk["saved_age"], chunk["age"].unsqueeze(1)
    wanted_SR = (saved_SR >= 0) & ((saved_SR + now.k2) % now.k1 == 0)
    wanted_SR &= (saved_SR > age_S1 - now.k2) & (saved_SR >= age_S1 - ring_then)
    row, at = torch.nonzero(wanted_SR, as_tuple=True)
    place = (saved_SR[row, at] + now.k2) // now.k1 % width
    relaid: dict[str, Tensor] = {}
    for name, fill in (("saved_age", -1), ("saved_h", 0), ("saved_c", 0)):
        old = chunk[name]
        new = torch.full((len(old), width, *old.shape[2:]), fill, dtype=old.dtype, device=old.device)
        here = row.to(old.device)
        new[here, place.to(old.device)] = old[here, at.to(old.device)]
        relaid[name] = new
    return relaid


def _by_clock(
    chunk: Mapping[str, Tensor], clock_name: str, names: list[str], clock_S: Tensor, width: int
) -> dict[str, Tensor]:
    """The newest entries at their places in a ring of another length. An entry may be as wide as several numbers."""
    made_SR = chunk[clock_name]
    now_S1 = clock_S.to(made_SR.device).unsqueeze(1)
    row, at = torch.nonzero((made_SR != NEVER) & (made_SR > now_S1 - width), as_tuple=True)
    place = made_SR[row, at] % width
    relaid: dict[str, Tensor] = {}
    for name in (clock_name, *names):
        old = chunk[name].view(*made_SR.shape, -1)
        fill = {clock_name: NEVER, "ledger_offset": -1}.get(name, 0)
        new = torch.full((len(old), width, old.shape[2]), fill, dtype=old.dtype, device=old.device)
        new[row, place] = old[row, at]
        relaid[name] = new.view(len(old), -1)
    return relaid
