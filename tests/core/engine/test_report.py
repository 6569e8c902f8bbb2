"""The digest of a step: what it depends on, and what not."""

import dataclasses

import numpy as np
import streams

from streamlstm.engine.core import Engine
from streamlstm.records.batch import Range, SeriesId


def a_report():
    config = streams.small_config()
    return Engine.create(config, "cpu").step(streams.random_batch(3, 60, 4, "mixed"))


def test_the_digest_is_of_all_that_is_published():
    report = a_report()
    batch, forecasts = report.batch, report.forecasts
    other_topic = tuple(Range("other", r.partition, r.start, r.end) for r in batch.cut)
    other_key = (SeriesId("in", 0, "another"), *batch.series[1:])
    nudged = forecasts.yhat_MK.copy()
    nudged[-1, -1] = np.nextafter(nudged[-1, -1], np.inf)
    changed = [
        dataclasses.replace(report, batch=dataclasses.replace(batch, cut=other_topic)),
        dataclasses.replace(report, batch=dataclasses.replace(batch, series=other_key)),
        dataclasses.replace(report, batch=dataclasses.replace(batch, offset=batch.offset + 1)),
        dataclasses.replace(report, outcome_N=report.outcome_N[::-1].copy()),
        dataclasses.replace(report, rejected=report.rejected[1:]),
        dataclasses.replace(report, forecasts=dataclasses.replace(forecasts, yhat_MK=nudged)),
        dataclasses.replace(report, forecasts=dataclasses.replace(forecasts, update_M=forecasts.update_M + 1)),
    ]
    digests = {other.digest() for other in (report, *changed)}
    assert len(digests) == 1 + len(changed)


def test_the_digest_of_the_same_step_is_the_same():
    assert a_report().digest() == a_report().digest()


def test_a_fresh_state_has_digests():
    assert Engine.create(streams.small_config(), "cpu").state().digests().keys() == {"weights", "training", "series"}
