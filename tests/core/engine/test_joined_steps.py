"""Steps that are computed together tell the digest that each would have had by itself, and end in the same state."""

import random
from dataclasses import replace

import fakes
import numpy as np
import pytest
import streams

from streamlstm.engine.core import Engine
from streamlstm.engine.report import StepReport
from streamlstm.records.batch import Cut, Messages, Range

SERIES, RECORDS = 7, 200


def recorded(seed: int) -> list[Cut]:
    """Cuts of two partitions, long, short and without any range."""
    dice = random.Random(seed)
    at = [0, 0]
    cuts: list[Cut] = []
    while min(at) < RECORDS:
        cut: list[Range] = []
        for partition in dice.sample([0, 1], dice.choice([0, 1, 2, 2])):
            end = min(RECORDS, at[partition] + dice.choice([1, 2, 5, 40]))
            if end > at[partition]:
                cut.append(Range("in", partition, at[partition], end))
                at[partition] = end
        cuts.append(tuple(cut))
    return cuts


def read(cut: Cut) -> Messages:
    """What is at an offset hangs on it alone: some offsets hold no record, and some no JSON."""
    index, offset, value = [], [], []
    for i, r in enumerate(cut):
        for at in range(r.start, r.end):
            dice = random.Random(2 * at + r.partition)
            if dice.random() < 0.05:
                continue
            index.append(i)
            offset.append(at)
            broken = dice.random() < 0.05
            value.append(b"broken" if broken else fakes.message(f"s{dice.randrange(SERIES)}", dice.gauss(0, 1)))
    return Messages(
        cut=cut,
        range_index=np.array(index, np.int32),
        offset=np.array(offset, np.int64),
        broker_ns=np.full(len(value), -1, np.int64),
        key=[None] * len(value),
        value=value,
    )


def step(engine: Engine, cuts: list[Cut]) -> StepReport:
    batch = fakes.decode(read(tuple(r for cut in cuts for r in cut)))
    return engine.step(replace(batch, steps=len(cuts)))


@pytest.mark.parametrize("seed", range(3))
def test_joined_steps_have_the_digests_of_each_and_end_in_the_same_state(seed):
    cuts, dice = recorded(seed), random.Random(seed)
    config = streams.small_config(series={"gap_reset": None})
    alone, together = Engine.create(config, "cpu"), Engine.create(config, "cpu")

    expected = [step(alone, [cut]).digest() for cut in cuts]
    digests: list[bytes] = []
    while len(digests) < len(cuts):
        joined = cuts[len(digests) : len(digests) + dice.choice([1, 2, 3, 17])]
        report = step(together, joined)
        digests += report.digests([len(cut) for cut in joined])
        assert report.step == together.step_number == len(digests)

    assert digests == expected
    assert len(set(expected)) > len(expected) / 2
    assert any(fakes.decode(read(cut)).rejected for cut in cuts)
    assert together.state().digests() == alone.state().digests()
    assert together.state().meta == alone.state().meta
