import gzip
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from reports import SECOND_NS, START_NS, make_report, make_update

from streamlstm.engine.report import EXPERTS, Outcome
from streamlstm.records.batch import Rejected, SeriesId
from streamlstm.recovery.making import Census
from streamlstm.service.metrics import PREFIX, Metrics, describe
from streamlstm.service.observer import Checkpointed, Committed, Observer, Resumed, StepTimings
from streamlstm.service.scores import WindowedScores
from streamlstm.service.status import About, Status
from streamlstm.transport.interfaces import Position

NOW_S = START_NS / SECOND_NS + 100
TIMINGS = StepTimings(poll_s=0.2, decode_s=0.01, engine_s=0.03)


class Watched:
    """Metrics and the status they read from, told the same."""

    def __init__(self, horizons: int = 3, topics: tuple[str, ...] = ("in",)) -> None:
        self.status = Status(
            About("forecasts", "0.1.0", "0123456789abcdef", "cpu"),
            WindowedScores(horizons, 100, seasonal=False),
            stall_after_s=120,
            clock_s=lambda: NOW_S,
            monotonic_s=lambda: 0.0,
        )
        self.metrics = Metrics(self.status, topics=topics, horizons=horizons, learning_rate=1e-3)
        self.observers: tuple[Observer, ...] = (self.status, self.metrics)

    def tell(self, verb: str, *facts: object) -> None:
        for observer in self.observers:
            getattr(observer, verb)(*facts)

    def samples(self) -> dict[tuple[str, tuple[str, ...]], float]:
        body, _ = self.metrics.render("text/plain")
        return {
            (
                s.name.removeprefix(PREFIX),
                tuple(s.labels[k] for k in ("topic", "partition") if k in s.labels) or tuple(s.labels.values()),
            ): s.value
            for family in parse_text(body.decode())
            for s in family.samples
        }

    def value(self, name: str, *labels: str) -> float:
        return self.samples()[name, labels]


def commit(*reports: object, **changes: object) -> Committed:
    facts = {
        "reports": reports,
        "forecasts": 0,
        "dead_letters": 0,
        "bytes": 0,
        "duration_s": 0.004,
        "published_at_s": NOW_S,
        "positions": [Position("in", 0, 4)],
    }
    return Committed(**{**facts, **changes})


def test_every_metric_of_the_reference_is_exported_and_none_besides() -> None:
    body, _ = Watched().metrics.render("text/plain")
    exported = {f.name for f in parse_text(body.decode())}
    documented = set(re.findall(r"^\| `(\w+)`", describe(), re.MULTILINE))
    assert {PREFIX + n.removesuffix("_total") for n in documented} == {n for n in exported if n.startswith(PREFIX)}


def test_the_reference_in_docs_is_the_code_s() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text() == describe(), "run: python -m streamlstm.service.metrics > docs/metrics.md"


def test_known_label_values_are_there_from_the_start_at_zero() -> None:
    samples = Watched().samples()
    for outcome in Outcome:
        assert samples["records_total", (outcome.name.lower(),)] == 0
    assert samples["received_bytes_total", ("in",)] == 0
    assert samples["commits_total", ("failed",)] == 0
    assert samples["forecasts_total", ("3",)] == 0


def test_what_is_not_known_yet_is_nan() -> None:
    samples = Watched().samples()
    for name in ("train_loss", "gradient_norm"):
        assert math.isnan(samples[name, ("lstm",)])
    for name in ("checkpoint_last_success_timestamp_seconds", "series_active", "learning_lag_seconds"):
        assert math.isnan(samples[name, ()])
    assert math.isnan(samples["prequential_mae", ("1",)])
    assert samples["prequential_samples", ("1",)] == 0


@pytest.mark.parametrize("horizons", [24, 1000])
def test_time_series_stay_below_their_budget_whatever_the_keys(horizons: int) -> None:
    watched = Watched(horizons)
    for step in range(3):
        keys = [f"key-{step}-{i}" for i in range(500)]
        report = make_report(keys=keys, records=500, horizons=horizons, step=step)
        watched.tell("observe_step", report, TIMINGS, {"in": 1})
        watched.tell("observe_commit", commit(report))
    before = len(watched.samples())
    watched.tell("observe_lag", {("in", p): 1 for p in range(64)})
    watched.tell("observe_commit", commit(positions=[Position("in", p, 1) for p in range(64)]))
    assert before < 500
    assert len(watched.samples()) < 1000


def test_outcomes_of_committed_records_add_up() -> None:
    undecoded = Rejected("in", 0, 4, 0, "schema", "$.value", "no number")
    refused = Rejected("in", 0, 1, 0, "future", "", "ahead")
    outcome = [Outcome.FORECAST, Outcome.DEAD, Outcome.LATE, Outcome.WARMING]
    report = make_report(outcome=outcome, undecoded=[undecoded], refused=[refused])
    watched = Watched()
    watched.tell("observe_step", report, TIMINGS, {"in": 99})
    assert watched.value("records_total", "forecast") == 0, "computed, not yet committed"
    watched.tell("observe_commit", commit(report, forecasts=2))
    samples = watched.samples()
    counts = {labels[0]: v for (name, labels), v in samples.items() if name == "records_total"}
    assert counts == {"forecast": 1, "warming": 1, "late": 1, "duplicate": 0, "skipped": 0, "dead": 2}
    assert samples["dead_letters_total", ("schema",)] == samples["dead_letters_total", ("future",)] == 1
    assert samples["received_bytes_total", ("in",)] == 99
    assert samples["cut_records_sum", ()] == 5
    assert samples["forecasts_total", ("2",)] == 2


def test_shared_horizons_count_every_forecast() -> None:
    watched = Watched(horizons=30)
    watched.tell("observe_commit", commit(forecasts=10))
    assert watched.value("forecasts_total", "4-5") == 20
    assert watched.value("forecasts_total", "24-30") == 70


def test_updates_are_counted_by_what_became_of_them() -> None:
    watched = Watched()
    updates = [
        make_update(1, loss=0.5, clipped=True),
        make_update(2, loss=0.125, gradient_norm=2.0, lag_ns=5 * SECOND_NS),
        make_update(3, loss=math.nan, skipped=True, rolled_back=True),
    ]
    watched.tell("observe_step", make_report(updates=updates), TIMINGS, {})
    samples = watched.samples()
    assert samples["updates_total", ()] == 2
    assert samples["updates_skipped_total", ("non_finite",)] == 1
    assert samples["rollbacks_total", ()] == 1
    assert samples["gradient_clips_total", ("lstm",)] == 1
    assert samples["train_loss", ("lstm",)] == 0.125
    assert samples["gradient_norm", ("lstm",)] == 2.0
    assert samples["learning_lag_seconds", ()] == 5
    assert samples["learning_rate", ("lstm",)] == 1e-3


def test_scores_are_those_of_the_window() -> None:
    watched = Watched(horizons=1)
    error = np.array([1.0, 2.0, np.nan] * 4).reshape(4, len(EXPERTS), 1)
    watched.tell("observe_commit", commit(make_report(horizons=1, error=error)))
    samples = watched.samples()
    assert samples["prequential_samples", ("1",)] == 4
    assert samples["prequential_mae", ("1",)] == 1.0
    assert samples["prequential_mase", ("1",)] == 0.5
    assert samples["prequential_skill_ratio", ("1",)] == 0.75


def test_lag_in_seconds_is_the_age_of_the_newest_committed_record() -> None:
    watched = Watched()
    watched.tell("observe_lag", {("in", 0): 5, ("in", 1): 0, ("in", 2): 5})
    watched.tell("observe_commit", commit(make_report(records=4)))
    samples = watched.samples()
    assert samples["source_lag_records", ("in", "0")] == 5
    assert samples["source_lag_seconds", ("in", "0")] == 97.0
    assert samples["source_lag_seconds", ("in", "1")] == 0.0
    assert math.isnan(samples["source_lag_seconds", ("in", "2")]), "nothing of it was committed yet"
    assert samples["source_position_offset", ("in", "0")] == 4


def test_the_delay_of_a_transaction_is_that_of_its_oldest_record() -> None:
    watched = Watched()
    watched.tell("observe_commit", commit(make_report(records=4)))
    watched.tell("observe_commit", commit(make_report(records=1, broker_ns=[-1])))
    assert watched.value("forecast_delay_seconds_count") == 1
    assert watched.value("forecast_delay_seconds_sum") == 100.0


def test_a_failed_commit_and_a_failed_checkpoint_are_counted() -> None:
    watched = Watched()
    watched.tell("observe_commit_failed", "gone")
    failed = Checkpointed("failed", 9, 0, 0.1, 0.0, 0.0, NOW_S, [], "disk full")
    watched.tell("observe_checkpoint", failed)
    samples = watched.samples()
    assert samples["commits_total", ("failed",)] == samples["publish_errors_total", ("kafka",)] == 1
    assert samples["checkpoints_total", ("failed",)] == 1
    assert math.isnan(samples["checkpoint_last_success_timestamp_seconds", ()])


def test_a_written_checkpoint_says_when_how_big_and_how_far() -> None:
    watched = Watched()
    watched.tell("observe_checkpoint", Checkpointed("written", 9, 4096, 0.1, 0.2, 0.3, NOW_S, [Position("in", 0, 77)]))
    samples = watched.samples()
    assert samples["checkpoint_last_success_timestamp_seconds", ()] == NOW_S
    assert samples["checkpoint_size_bytes", ()] == 4096
    assert samples["checkpoint_offset", ("in", "0")] == 77
    assert samples["checkpoint_duration_seconds_sum", ("fsync",)] == 0.3


def resumed() -> Resumed:
    """At step 12, from an older checkpoint than the newest, with other bits."""
    return Resumed(
        source="fallback",
        step=12,
        replayed_steps=3,
        rebased=True,
        quarantined=1,
        phases_s={"load": 0.5, "replay": 2.0},
        checkpoint_step=9,
        checkpoint_at_s=NOW_S - 60,
        positions=[Position("in", 0, 120)],
        checkpoint_positions=[Position("in", 0, 90)],
        census=Census(7, 30, 4, 12),
    )


def test_a_start_says_where_it_came_from_and_whether_bits_match() -> None:
    watched = Watched()
    watched.tell("observe_resume", resumed())
    watched.tell("observe_phase", "running")
    samples = watched.samples()
    assert samples["resumes_total", ("fallback",)] == 1
    assert samples["replayed_steps_total", ()] == 3
    assert samples["checkpoints_quarantined_total", ()] == 1
    assert samples["fingerprint_matches", ()] == 0
    assert samples["resume_duration_seconds", ("replay",)] == 2.0
    assert samples["checkpoint_last_success_timestamp_seconds", ()] == NOW_S - 60
    assert [samples[f"series_{name}", ()] for name in ("active", "warming", "stored")] == [30, 4, 12]
    assert samples["source_position_offset", ("in", "0")] == 120
    assert samples["checkpoint_offset", ("in", "0")] == 90
    assert samples["ready", ()] == 1
    watched.tell("observe_phase", "stopping")
    assert watched.value("ready") == 0


def test_openmetrics_is_served_to_who_accepts_it() -> None:
    body, content_type = Watched().metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert len(list(parse_openmetrics(body.decode()))) > 30
    assert len(gzip.compress(body)) < len(body)


def test_what_runs_is_said_by_labels() -> None:
    body, _ = Watched().metrics.render("text/plain")
    assert re.search(rb'streamlstm_config_info\{cell="lstm",config_hash="01234567"\} 1\.0', body)
    assert re.search(rb'streamlstm_build_info\{device="cpu",.*version="0.1.0"\} 1\.0', body)


def test_keys_on_several_partitions_are_counted():
    watched = Watched()
    for partition in (0, 1):
        report = make_report(records=1)
        batch = replace(report.batch, series=(SeriesId("in", partition, "a"),))
        watched.tell("observe_step", replace(report, batch=batch), TIMINGS, {"in": 1})
    assert watched.value("keys_on_several_partitions_total") == 1


def test_a_dead_letter_for_a_whole_batch_counts_its_records():
    watched = Watched()
    unread = Rejected("in", 0, 9, 0, "codec", "", "offsets 0 to 9", 10)
    watched.tell("observe_commit", commit(make_report(records=0, undecoded=[unread])))
    assert watched.value("dead_letters_total", "codec") == 10
    assert watched.value("records_total", "dead") == 10
