"""Whatever a message holds: nothing crashes, the state stays finite, and every one is accounted for."""

import resource
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hostile import Hostile, exploded, flat, line

from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.records.decode import compile_decoder

TIME = {"path": "$.t", "unit": "auto"}
SHAPES: dict[str, tuple[Any, dict[str, Any], list[str] | None]] = {
    "json": (flat, {"series_id": ["$.id"], "timestamp": TIME, "target": "$.y"}, None),
    "arrays": (
        exploded,
        {
            "explode": "$.obs",
            "series_id": ["$.id", "@partition"],
            "timestamp": {"path": "@.t"},
            "target": {"a": "@.a", "b": "@.b"},
            "max_rows": 100,
        },
        None,
    ),
    "csv": (
        line,
        {"format": "csv", "series_id": ["$.id"], "timestamp": TIME, "target": "$.y"},
        ["id", "t", "y"],
    ),
}
ABSENT_IS_NAN = {"queue.y_BT", "window_y", "window_base", "ledger_base", "season_value"}


def config(decode: dict[str, Any]) -> Config:
    return Config.model_validate({
        "source": {"type": "files"},
        "decode": {**decode, "max_bytes": "100KiB"},
        "series": {"max_series": 400, "gap_reset": "400s"},
        "model": {"hidden_size": 5, "horizons": 3, "season": 4},
        "training": {"k1": 4, "k2": 10, "batch_series": 5, "max_wait": 40},
    })  # fmt: skip


def be_hostile(shape: str, seed: int, records: int, step: int) -> Counter[str]:
    """So many messages through decoder and engine; how each record ended."""
    body, decode, columns = SHAPES[shape]
    settings = config(decode)
    decoder, engine = compile_decoder(settings.decode, columns), Engine.create(settings, "cpu")
    hostile = Hostile(seed, body)
    ends: Counter[str] = Counter()
    seen = steps = 0
    peak_kib = 0
    while seen < records:
        messages = hostile.messages(step)
        batch = decoder.decode(messages)
        report = engine.step(batch)
        told = {(messages.cut[r].partition, at) for r, at in zip(batch.range_index, batch.offset.tolist(), strict=True)}
        told |= {(r.partition, r.offset) for r in batch.rejected}
        there = {
            (messages.cut[r].partition, at): value
            for r, at, value in zip(messages.range_index, messages.offset.tolist(), messages.value, strict=True)
        }
        silent = [there[message] for message in there.keys() - told]
        assert set(silent) <= {None}, "a message that nobody speaks of"
        assert batch.skipped == len(silent)
        counts = {outcome.name.lower(): count for outcome, count in report.counts().items()}
        assert sum(counts.values()) == batch.consumed
        ends.update(counts)
        # Before the first value of a series there is nothing to say, and that is told as null.
        assert not np.isinf(report.forecasts.yhat_MK).any()
        seen += len(messages)
        steps += 1
        if steps % 50 == 0 or seen >= records:
            assert_finite(engine)
        if seen > records / 2 and not peak_kib:
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib) / 1024
    assert grown_mib < 200, f"memory grew by {grown_mib:.0f} MiB in the second half"
    print(f"{shape}, seed {seed}: {seen} messages, {sum(ends.values())} records: {dict(ends)}", file=sys.stderr)
    ends["messages"] = seen
    return ends


def assert_finite(engine: Engine) -> None:
    """No infinity anywhere, and NaN only where it stands for a value that is absent."""
    state = engine.state()
    named = [*state.weights.items(), *state.training.items()]
    named += [(name, chunk) for name, chunks in state.columns.items() for chunk in chunks]
    for name, tensor in named:
        assert not bool(tensor.isinf().any()), name
        assert name in ABSENT_IS_NAN or not bool(tensor.isnan().any()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_hostile_messages_are_all_accounted_for_and_leave_the_state_finite(shape):
    ends = be_hostile(shape, seed=17, records=7_000, step=500)

    assert ends["messages"] >= 7_000
    assert len(ends) > 4, ends


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("shape", "records"), [("json", 600_000), ("arrays", 250_000), ("csv", 150_000)])
def test_a_million_hostile_messages_are_all_accounted_for(shape, records):
    assert be_hostile(shape, seed=1_000_000, records=records, step=2_000)["messages"] >= records
