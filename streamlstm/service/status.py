"""
The daemon's own account of itself: what ``/healthz``, ``/readyz`` and ``/status`` answer from.

The loop tells it (:class:`~streamlstm.service.observer.Observer`), other threads ask; one lock keeps the two apart,
held for microseconds by the loop. Nothing of the engine's is kept.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamlstm.engine.report import Outcome
from streamlstm.records.batch import Range, RecordBatch
from streamlstm.service.observer import Checkpointed, Committed, Phase, Resumed, StepReport, StepTimings
from streamlstm.service.scores import WindowedScores, WindowScore

Place = tuple[str, int]
"""Topic and partition."""


@dataclass(frozen=True, slots=True)
class About:
    """What does not change while the process lives."""

    name: str
    version: str
    config_hash: str
    device: str


class Status:
    """
    The facts of this process, told by the loop and asked by others.

    :param stall_after_s: without a turn of the loop for this long it is no longer healthy.
    :param clock_s: seconds since the epoch.
    :param monotonic_s: the clock of :meth:`observe_turn`.
    """

    def __init__(
        self,
        about: About,
        scores: WindowedScores,
        *,
        stall_after_s: float,
        clock_s: Callable[[], float],
        monotonic_s: Callable[[], float],
    ) -> None:
        self.about = about
        self._scores = scores
        self._stall_after_s = stall_after_s
        self._clock_s = clock_s
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._started_s = clock_s()
        self._turned_s = monotonic_s()
        self._phase: Phase = "starting"
        self._step = 0
        self._update = 0
        self._series = (0, 0, 0)
        self._records = dict.fromkeys(Outcome, 0)
        self._resumed: Resumed | None = None
        self._checkpointed: Checkpointed | None = None
        self._positions: dict[Place, int] = {}
        self._lag: dict[Place, int] = {}
        self._newest_s: dict[Place, float] = {}

    # What the loop tells.

    def observe_phase(self, phase: Phase) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_phase`."""
        with self._lock:
            self._phase = phase

    def observe_turn(self, monotonic_s: float) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_turn`."""
        self._turned_s = monotonic_s

    def observe_resume(self, resumed: Resumed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_resume`."""
        with self._lock:
            self._resumed = resumed
            self._step, self._update = resumed.step, resumed.census.updates
            self._series = resumed.census.active, resumed.census.warming, resumed.census.stored
            self._positions = {(p.topic, p.partition): p.next_offset for p in resumed.positions}

    def observe_step(self, report: StepReport, timings: StepTimings, received_bytes: Mapping[str, int]) -> None:
        """Nothing to keep: it may never be committed."""

    def observe_commit(self, committed: Committed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_commit`."""
        with self._lock:
            self._records[Outcome.SKIPPED] += committed.excluded
            for report in committed.reports:
                self._step = report.step
                self._scores.add(report.forecasts.settled_error_MXK)
                self._series = report.series_total, report.series_warming, report.series_stored
                if report.updates:
                    self._update = report.updates[-1].number
                for outcome, count in report.counts().items():
                    self._records[outcome] += count
                self._newest_s.update(_newest_broker_s(report.batch))
            self._positions.update({(p.topic, p.partition): p.next_offset for p in committed.positions})

    def observe_commit_failed(self, error: str) -> None:
        """Nothing to keep: the process is about to end."""

    def observe_lag(self, lag: Mapping[Place, int]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_lag`."""
        with self._lock:
            self._lag = dict(lag)

    def observe_checkpoint(self, checkpointed: Checkpointed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_checkpoint`."""
        with self._lock:
            self._checkpointed = checkpointed

    def observe_gap(self, ranges: Sequence[Range]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_gap`."""
        with self._lock:
            for r in ranges:
                place = r.topic, r.partition
                self._positions[place] = max(r.end, self._positions.get(place, 0))

    # What others ask.

    def healthy(self) -> bool:
        """Whether the loop turned within the limit; a process that starts has that long for its first turn."""
        return self._monotonic_s() - self._turned_s <= self._stall_after_s

    def unready(self, max_lag_s: float | None = None) -> str | None:
        """Why it is not ready, ``None`` when it is. With ``max_lag_s``, no partition may be further behind."""
        with self._lock:
            if self._phase != "running":
                return self._phase
            if max_lag_s is None:
                return None
            if not self._lag:
                return "lag not known yet"
        behind_s = max(self.lag_s().values())
        return None if behind_s <= max_lag_s else f"{behind_s:.0f} s behind"

    def score(self) -> WindowScore:
        """The prequential scores now."""
        with self._lock:
            return self._scores.score()

    def lag_s(self) -> dict[Place, float]:
        """
        How old the newest committed record is, by partition: 0 when none waits, infinite when none was committed yet.

        Its age is by the broker's timestamp.
        """
        with self._lock:
            now_s = self._clock_s()
            return {
                place: max(0.0, now_s - self._newest_s.get(place, -math.inf)) if lag else 0.0
                for place, lag in self._lag.items()
            }

    def snapshot(self) -> dict[str, Any]:
        """Everything, for ``/status``. Numbers that are not known are NaN or infinite: JSON writes them as null."""
        lag_s, score = self.lag_s(), self.score()
        with self._lock:
            places = sorted({*self._positions, *self._lag})
            resumed = self._resumed
            return {
                "name": self.about.name,
                "version": self.about.version,
                "config": self.about.config_hash,
                "device": self.about.device,
                "phase": self._phase,
                "healthy": self.healthy(),
                "uptime_s": self._clock_s() - self._started_s,
                "step": self._step,
                "update": self._update,
                "records": {outcome.name.lower(): count for outcome, count in self._records.items()},
                "series": dict(zip(("active", "warming", "stored"), self._series, strict=True)),
                "positions": [
                    {
                        "topic": place[0],
                        "partition": place[1],
                        "next_offset": self._positions.get(place),
                        "lag_records": self._lag.get(place),
                        "lag_s": lag_s.get(place),
                    }
                    for place in places
                ],
                "resumed": resumed
                and {
                    "source": resumed.source,
                    "step": resumed.step,
                    "replayed_steps": resumed.replayed_steps,
                    "rebased": resumed.rebased,
                },
                "checkpoint": _checkpoint(self._checkpointed, resumed),
                "accuracy": [
                    {
                        "horizon": bucket.label,
                        "samples": int(score.samples_B[b]),
                        "mae": float(score.mae_B[b]),
                        "rmse": float(score.rmse_B[b]),
                        "mase": float(score.mase_B[b]),
                        "skill": float(score.skill_B[b]),
                    }
                    for b, bucket in enumerate(self._scores.buckets)
                ],
            }


def _checkpoint(saved: Checkpointed | None, resumed: Resumed | None) -> dict[str, Any] | None:
    """The last attempt of this process, before that the checkpoint it came up from."""
    if saved is not None:
        return {
            "outcome": saved.outcome,
            "step": saved.step,
            "bytes": saved.bytes,
            "at_s": saved.at_s,
            "error": saved.error,
        }
    if resumed is not None:
        at_s = resumed.checkpoint_at_s
        return {"outcome": "found", "step": resumed.checkpoint_step, "bytes": None, "at_s": at_s, "error": None}
    return None


def _newest_broker_s(batch: RecordBatch) -> dict[Place, float]:
    """The broker's newest timestamp by partition, of the records that have one."""
    newest: dict[Place, float] = {}
    for i, where in enumerate(batch.cut):
        stamps = batch.broker_ns[batch.range_index == i]
        if stamps.size and int(stamps.max()) >= 0:
            newest[where.topic, where.partition] = int(np.max(stamps)) / 1e9
    return newest
