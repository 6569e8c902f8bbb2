"""A log that is only up to some offset what it was: which checkpoint saw no more of it."""

from fakes import Broker, Process, message

from streamlstm.recovery.branching import way_back


def test_the_newest_checkpoint_that_saw_no_more_is_named(tmp_path):
    broker = Broker({"in": [[message("s", float(i)) for i in range(200)]]})
    process = Process(broker, tmp_path, keep=100)
    process.run()
    at = {s: process.store.header(s).generation.provenance.positions[0].next_offset for s in process.store.steps()}
    steps = sorted(at)
    assert len(steps) > 3
    middle = steps[2]
    assert f"revert {middle}`" in way_back(process.store, {("in", 0): at[middle]})
    assert f"revert {middle}`" in way_back(process.store, {("in", 0): at[steps[3]] - 1})
    assert f"revert {steps[-1]}`" in way_back(process.store, {("other", 0): 0})


def test_without_one_it_says_so(tmp_path):
    broker = Broker({"in": [[message("s", float(i)) for i in range(200)]]}, beginning={("in", 0): 50})
    process = Process(broker, tmp_path)
    process.run()
    assert "run --fresh" in way_back(process.store, {("in", 0): 10})
