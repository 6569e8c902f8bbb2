"""Those who watch the daemon, put together from its configuration."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from streamlstm import __version__
from streamlstm.config.model import Config
from streamlstm.engine.report import StepReport
from streamlstm.service.metrics import Metrics
from streamlstm.service.observer import Checkpointed, Committed, Observer, Phase, Resumed, StepTimings
from streamlstm.service.scores import WindowedScores
from streamlstm.service.status import About, Status


class Watch(NamedTuple):
    """``observer`` is what the daemon is given: it tells both of the others."""

    observer: Observer
    status: Status
    metrics: Metrics


def watch(config: Config, config_hash: str, device: str) -> Watch:
    """
    The watchers of one process.

    Serve what they know with ``HttpServer(config.http.listen, status, metrics.render)``.
    """
    status = Status(
        About(config.name, __version__, config_hash, device),
        WindowedScores(config.model.horizons, config.metrics.window, seasonal=config.season is not None),
        stall_after_s=config.http.stall_after,
        clock_s=time.time,
        monotonic_s=time.monotonic,
    )
    metrics = Metrics(
        status, topics=config.source.topics, horizons=config.model.horizons, learning_rate=config.learning_rate
    )
    return Watch(Observers([status, metrics]), status, metrics)


class Observers:
    """Several observers as one, told in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def observe_phase(self, phase: Phase) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_phase`."""
        for observer in self._observers:
            observer.observe_phase(phase)

    def observe_turn(self, monotonic_s: float) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_turn`."""
        for observer in self._observers:
            observer.observe_turn(monotonic_s)

    def observe_resume(self, resumed: Resumed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_resume`."""
        for observer in self._observers:
            observer.observe_resume(resumed)

    def observe_step(self, report: StepReport, timings: StepTimings, received_bytes: Mapping[str, int]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_step`."""
        for observer in self._observers:
            observer.observe_step(report, timings, received_bytes)

    def observe_commit(self, committed: Committed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_commit`."""
        for observer in self._observers:
            observer.observe_commit(committed)

    def observe_commit_failed(self, error: str) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_commit_failed`."""
        for observer in self._observers:
            observer.observe_commit_failed(error)

    def observe_lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_lag`."""
        for observer in self._observers:
            observer.observe_lag(lag)

    def observe_checkpoint(self, checkpointed: Checkpointed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_checkpoint`."""
        for observer in self._observers:
            observer.observe_checkpoint(checkpointed)
