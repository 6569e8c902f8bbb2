"""
The program: ``step(batch) -> StepReport``.

The order of one record is a law: admit → settle → forecast → learn. Score before you learn; learn only from settled
truth. Between two updates the weights are constant, so the records in between are computed as a block: different
series side by side, several records of one series in one go. How the log is divided into steps and blocks changes no
bit, because

- admission and the plan of updates are integers, decided record by record;
- a row of a block reads its own series only, and of it only older clocks: which entries of a ring it finds does not
  depend on what else the block holds (a block spans fewer clocks of a series than the rings have spare places);
- products and vectorised functions see tiles of one shape (:mod:`streamlstm.learning.cells`);
- what series share is written by updates alone, in the order of the log.

No Kafka, clock, file, thread, log or metric here: the batch is an argument and the report is the answer.

Axes: N rows of a block, B series in it, M fresh records of the step, F features, H hidden units, K horizons, X experts.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlstm.config.model import Config
from streamlstm.engine.report import EXPERTS, Forecasts, Outcome, StepReport, Update
from streamlstm.engine.schedule import Fire, Join, UpdateQueue
from streamlstm.engine.state import EngineState
from streamlstm.learning.cells import Cell, head
from streamlstm.learning.model import Prepared, Shape
from streamlstm.learning.tbptt import Learner, Settings, Windows
from streamlstm.records.batch import I64, RecordBatch, Rejected, SeriesId
from streamlstm.series import scaling, scoring
from streamlstm.series.admission import BEGINNING, Admitted, Rules, Verdict, admit, clock_columns
from streamlstm.series.calendar import Calendar
from streamlstm.series.ledger import Ledger
from streamlstm.series.season import SeasonRing
from streamlstm.series.table import Column, Rows, Selection, SeriesTable

INPUT_LIMIT = 6.0
CHANGE_GAIN = 3.0

EVICTED_AT_ONCE = 128
"""One in so many of ``series.max_series`` leave beyond what must, so that not every step evicts."""


class _Rows(NamedTuple):
    """
    N rows of B series, wave by wave: wave w holds the w-th row of the first ``waves[w]`` series.

    ``fresh_N`` indexes the step's fresh records, ``series_N`` the block's series.
    """

    fresh_N: NDArray[np.int64]
    series_N: NDArray[np.int64]
    slot_B: NDArray[np.int64]
    waves: list[int]


class Engine:
    """The state of one shard: weights, optimizer, series table, counters, update queue."""

    def __init__(self, config: Config, device: str) -> None:
        self._device = torch.device(device)
        self._k1, self._k2 = config.training.k1, config.k2
        self._training = config.training.enabled
        self._horizons, hidden = config.model.horizons, config.model.hidden_size
        self._late_is_dead = config.series.late == "dead_letter"
        self._undecoded = Outcome.SKIPPED if config.decode.on_error == "skip" else Outcome.DEAD
        self._rules = Rules.of(config)
        self._alpha = scaling.smoothing(config.season)
        self._max_wait = config.training.max_wait
        self._max_series = config.series.max_series

        self._ledger = Ledger(self._horizons, self._k1, device)
        self._season = SeasonRing(config.season, self._horizons, self._k1, device) if config.season else None
        self._calendar = Calendar(tuple(config.model.calendar), device)
        features = 3 + (self._season.features if self._season else 0) + self._calendar.features
        shape = Shape(features, hidden, self._horizons)
        self._cell = Cell(features, hidden, self._device)
        self._learner = Learner(
            shape,
            Settings(
                config.model.loss,
                config.learning_rate,
                config.training.clip_norm,
                config.training.guard.patience,
            ),
            config.model.seed,
            device,
        )
        # A window's records outlive the block they join in: at most k1 more of the series can follow in it.
        self._window_ring = self._k2 + self._k1
        self._saved_ring = -(-self._k2 // self._k1) + 1
        columns = self._columns(shape)
        self._table = SeriesTable(columns, device)
        clocks = {"last_fresh", *(column.name for column in clock_columns(self._k2))}
        self._beside_clocks = [column for column in columns if column.name not in clocks]
        self._queue = UpdateQueue(self._k1, config.training.batch_series, self._max_wait)
        self._queued: list[_Queued] = []
        self._fresh = 0
        self._warming = 0
        self._watermark = BEGINNING
        self.step_number = 0

    def _columns(self, shape: Shape) -> list[Column]:
        ring, saved = self._window_ring, self._saved_ring
        return [
            *clock_columns(self._k2),
            Column("last_fresh", (), torch.int64, -(1 << 62), host=True),
            *scaling.COLUMNS,
            Column("carry_h", (shape.hidden,), torch.float32),
            Column("carry_c", (shape.hidden,), torch.float32),
            Column("saved_age", (saved,), torch.int64, -1, host=True),
            Column("saved_h", (saved, shape.hidden), torch.float32),
            Column("saved_c", (saved, shape.hidden), torch.float32),
            Column("window_x", (ring, shape.features), torch.float32),
            Column("window_y", (ring,), torch.float64),
            Column("window_base", (ring,), torch.float64),
            Column("window_scale", (ring,), torch.float64),
            Column("window_clock", (ring,), torch.int64),
            *self._ledger.columns(),
            *(self._season.columns() if self._season else []),
            *scoring.columns(len(EXPERTS), self._horizons),
        ]

    @property
    def shape(self) -> Shape:
        """The network's axes."""
        return self._learner.shape

    @classmethod
    def create(cls, config: Config, device: str) -> "Engine":
        """A fresh engine, from the configuration's seed."""
        return cls(config, device)

    @classmethod
    def restore(cls, config: Config, device: str, state: EngineState) -> "Engine":
        """
        An engine that goes on exactly where ``state`` was taken.

        Series that are stored elsewhere are not its business: they return one by one with :meth:`step`.

        Raises :class:`ValueError` naming what in the state does not fit the configuration.
        """
        engine = cls(config, device)
        engine._load(state)
        return engine

    def absent(self, batch: RecordBatch) -> list[SeriesId]:
        """The series of a batch that have no state here: new ones, and those that left."""
        return [series for series in batch.series if series not in self._table.slot_of]

    def step(self, batch: RecordBatch, returning: Rows | None = None) -> StepReport:
        """
        Take in one cut. ``returning`` are those of its series that had left, as they were when they left.

        1. Admit every record by its own series' clock. 2. Plan the updates. 3. Block by block: settle, forecast, then
        queue windows and learn where the plan says so. 4. Drop the states that will be forgotten.
        """
        if returning is not None:
            self.take_in(returning)
        admitted = admit(self._table, self._rules, batch, self._watermark)
        joins = self._boundaries(admitted)
        fires = self._plan(admitted, joins)
        work = _Work(batch, admitted, joins, self._horizons, self._device)
        updates: list[Update] = []
        zeroed, start, pending = 0, 0, 0
        while start < len(work):
            stop = fires[pending].position + 1 if pending < len(fires) else len(work)
            arrived: list[_Queued] = []
            parameters = self._learner.parameters()
            for rows in _side_by_side(admitted, start, stop, self._k1):
                zeroed_N = self._advance(work, parameters, rows)
                arrived += self._freeze(work, rows, zeroed_N)
                zeroed += self._disown(admitted, rows, zeroed_N)
            waiting = _in_order(arrived)
            while pending < len(fires) and fires[pending].position == stop - 1:
                # Rule B fires before the record's own window joins: windows join as far as the fire counts.
                joining = fires[pending].windows - sum(len(part) for part in self._queued)
                updates.append(self._learn(work, fires[pending], [*self._queued, *_first(waiting, joining)]))
                waiting, self._queued = _rest(waiting, joining), []
                pending += 1
            self._queued += waiting
            start = stop
        self._fresh += len(work)
        self._warming += admitted.warming_change
        self._watermark = admitted.watermark
        self.step_number += batch.steps
        forgotten = self._drop_forgotten() + int(admitted.forgotten_M.sum())
        return self._report(work, tuple(updates), self._resets(admitted, zeroed), forgotten)

    @staticmethod
    def _resets(admitted: Admitted, zeroed: int) -> dict[str, int]:
        return {"gap": admitted.gap_resets, "control": admitted.control_resets, "non_finite": zeroed}

    def take_in(self, rows: Rows) -> None:
        """Series that had left are here again."""
        self._table.put(rows)
        self._warming += self._count_warming(rows)

    def evict(self) -> Rows | None:
        """
        If there are more than ``series.max_series``: the least recently seen leave, until there are a few less.

        None that was seen within the last ``max_wait`` fresh records: those count for the update queue, and only they
        can have a window in it. So whether and when a series left changes no bit, as long as it returns with its next
        record.
        """
        excess = len(self._table) - self._max_series
        if excess <= 0:
            return None
        idle = self._unqueued(self._table.at_most("last_fresh", self.needs_after))
        count = min(len(idle), excess + self._max_series // EVICTED_AT_ONCE)
        if not count:
            return None
        last_fresh = self._table.gather("last_fresh", self._table.select(idle)).numpy()
        rows = self._table.take(idle[np.argsort(last_fresh)[:count]])
        self._warming -= self._count_warming(rows)
        return rows

    @property
    def active(self) -> int:
        """How many series are here."""
        return len(self._table)

    @property
    def updates(self) -> int:
        """The number of the last update."""
        return self._learner.number

    @property
    def warming(self) -> int:
        """How many of the series that are here are warming."""
        return self._warming

    @property
    def forgets_until(self) -> int | None:
        """States of series seen no later than this (by ``seen_ns``) are never needed again. ``None``: all are."""
        return None if self._rules.ttl is None else self._watermark - self._rules.ttl

    @property
    def needs_after(self) -> int:
        """Series whose last fresh record (``last_fresh``) is a later one must be here: they count for the queue."""
        return self._fresh - self._max_wait

    def _drop_forgotten(self) -> int:
        """
        Drop what the watermark proves will be forgotten; how many.

        At the end of a step, and all of it, so that it does not show how the log was divided. Series that count for
        the update queue stay a while.
        """
        if self.forgets_until is None or self.forgets_until < BEGINNING:
            return 0
        slots = self._unqueued(self._table.at_most("seen_ns", self.forgets_until))
        if not len(slots):
            return 0
        last_fresh = self._table.gather("last_fresh", self._table.select(slots)).numpy()
        gone = self._table.take(slots[last_fresh <= self.needs_after])
        self._warming -= self._count_warming(gone)
        return len(gone)

    def _unqueued(self, slots: I64) -> I64:
        """Without those that have a window queued: from before ``max_wait`` was made shorter, until the next record."""
        return slots[~np.isin(slots, self._queue.slots)] if self._queue.slots else slots

    def _count_warming(self, rows: Rows) -> int:
        return int(((rows.columns["clock"] > 0) & (rows.columns["age"] < self._rules.warm_age)).sum())

    def state(self) -> EngineState:
        """A snapshot: immutable, and free but for names; while it is held, a step puts aside what it overwrites."""
        queued = _joined(self._queued) if self._queued else None
        training = self._learner.training()
        if queued is not None:
            training |= {f"queue.{name}": tensor for name, tensor in queued.windows._asdict().items()}
        series, columns = self._table.snapshot()
        return EngineState(
            step=self.step_number,
            series=series,
            columns=columns,
            weights=self._learner.weights(),
            training=training,
            meta={
                "fresh": self._fresh,
                "watermark": self._watermark,
                "learner": self._learner.counters(),
                "queue": {
                    "series": [list(self._table.series[slot] or ()) for slot in self._queue.slots],
                    "joined": list(self._queue.joined),
                    "wanted": self._queue.wanted,
                    "quiet": self._queue.quiet,
                    "usable": queued.usable.tolist() if queued is not None else [],
                    "newest_ns": queued.newest_ns.tolist() if queued is not None else [],
                },
            },
        )

    def _load(self, state: EngineState) -> None:
        self._table.load(state.series, state.columns)
        meta: dict[str, Any] = state.meta
        self._learner.load(state.weights, state.training, meta["learner"])
        queue = meta["queue"]
        slot_of = self._table.slot_of
        self._queue.slots = [slot_of[SeriesId(*series)] for series in queue["series"]]
        self._queue.joined = list(queue["joined"])
        self._queue.wanted, self._queue.quiet = queue["wanted"], queue["quiet"]
        if self._queue.slots:
            tensors = {name: state.training[f"queue.{name}"].to(self._device, copy=True) for name in Windows._fields}
            usable = np.array(queue["usable"], np.bool_)
            position = np.zeros(len(usable), np.int64)
            newest_ns = np.array(queue["newest_ns"], np.int64)
            self._queued = [_Queued(Windows(**tensors), position, usable, newest_ns)]
        self._fresh, self._watermark = meta["fresh"], meta["watermark"]
        self._warming = len(self._table) - self._table.count_above("age", self._rules.warm_age - 1)
        self.step_number = state.step

    def _boundaries(self, admitted: Admitted) -> NDArray[np.intp]:
        """Fresh records at which a window joins: age a multiple of k1, and a whole window old."""
        age_M = admitted.age_M
        return np.flatnonzero((age_M % self._k1 == 0) & (age_M >= self._k2) & self._training)

    def _plan(self, admitted: Admitted, joins: NDArray[np.intp]) -> list[Fire]:
        """The updates of this step; ``last_fresh`` is moved along with the records they are planned from."""
        slot_M = admitted.slot_M
        written = 0

        def note(until: int) -> None:
            nonlocal written
            if written < until:
                # Each series once, with its newest record: a scatter takes no slot twice.
                slots, from_end = np.unique(slot_M[written:until][::-1], return_index=True)
                newest = self._fresh + until - from_end
                self._table.scatter("last_fresh", self._table.select(slots), torch.from_numpy(newest))
                written = until

        def seen(position: int) -> int:
            note(position + 1)
            return self._table.count_above("last_fresh", self._fresh + 1 + position - self._max_wait)

        fires: list[Fire] = []
        if self._training:
            joining = [Join(int(i), int(slot_M[i])) for i in joins]
            fires = self._queue.plan(self._fresh, len(slot_M), joining, seen)
        note(len(slot_M))
        return fires

    def _advance(self, work: "_Work", parameters: Prepared, rows: _Rows) -> NDArray[np.bool_] | None:
        """
        Settle and forecast N rows; which of their carries had to be zeroed (``None`` = none).

        1. Scale: what the series is measured from, and in. 2. Inputs. 3. One LSTM step per row, one head for all.
        4. Into the ledger. 5. Settle what spoke about these rows. Raw outputs of a block come from one batched call
        before its rows are settled: an entry made in this block is still settled by a later clock only.
        """
        table, admitted = self._table, work.admitted
        by_series = table.select(rows.slot_B)
        by_row = table.select(rows.slot_B[rows.series_N])
        first_B = rows.fresh_N[: rows.waves[0]]
        forgotten_B, restart_B = admitted.forgotten_M[first_B], admitted.restart_M[first_B]
        if forgotten_B.any():
            forgotten = table.select(rows.slot_B[forgotten_B])
            for column in self._beside_clocks:
                table.fill(column.name, forgotten, column.fill)
        if restart_B.any():
            self._restart(table.select(rows.slot_B[restart_B]))

        fresh_N = torch.from_numpy(rows.fresh_N).to(self._device)
        y_N, clock_N = work.y_M[fresh_N], work.clock_M[fresh_N]
        scaled = self._scale(by_series, rows, y_N)
        if self._season is not None:
            self._season.write(table, by_row, clock_N, y_N)
        x_NF = self._inputs(by_row, scaled, y_N, clock_N, work.minute_M[fresh_N])

        h_BH, c_BH = table.gather("carry_h", by_series), table.gather("carry_c", by_series)
        h_NH, c_NH, zeroed_N = self._cell.run(parameters, x_NF, h_BH, c_BH, rows.waves)
        output_NK = head(parameters, h_NH, self._horizons)
        self._save_carries(by_series, rows, admitted.age_M[rows.fresh_N], h_NH, c_NH)

        offset_N = work.offset_M[fresh_N]
        self._ledger.expect(table, by_row, clock_N, offset_N, scaled.base, scaled.scale, output_NK)
        error_NXK, issued_NK = self._ledger.settle(table, by_row, clock_N, y_N, self._season)
        self._score(by_series, rows, error_NXK)

        place_N = work.age_M[fresh_N] % self._window_ring
        for name, values in (
            ("window_x", x_NF),
            ("window_y", y_N),
            ("window_base", scaled.base),
            ("window_scale", scaled.scale),
            ("window_clock", clock_N),
        ):
            table.scatter_at(name, by_row, place_N, values)
        work.yhat_MK[fresh_N] = scaled.base.unsqueeze(1) + scaled.scale.unsqueeze(1) * output_NK.double()
        work.error_MXK[fresh_N] = error_NXK
        work.issued_MK[fresh_N] = issued_NK
        work.update_M[rows.fresh_N] = self._learner.number
        return zeroed_N

    def _restart(self, selection: Selection) -> None:
        """A carry starts from zero: window, saved carries and open forecasts go with it; scaler and scores stay."""
        table = self._table
        for name in ("carry_h", "carry_c"):
            table.fill(name, selection, 0)
        table.fill("saved_age", selection, -1)
        self._ledger.clear(table, selection)
        if self._season is not None:
            self._season.clear(table, selection)
        if self._k2 % self._k1 == 0:
            # The carry after record 0: the first window's start.
            place = self._saved_place(np.zeros(selection.size, np.int64))
            ages = torch.zeros(selection.size, dtype=torch.int64)
            table.scatter_at("saved_age", selection, place, ages)
            zeros = torch.zeros((selection.size, self._learner.shape.hidden), device=self._device)
            for name in ("saved_h", "saved_c"):
                table.scatter_at(name, selection, place.to(self._device), zeros)

    def _scale(self, by_series: Selection, rows: _Rows, y_N: Tensor) -> scaling.Scaled:
        """Move the scalers."""
        names = [column.name for column in scaling.COLUMNS]
        state = scaling.Scaler(*(self._table.gather(name, by_series) for name in names))
        after, scaled = scaling.advance(state, y_N, rows.waves, self._alpha)
        last = self._last_rows(rows)
        for name, values in zip(names, after, strict=True):
            self._table.scatter(name, by_series, values[last])
        return scaled

    def _inputs(
        self, by_row: Selection, scaled: scaling.Scaled, y_N: Tensor, clock_N: Tensor, minute_N: Tensor
    ) -> Tensor:
        """What the network sees ``[N, F]``, within ±6, zero where nothing is known."""
        base, scale = scaled.base, scaled.scale
        level = (base - scaled.mean) / scale
        change = CHANGE_GAIN * ((base - scaled.previous) / scale)
        columns = [level.unsqueeze(1), change.unsqueeze(1)]
        if self._season is not None:
            profile = self._season.profile(self._table, by_row, clock_N)
            columns += [(value_NP - base.unsqueeze(1)) / scale.unsqueeze(1) for value_NP in profile]
        x_NF = torch.cat(columns, 1)
        x_NF = torch.where(x_NF.isnan(), 0, x_NF.clamp(-INPUT_LIMIT, INPUT_LIMIT)).float()
        missing = y_N.isnan().float().unsqueeze(1)
        return torch.cat([x_NF, missing, self._calendar.inputs(minute_N)], 1)

    def _score(self, by_series: Selection, rows: _Rows, error_NXK: Tensor) -> None:
        """Move the scores."""
        names = [column.name for column in scoring.columns(len(EXPERTS), self._horizons)]
        state = scoring.Scores(*(self._table.gather(name, by_series) for name in names))
        for name, values in zip(names, scoring.score(state, error_NXK, rows.waves), strict=True):
            self._table.scatter(name, by_series, values)

    def _last_rows(self, rows: _Rows) -> Tensor:
        """Each series' last row ``[B]``."""
        last_B = np.empty(rows.waves[0], np.int64)
        last_B[rows.series_N] = np.arange(len(rows.series_N))
        return torch.from_numpy(last_B).to(self._device)

    def _save_carries(self, by_series: Selection, rows: _Rows, age_N: I64, h_NH: Tensor, c_NH: Tensor) -> None:
        """The carries that go on, and those at which a window will start (age ≡ −k2 mod k1; at most one per series)."""
        table = self._table
        last = self._last_rows(rows)
        table.scatter("carry_h", by_series, h_NH[last])
        table.scatter("carry_c", by_series, c_NH[last])

        saving = np.flatnonzero((age_N + self._k2) % self._k1 == 0)
        selection = table.select(rows.slot_B[rows.series_N[saving]])
        place = self._saved_place(age_N[saving])
        taken = torch.from_numpy(saving).to(self._device)
        for name, carries in (("saved_h", h_NH), ("saved_c", c_NH)):
            table.scatter_at(name, selection, place.to(self._device), carries[taken])
        table.scatter_at("saved_age", selection, place, torch.from_numpy(age_N[saving]))

    def _saved_place(self, age: I64) -> Tensor:
        return torch.from_numpy((age + self._k2) // self._k1 % self._saved_ring)

    def _freeze(self, work: "_Work", rows: _Rows, zeroed_N: NDArray[np.bool_] | None) -> list["_Queued"]:
        """
        The windows that join at these rows, with the targets that have arrived by now; in the order of the log.

        At once, and not when the block ends: a series that restarts in the same block starts its ring anew. A carry
        zeroed at or before a window's last record makes it unusable; one zeroed later does not, wherever a block ends.
        """
        table, admitted = self._table, work.admitted
        joining_N = np.flatnonzero(work.joins_M[rows.fresh_N])
        if not len(joining_N):
            return []
        joining_N = joining_N[np.argsort(rows.fresh_N[joining_N])]
        joining = rows.fresh_N[joining_N]
        age = admitted.age_M[joining]
        selection = table.select(admitted.slot_M[joining])
        span = torch.from_numpy((age[:, None] + np.arange(1 - self._k2, 1)) % self._window_ring).to(self._device)
        saved_place = self._saved_place(age - self._k2)
        usable = table.gather_at("saved_age", selection, saved_place).numpy() == age - self._k2
        if zeroed_N is not None:
            # A window is longer than the rows a series has here, so any of these lies within it.
            first_zeroed_B = np.full(rows.waves[0], len(zeroed_N))
            np.minimum.at(first_zeroed_B, rows.series_N[zeroed_N], np.flatnonzero(zeroed_N))
            usable &= joining_N < first_zeroed_B[rows.series_N[joining_N]]
        on_device = saved_place.to(self._device)
        windows = Windows(
            *(
                table.gather_at(name, selection, span)
                for name in ("window_x", "window_y", "window_base", "window_scale", "window_clock")
            ),
            h_BH=table.gather_at("saved_h", selection, on_device),
            c_BH=table.gather_at("saved_c", selection, on_device),
        )
        return [_Queued(windows, joining, usable, work.batch.time_ns[admitted.record_M[joining]])]

    def _disown(self, admitted: Admitted, rows: _Rows, zeroed_N: NDArray[np.bool_] | None) -> int:
        """
        After a zeroed carry no window may start from an earlier one: their saved ages are taken away. How many.

        Once the windows that ended before it are frozen; the zeroed carry itself may be started from.
        """
        if zeroed_N is None:
            return 0
        age_B = np.zeros(rows.waves[0], np.int64)
        np.maximum.at(age_B, rows.series_N[zeroed_N], admitted.age_M[rows.fresh_N[zeroed_N]])
        hit = np.flatnonzero(age_B)
        selection = self._table.select(rows.slot_B[hit])
        saved_age = self._table.gather("saved_age", selection)
        saved_age[saved_age < torch.from_numpy(age_B[hit]).unsqueeze(1)] = -1
        self._table.scatter("saved_age", selection, saved_age)
        return int(zeroed_N.sum())

    def _learn(self, work: "_Work", fire: Fire, parts: list["_Queued"]) -> Update:
        """One update from everything that is queued, without the windows that lost their carry."""
        queued = _joined(parts)
        assert len(queued) == fire.windows
        used = np.flatnonzero(queued.usable)
        windows = queued.windows
        if len(used) < fire.windows:
            chosen = torch.from_numpy(used).to(self._device)
            windows = Windows(*(tensor[chosen] for tensor in windows)) if len(used) else None
        outcome = self._learner.update(windows)
        now_ns = int(work.batch.time_ns[work.admitted.record_M[fire.position]])
        newest_ns = int(queued.newest_ns[used].max(initial=np.iinfo(np.int64).min)) if len(used) else now_ns
        return Update(
            number=self._learner.number,
            rule=fire.rule,
            windows=fire.windows,
            used=len(used),
            loss=outcome.loss,
            gradient_norm=outcome.norm,
            clipped=outcome.clipped,
            skipped=outcome.skipped,
            rolled_back=outcome.rolled_back,
            lag_ns=max(0, now_ns - newest_ns),
        )

    def _report(
        self, work: "_Work", updates: tuple[Update, ...], resets: Mapping[str, int], forgotten: int
    ) -> StepReport:
        admitted, batch = work.admitted, work.batch
        warming_M = admitted.age_M < self._rules.warm_age
        outcome_N = np.zeros(len(batch), np.uint8)
        verdict_N = admitted.verdict_N
        outcome_N[admitted.record_M] = np.where(warming_M, Outcome.WARMING, Outcome.FORECAST)
        late = Outcome.DEAD if self._late_is_dead else Outcome.LATE
        for verdict, outcome in (
            (Verdict.LATE, late),
            (Verdict.DUPLICATE, Outcome.DUPLICATE),
            (Verdict.FUTURE, Outcome.DEAD),
        ):
            outcome_N[verdict_N == verdict] = outcome
        return StepReport(
            step=self.step_number,
            batch=batch,
            outcome_N=outcome_N,
            rejected=_dead_letters(batch, outcome_N, verdict_N, undecoded=self._undecoded == Outcome.DEAD),
            forecasts=Forecasts(
                record_M=admitted.record_M,
                clock_M=admitted.clock_M,
                age_M=admitted.age_M,
                interval_ns_M=admitted.interval_ns_M,
                update_M=work.update_M,
                warming_M=warming_M,
                yhat_MK=work.yhat_MK.cpu().numpy(),
                settled_error_MXK=work.error_MXK.cpu().numpy(),
                settled_offset_MK=work.issued_MK.cpu().numpy(),
            ),
            updates=updates,
            resets=resets,
            series_total=len(self._table),
            series_warming=self._warming,
            evictions={"ttl": forgotten},
            undecoded=self._undecoded,
        )


class _Work:
    """One step's inputs on the device, its outputs as they are filled in, and how far its windows have joined."""

    def __init__(
        self,
        batch: RecordBatch,
        admitted: Admitted,
        joins: NDArray[np.intp],
        horizons: int,
        device: torch.device,
    ) -> None:
        count, record_M = len(admitted.record_M), admitted.record_M

        def on_device(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        self.batch, self.admitted = batch, admitted
        self.y_M = on_device(batch.target[record_M])
        self.offset_M = on_device(batch.offset[record_M])
        self.minute_M = on_device(batch.time_ns[record_M] // 60_000_000_000)
        self.clock_M, self.age_M = on_device(admitted.clock_M), on_device(admitted.age_M)
        self.yhat_MK = torch.empty((count, horizons), dtype=torch.float64, device=device)
        self.error_MXK = torch.empty((count, len(EXPERTS), horizons), dtype=torch.float64, device=device)
        self.issued_MK = torch.empty((count, horizons), dtype=torch.int64, device=device)
        self.update_M = np.empty(count, np.int64)
        self.joins_M = np.zeros(count, np.bool_)
        self.joins_M[joins] = True

    def __len__(self) -> int:
        return len(self.admitted.record_M)


@dataclass(frozen=True, slots=True)
class _Queued:
    """
    Frozen windows in the order they joined.

    ``position`` is the fresh record of the step they joined at (meaningless after the step), ``usable`` is false where
    a window's first carry was lost, ``newest_ns`` is the time of its last record.
    """

    windows: Windows
    position: NDArray[np.int64]
    usable: NDArray[np.bool_]
    newest_ns: I64

    def __len__(self) -> int:
        return len(self.usable)

    def take(self, chosen: NDArray[np.int64]) -> "_Queued":
        """These windows, in this order."""
        index = torch.from_numpy(chosen).to(self.windows.h_BH.device)
        windows = Windows(*(tensor[index] for tensor in self.windows))
        return _Queued(windows, self.position[chosen], self.usable[chosen], self.newest_ns[chosen])


def _joined(parts: list[_Queued]) -> _Queued:
    """Several as one."""
    if len(parts) == 1:
        return parts[0]
    return _Queued(
        Windows(*(torch.cat(column) for column in zip(*(part.windows for part in parts), strict=True))),
        np.concatenate([part.position for part in parts]),
        np.concatenate([part.usable for part in parts]),
        np.concatenate([part.newest_ns for part in parts]),
    )


def _in_order(arrived: list[_Queued]) -> list[_Queued]:
    """What joined in the parts of a block, in the order of the log."""
    if len(arrived) <= 1:
        return arrived
    queued = _joined(arrived)
    return [queued.take(np.argsort(queued.position))]


def _first(waiting: list[_Queued], count: int) -> list[_Queued]:
    """The oldest ``count`` windows."""
    if not count or count == sum(len(part) for part in waiting):
        return waiting if count else []
    return [_joined(waiting).take(np.arange(count))]


def _rest(waiting: list[_Queued], count: int) -> list[_Queued]:
    """All but the oldest ``count`` windows."""
    total = sum(len(part) for part in waiting)
    if not count or count == total:
        return [] if count else waiting
    return [_joined(waiting).take(np.arange(count, total))]


def _side_by_side(admitted: Admitted, start: int, stop: int, span: int) -> Iterator[_Rows]:
    """
    The fresh records ``start … stop - 1`` as blocks of different series side by side.

    A series' records are divided where its carry restarts and where they would span ``span`` clocks or more, which is
    what the rings have to spare; the first parts of all series make the first block, and so on.
    """
    fresh = np.arange(start, stop)
    order = np.argsort(admitted.slot_M[start:stop], kind="stable")
    slot = admitted.slot_M[start:stop][order]
    fresh = fresh[order]
    first = np.r_[True, slot[1:] != slot[:-1]]
    group_start = np.flatnonzero(first)
    group = np.cumsum(first) - 1
    part = _parts(admitted.clock_M[fresh], admitted.restart_M[fresh], first, group_start[group], span)
    for number in range(int(part.max()) + 1):
        here = np.flatnonzero(part == number)
        yield _wave_by_wave(fresh[here], slot[here])


def _parts(
    clock: I64, restart: NDArray[np.bool_], first: NDArray[np.bool_], group_start: NDArray[np.intp], span: int
) -> NDArray[np.int64]:
    """Which part of its series each record belongs to, from 0."""
    part = np.zeros(len(clock), np.int64)
    if (clock - clock[group_start] < span).all() and not (restart & ~first).any():
        return part
    number, since = 0, 0
    for i, (n, begins, restarts) in enumerate(zip(clock.tolist(), first.tolist(), restart.tolist(), strict=True)):
        if begins:
            number, since = 0, n
        elif restarts or n - since >= span:
            number, since = number + 1, n
        part[i] = number
    return part


def _wave_by_wave(fresh: NDArray[np.int64], slot: NDArray[np.int64]) -> _Rows:
    """Records sorted by (slot, order) as waves, the series with most records first."""
    first = np.r_[True, slot[1:] != slot[:-1]]
    group = np.cumsum(first) - 1
    counts = np.bincount(group)
    rank = np.arange(len(slot)) - np.flatnonzero(first)[group]
    by_count = np.argsort(-counts, kind="stable")
    place = np.empty_like(by_count)
    place[by_count] = np.arange(len(by_count))
    order = np.lexsort((place[group], rank))
    return _Rows(
        fresh_N=fresh[order],
        series_N=place[group][order],
        slot_B=slot[first][by_count],
        waves=np.bincount(rank).tolist(),
    )


def _dead_letters(
    batch: RecordBatch, outcome_N: NDArray[np.uint8], verdict_N: NDArray[np.uint8], *, undecoded: bool
) -> tuple[Rejected, ...]:
    """Admission's rejections and, if they are to be dead letters, decoding's; in the order of the cut."""
    decoding = batch.rejected if undecoded else ()
    own: list[Rejected] = []
    for i in np.flatnonzero(outcome_N == Outcome.DEAD).tolist():
        where = batch.cut[batch.range_index[i]]
        reason, message = (
            ("future", "the event time lies more than series.max_ahead past the broker's timestamp")
            if verdict_N[i] == Verdict.FUTURE
            else ("late", "not after the newest record of its series")
        )
        offset, row = int(batch.offset[i]), int(batch.row[i])
        own.append(Rejected(where.topic, where.partition, offset, row, reason, "", message))
    if not own:
        return decoding
    starts: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for i, r in enumerate(batch.cut):
        starts.setdefault((r.topic, r.partition), []).append((r.start, i))

    def order(rejected: Rejected) -> tuple[int, int, int]:
        ranges = starts[rejected.topic, rejected.partition]
        turn = ranges[bisect_right(ranges, rejected.offset, key=_start) - 1][1]
        return turn, rejected.offset, rejected.row

    return tuple(sorted((*decoding, *own), key=order))


def _start(placed: tuple[int, int]) -> int:
    return placed[0]
