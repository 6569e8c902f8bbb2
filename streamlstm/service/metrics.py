"""
What Prometheus sees. The table below is the one truth: the registry is built from it, and ``docs/metrics.md`` too.

Label values that can be known are there from the start, so that a rate begins at zero; a gauge that is not known yet is
NaN. Everything is observed once a step or less often, and nothing has a label per series: however many keys there are,
a process exports a few hundred series.

``python -m streamlstm.service.metrics`` prints the reference.
"""

import math
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from streamlstm.engine.report import Outcome, StepReport
from streamlstm.records.batch import REASONS, Range
from streamlstm.service.observer import Checkpointed, Committed, Phase, Resumed, StepTimings
from streamlstm.service.scores import bucket_horizons
from streamlstm.service.sightings import Sightings
from streamlstm.service.status import Status

PREFIX = "streamlstm_"
MODEL = "lstm"

_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_DELAY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_CHECKPOINT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RECORDS = tuple(4**i for i in range(9))

Kind = Literal["counter", "gauge", "histogram", "info", "gauge at scrape"]


class Family(NamedTuple):
    """One metric: its labels with their values where these are closed, ``None`` where they come as they are met."""

    name: str
    kind: Kind
    text: str
    labels: Mapping[str, tuple[str, ...] | None] = {}
    buckets: tuple[float, ...] = ()


def _families(topics: Sequence[str] | None, horizons: Sequence[str] | None) -> tuple[Family, ...]:
    """Every metric. ``topics`` and ``horizons`` are the values of those labels, ``None`` in the reference."""
    topic = tuple(topics) if topics is not None else None
    horizon = {"horizon": tuple(horizons) if horizons is not None else None}
    place = {"topic": None, "partition": None}
    model = {"model": (MODEL,)}
    return (
        Family("build_info", "info", "What runs.", dict.fromkeys(("version", "python", "torch", "device"))),
        Family("config_info", "info", "The configuration it runs with.", dict.fromkeys(("config_hash", "cell"))),
        Family("ready", "gauge", "1 while restored, assigned and processing."),
        Family(
            "records_total",
            "counter",
            "Records whose outcome was committed; the outcomes add up to the records consumed.",
            {"outcome": tuple(o.name.lower() for o in Outcome)},
        ),
        Family("received_bytes_total", "counter", "Bytes of message values taken from the source.", {"topic": topic}),
        Family("dead_letters_total", "counter", "Records that could not be used, by reason.", {"reason": REASONS}),
        Family(
            "state_resets_total",
            "counter",
            "Carries that started again from zero.",
            {"reason": ("gap", "control", "non_finite")},
        ),
        Family("source_lag_records", "gauge", "Records between the position and the end of the partition.", place),
        Family(
            "source_lag_seconds",
            "gauge at scrape",
            "Now minus the broker's timestamp of the newest committed record; 0 when none waits.",
            place,
        ),
        Family("source_position_offset", "gauge", "Next offset to process, as committed.", place),
        Family(
            "log_gap_offsets_total",
            "counter",
            "Offsets that retention deleted before they were read, passed over by source.on_gap: skip.",
            {"topic": topic},
        ),
        Family("checkpoint_offset", "gauge", "Next offset in the newest durable checkpoint.", place),
        Family(
            "step_duration_seconds",
            "histogram",
            "Time of one step (publish: of one transaction), by stage; poll holds the waiting too.",
            {"stage": ("poll", "decode", "engine", "publish")},
            _STEP_S,
        ),
        Family("cut_records", "histogram", "Records in one step.", {}, _RECORDS),
        Family(
            "forecast_delay_seconds",
            "histogram",
            "Published minus the broker's timestamp, of the oldest record in a transaction.",
            {},
            _DELAY_S,
        ),
        Family("forecasts_total", "counter", "Forecasts published.", horizon),
        Family("publish_errors_total", "counter", "Transactions that failed.", {"sink": ("kafka",)}),
        Family("commits_total", "counter", "Transactions.", {"outcome": ("committed", "failed")}),
        Family("updates_total", "counter", "Optimizer steps taken."),
        Family("updates_skipped_total", "counter", "Optimizer steps not taken.", {"reason": ("non_finite",)}),
        Family("rollbacks_total", "counter", "Times the weights went back to the last good ones."),
        Family("train_loss", "gauge", "Loss of the last update, in units of the series' scale.", model),
        Family("gradient_norm", "gauge", "Length of the last update's gradient before clipping.", model),
        Family("learning_rate", "gauge", "Step size of the optimizer.", model),
        Family("gradient_clips_total", "counter", "Updates whose gradient was clipped.", model),
        Family("learning_lag_seconds", "gauge", "Newest truth learnt from, behind the newest record, in event time."),
        Family(
            "prequential_mae",
            "gauge at scrape",
            "Mean absolute error over the window, in units of the target, all series together.",
            horizon,
        ),
        Family("prequential_rmse", "gauge at scrape", "Root mean square error over the window.", horizon),
        Family(
            "prequential_mase",
            "gauge at scrape",
            "MAE over the window divided by the naive forecast's one interval ahead in the same window: the seasonal "
            "naive's with model.season, else the last value's.",
            horizon,
        ),
        Family(
            "prequential_skill_ratio",
            "gauge at scrape",
            "1 - MSE / MSE of the last value, over the window: above 0 beats persistence.",
            horizon,
        ),
        Family("prequential_samples", "gauge at scrape", "Settled forecasts in the window.", horizon),
        Family("series_active", "gauge", "Series with a state in memory."),
        Family(
            "keys_on_several_partitions_total",
            "counter",
            "Keys found on a second partition of their topic, where they are another series; with very many keys some "
            "count again.",
        ),
        Family("series_warming", "gauge", "Those of them that are still warming."),
        Family("series_stored", "gauge", "Series beyond `series.max_series`, whose states wait on the local disk."),
        Family(
            "state_evictions_total",
            "counter",
            "States that left memory: for the local disk, or for good.",
            {"reason": ("capacity", "ttl")},
        ),
        Family("checkpoints_total", "counter", "Checkpoints attempted.", {"outcome": ("written", "failed")}),
        Family("checkpoint_last_success_timestamp_seconds", "gauge", "When the newest durable checkpoint was made."),
        Family("checkpoint_size_bytes", "gauge", "Size of the newest checkpoint this process made."),
        Family(
            "checkpoint_duration_seconds",
            "histogram",
            "Time of one checkpoint; the loop stands still for snapshot only.",
            {"phase": ("snapshot", "write", "fsync")},
            _CHECKPOINT_S,
        ),
        Family("checkpoints_quarantined_total", "counter", "Generations that could not be used at start."),
        Family(
            "resumes_total",
            "counter",
            "Starts, by where the state came from; fallback: an older generation, because newer ones were bad.",
            {"source": ("fresh", "checkpoint", "fallback")},
        ),
        Family("resume_duration_seconds", "gauge", "Time of the start.", {"phase": ("load", "progress", "replay")}),
        Family("replayed_steps_total", "counter", "Steps computed again at start, their output suppressed."),
        Family(
            "fingerprint_matches",
            "gauge",
            "0 when recorded steps were replayed on other libraries or another CPU, or the self-test failed: same "
            "records, other bits.",
        ),
    )


class Metrics:
    """
    An observer that counts, in a registry of its own.

    Gauges that change without anybody telling (lag in seconds, scores) are read from ``status`` at each scrape.

    :param topics: the input topics.
    :param horizons: how many; their label values are those of
        :func:`~streamlstm.service.scores.bucket_horizons`.
    """

    def __init__(
        self, status: Status, *, topics: Sequence[str], horizons: int, learning_rate: float, cell: str = "lstm"
    ) -> None:
        disable_created_metrics()  # a second series per counter that nobody asks for
        self.registry = CollectorRegistry()
        self._buckets = bucket_horizons(horizons)
        self._sightings = Sightings()
        families = {f.name: f for f in _families(topics, [b.label for b in self._buckets])}
        self._of: dict[str, Any] = {
            f.name: _make(f, self.registry) for f in families.values() if f.kind not in ("info", "gauge at scrape")
        }
        self.registry.register(_AtScrape(status, {n: f for n, f in families.items() if f.kind == "gauge at scrape"}))
        ProcessCollector(registry=self.registry)
        about = status.about
        build = {"version": about.version, "python": platform.python_version(), "torch": version("torch")}
        for name, values in (
            ("build_info", {**build, "device": about.device}),
            ("config_info", {"config_hash": about.config_hash[:8], "cell": cell}),
        ):
            family = families[name]
            Gauge(PREFIX + name, family.text, list(family.labels), registry=self.registry).labels(**values).set(1)
        self._of["ready"].set(0)
        self._of["learning_rate"].labels(MODEL).set(learning_rate)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics or text, as the ``Accept`` header has it."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def observe_phase(self, phase: Phase) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_phase`."""
        self._of["ready"].set(phase == "running")

    def observe_turn(self, monotonic_s: float) -> None:
        """Not a metric: ``/healthz`` is for that."""

    def observe_resume(self, resumed: Resumed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_resume`."""
        of = self._of
        of["resumes_total"].labels(resumed.source).inc()
        of["replayed_steps_total"].inc(resumed.replayed_steps)
        of["checkpoints_quarantined_total"].inc(resumed.quarantined)
        of["fingerprint_matches"].set(resumed.reproducible and not resumed.rebased)
        of["checkpoint_last_success_timestamp_seconds"].set(resumed.checkpoint_at_s)
        of["series_active"].set(resumed.census.active)
        of["series_warming"].set(resumed.census.warming)
        of["series_stored"].set(resumed.census.stored)
        for name, positions in (
            ("source_position_offset", resumed.positions),
            ("checkpoint_offset", resumed.checkpoint_positions),
        ):
            for p in positions:
                of[name].labels(p.topic, p.partition).set(p.next_offset)
        for phase, duration_s in resumed.phases_s.items():
            of["resume_duration_seconds"].labels(phase).set(duration_s)

    def observe_step(self, report: StepReport, timings: StepTimings, received_bytes: Mapping[str, int]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_step`."""
        of = self._of
        of["cut_records"].observe(report.batch.consumed)
        for stage, duration_s in (("poll", timings.poll_s), ("decode", timings.decode_s), ("engine", timings.engine_s)):
            of["step_duration_seconds"].labels(stage).observe(duration_s)
        for topic, size in received_bytes.items():
            of["received_bytes_total"].labels(topic).inc(size)
        of["keys_on_several_partitions_total"].inc(self._sightings.see(report.batch.series))
        for reason, count in report.resets.items():
            of["state_resets_total"].labels(reason).inc(count)
        of["series_active"].set(report.series_total)
        of["series_warming"].set(report.series_warming)
        of["series_stored"].set(report.series_stored)
        for reason, count in report.evictions.items():
            of["state_evictions_total"].labels(reason).inc(count)
        taken = [u for u in report.updates if not u.skipped]
        of["updates_total"].inc(len(taken))
        of["updates_skipped_total"].labels("non_finite").inc(len(report.updates) - len(taken))
        of["rollbacks_total"].inc(sum(u.rolled_back for u in report.updates))
        of["gradient_clips_total"].labels(MODEL).inc(sum(u.clipped for u in taken))
        if taken:
            of["train_loss"].labels(MODEL).set(taken[-1].loss)
            of["gradient_norm"].labels(MODEL).set(taken[-1].gradient_norm)
            of["learning_lag_seconds"].set(taken[-1].lag_ns / 1e9)

    def observe_commit(self, committed: Committed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_commit`."""
        of = self._of
        of["commits_total"].labels("committed").inc()
        of["step_duration_seconds"].labels("publish").observe(committed.duration_s)
        for bucket in self._buckets:
            of["forecasts_total"].labels(bucket.label).inc(committed.forecasts * (bucket.last - bucket.first + 1))
        of["records_total"].labels(Outcome.SKIPPED.name.lower()).inc(committed.excluded)
        oldest_ns = math.inf
        for report in committed.reports:
            for outcome, count in report.counts().items():
                of["records_total"].labels(outcome.name.lower()).inc(count)
            for rejected in report.rejected:
                of["dead_letters_total"].labels(rejected.reason).inc(rejected.records)
            stamps = report.batch.broker_ns[report.batch.broker_ns >= 0]
            oldest_ns = min(oldest_ns, int(stamps.min())) if stamps.size else oldest_ns
        if math.isfinite(oldest_ns):
            of["forecast_delay_seconds"].observe(max(0.0, committed.published_at_s - oldest_ns / 1e9))
        for p in committed.positions:
            of["source_position_offset"].labels(p.topic, p.partition).set(p.next_offset)

    def observe_commit_failed(self, error: str) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_commit_failed`."""
        del error
        self._of["commits_total"].labels("failed").inc()
        self._of["publish_errors_total"].labels("kafka").inc()

    def observe_lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_lag`."""
        for (topic, partition), records in lag.items():
            self._of["source_lag_records"].labels(topic, partition).set(records)

    def observe_checkpoint(self, checkpointed: Checkpointed) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_checkpoint`."""
        of = self._of
        of["checkpoints_total"].labels(checkpointed.outcome).inc()
        if checkpointed.outcome == "failed":
            return
        of["checkpoint_last_success_timestamp_seconds"].set(checkpointed.at_s)
        of["checkpoint_size_bytes"].set(checkpointed.bytes)
        for phase, duration_s in (
            ("snapshot", checkpointed.snapshot_s),
            ("write", checkpointed.write_s),
            ("fsync", checkpointed.fsync_s),
        ):
            of["checkpoint_duration_seconds"].labels(phase).observe(duration_s)
        for p in checkpointed.positions:
            of["checkpoint_offset"].labels(p.topic, p.partition).set(p.next_offset)

    def observe_gap(self, ranges: Sequence[Range]) -> None:
        """See :meth:`~streamlstm.service.observer.Observer.observe_gap`."""
        for r in ranges:
            self._of["log_gap_offsets_total"].labels(r.topic).inc(r.end - r.start)


class _AtScrape(Collector):
    """Gauges that are read when somebody looks."""

    def __init__(self, status: Status, families: Mapping[str, Family]) -> None:
        self._status = status
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """The names, so that nobody else takes them."""
        return [self._gauge(name) for name in self._families]

    def collect(self) -> Iterator[Metric]:
        lag = self._gauge("source_lag_seconds")
        for (topic, partition), seconds in sorted(self._status.lag_s().items()):
            lag.add_metric([topic, str(partition)], seconds if math.isfinite(seconds) else math.nan)
        yield lag
        score = self._status.score()
        for name, column_B in (
            ("prequential_mae", score.mae_B),
            ("prequential_rmse", score.rmse_B),
            ("prequential_mase", score.mase_B),
            ("prequential_skill_ratio", score.skill_B),
            ("prequential_samples", score.samples_B),
        ):
            gauge = self._gauge(name)
            for label, value in zip(self._families[name].labels["horizon"] or (), column_B.tolist(), strict=True):
                gauge.add_metric([label], value)
            yield gauge

    def _gauge(self, name: str) -> GaugeMetricFamily:
        family = self._families[name]
        return GaugeMetricFamily(PREFIX + name, family.text, labels=list(family.labels))


def _make(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    """The metric with all label values that are known; a gauge begins as NaN."""
    labels = list(family.labels)
    name = PREFIX + family.name
    metric: Counter | Gauge | Histogram
    match family.kind:
        case "counter":
            metric = Counter(name, family.text, labels, registry=registry)
        case "histogram":
            metric = Histogram(name, family.text, labels, buckets=family.buckets, registry=registry)
        case _:
            metric = Gauge(name, family.text, labels, registry=registry)
    children: list[Counter | Gauge | Histogram] = []
    if not labels:
        children = [metric]
    elif len(labels) == 1 and (values := family.labels[labels[0]]) is not None:
        children = [metric.labels(value) for value in values]
    for child in children:
        if isinstance(child, Gauge):
            child.set(math.nan)
    return metric


def describe() -> str:
    """The reference, ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics`, as text or OpenMetrics, at most a tenth of a second old. Generated by",
        "`python -m streamlstm.service.metrics`.",
        "",
        "Every name begins with `streamlstm_`. Values of a label that are listed exist from the start; `NaN` means not",
        "known yet. No metric has a label per series: a process exports a few hundred time series, four more for each",
        "input partition, whatever the number of keys. Counters begin at zero with each process, and count committed",
        "work only where the text says so. `process_*` are those of the Prometheus client.",
        "",
        "A `horizon` is a number of intervals ahead. With `model.horizons` up to 24 each has a value (`1`, `2` …);",
        "beyond, horizons share values, two to an octave (`1 2 3 4-5 6-7 8-11 12-15 16-23 24-31` …): counters add them",
        "up, scores are over all forecasts in the bucket. The window of `prequential_*` is the newest `metrics.window`",
        "records that settled a forecast; it is empty after a start.",
        "",
        "| name | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for f in _families(None, None):
        labels = " · ".join(
            label + (f"={','.join(values)}" if values is not None else "") for label, values in f.labels.items()
        )
        kind = f.kind.removesuffix(" at scrape").replace("info", "info gauge")
        lines.append(f"| `{f.name}` | {kind} | {labels or '–'} | {f.text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(describe())
