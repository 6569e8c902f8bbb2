"""Those who watch the daemon, put together from its configuration."""

import time
from typing import NamedTuple

from streamlstm import __version__
from streamlstm.config.model import Config
from streamlstm.service.metrics import Metrics
from streamlstm.service.observer import Observers
from streamlstm.service.scores import WindowedScores
from streamlstm.service.status import About, Status


class Watch(NamedTuple):
    """``observer`` is what the daemon is given: it tells both of the others."""

    observer: Observers
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
    return Watch(Observers(status, metrics), status, metrics)
