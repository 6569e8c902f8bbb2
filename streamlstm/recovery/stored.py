"""
An engine with its series beyond memory: before a step those of its series that had left return, after it some leave.

Invisible in every bit: who is where follows from ``series.max_series``, and no output, weight or digest hangs on it.
"""

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from streamlstm.engine.core import Engine
from streamlstm.engine.report import StepReport
from streamlstm.engine.state import EngineState, Stored
from streamlstm.errors import Temporary
from streamlstm.records.batch import RecordBatch
from streamlstm.recovery.making import Census
from streamlstm.recovery.scratch import Scratch, sweep
from streamlstm.series.table import Rows

SCRATCH = "scratch"
"""The name of the directory of scratch files, beside the generations."""


class Room:
    """
    Where engines put series beyond memory.

    ``directory`` is one that this process alone uses; without one it is where temporary files go. Nothing is made
    before a series has to leave, and a file goes with the engine it was made for.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._temporary: Path | None = None
        if directory is not None and directory.is_dir():
            sweep(directory)

    def scratch(self, columns: Mapping[str, Tensor]) -> Scratch:
        """A new file for rows of these columns."""
        try:
            directory = self._directory
            if directory is None:
                directory = self._temporary = self._temporary or self._make_temporary()
            else:
                directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Temporary(f"no directory for series beyond series.max_series: {error}; look at the disk") from error
        return Scratch(directory, {name: values[:0] for name, values in columns.items()})

    def _make_temporary(self) -> Path:
        """It goes with this."""
        made = tempfile.mkdtemp(prefix="streamlstm-")
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return Path(made)


class TieredEngine:
    """The engine and its scratch file as one. See :class:`~streamlstm.recovery.making.Steppable`."""

    def __init__(self, engine: Engine, room: Room) -> None:
        self._engine, self._room = engine, room
        self._scratch: Scratch | None = None
        self._origin = ""

    @classmethod
    def of(cls, engine: Engine, room: Room, state: EngineState) -> Self:
        """With an engine restored from ``state``: what is stored there is taken over, who must be in memory into it."""
        tiered = cls(engine, room)
        if state.stored is not None:
            tiered._fill(state.stored, state.step)
        return tiered

    @property
    def step_number(self) -> int:
        """The last step's."""
        return self._engine.step_number

    def step(self, batch: RecordBatch) -> StepReport:
        """
        Take in one cut.

        1. Fetch those of its series that had left. 2. Step. 3. Drop what will be forgotten. 4. Put away who leaves.
        """
        engine, scratch = self._engine, self._scratch
        returning = scratch.fetch(engine.absent(batch)) if scratch else None  # 1
        report = engine.step(batch, returning)  # 2
        if scratch and engine.forgets_until is not None:
            scratch.forget(engine.forgets_until, len(batch))  # 3
        leaving = engine.evict()  # 4
        if leaving is not None:
            self._put(leaving, engine.step_number)
        evicted = len(leaving) if leaving else 0
        return dataclasses.replace(
            report,
            series_total=report.series_total - evicted,
            series_warming=engine.warming,
            series_stored=len(self._scratch) if self._scratch else 0,
            evictions={**report.evictions, "capacity": evicted},
        )

    def state(self) -> EngineState:
        """A snapshot, with what is stored."""
        state = self._engine.state()
        stored = self._scratch.view(self._engine.forgets_until, self._origin) if self._scratch else None
        return dataclasses.replace(state, stored=stored)

    def census(self) -> Census:
        """What there is."""
        engine = self._engine
        return Census(engine.updates, engine.active, engine.warming, len(self._scratch) if self._scratch else 0)

    def _fill(self, stored: Stored, step: int) -> None:
        self._origin = stored.origin
        for place in stored.places():
            for rows in stored.rows(*place):
                needed = rows.columns["last_fresh"].numpy() > self._engine.needs_after
                self._engine.take_in(rows.pick(np.flatnonzero(needed)))
                if not needed.all():
                    self._put(rows.pick(np.flatnonzero(~needed)), step)
        stored.close()

    def _put(self, rows: Rows, since: int) -> None:
        if self._scratch is None:
            self._scratch = self._room.scratch(rows.columns)
        self._scratch.put(rows, since)
