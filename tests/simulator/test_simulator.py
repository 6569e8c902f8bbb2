"""Exactly once, whatever happens: seeded campaigns, and every disk operation ended in every way."""

import collections
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from simulator.__main__ import campaign, scratch
from simulator.enumeration import ENDS, Enumeration
from simulator.run import Simulation

RUNS = 160
KILLS = 200


@pytest.fixture
def memory(tmp_path: Path) -> Generator[Path, None, None]:
    """A directory in memory if there is such a thing: none of these tests needs a real disk."""
    with tempfile.TemporaryDirectory(dir=scratch() or tmp_path) as directory:
        yield Path(directory)


def test_hundreds_of_kills_cost_nothing(memory):
    after, total = campaign(0, RUNS, KILLS, memory)

    print(f"seeds 0 to {after - 1}\n{total}")
    assert total.killed >= KILLS
    assert total.deepest >= 3, "a start cut, the next start cut, and the one after that"
    assert set(total.errors) >= {"disk", "away", "send", "commit", "reply", "prepared", "timed out", "init", "rot"}
    assert total.ends["Superseded"] > 0


def test_without_transactions_each_is_there_and_a_copy_is_no_different(memory):
    after, total = campaign(0, 60, 80, memory, "idempotent")

    print(f"seeds 0 to {after - 1}, idempotent\n{total}")
    assert set(total.errors) >= {"disk", "send", "reply", "refused", "init", "rot"}


def test_a_seed_tells_the_same_story_twice(memory):
    stories = []
    for name in ("a", "b"):
        (memory / name).mkdir()
        simulation = Simulation(4, memory / name)
        simulation.run()
        stories.append([line.replace(str(memory / name), "") for line in simulation.story])

    assert stories[0] == stories[1]
    assert any("killed" in line for line in stories[0])


def small(memory: Path, name: object) -> Enumeration:
    directory = memory / str(name)
    directory.mkdir()
    return Enumeration(directory)


def test_every_operation_on_the_disk_may_fail_or_be_the_last(memory):
    kinds = small(memory, "calm").a_life(0, 0).done
    ended = collections.Counter()
    for nth, kind in enumerate(kinds, 1):
        for end, number in ENDS.items():
            run = small(memory, f"{nth}-{end}")
            run.a_life(nth, number)
            if nth % 2:
                run.power_cut(nth)
            run.recover()
            shutil.rmtree(run.directory)
            ended[kind] += 1

    print(f"{len(kinds)} operations x {', '.join(ENDS)}: {dict(ended)}")
    assert set(ended) == {"mkdir", "create", "write", "fsync", "rename", "unlink"}
    assert len(kinds) > 60, "several checkpoints"


def test_a_recovery_that_is_cut_and_its_own_recovery_are_no_different(memory):
    kinds = small(memory, "calm").a_life(0, 0).done
    cut = 0
    for nth in range(3, len(kinds), 7):
        for second in (1, 2, 3, 5, 8, 13, 21):
            run = small(memory, f"{nth}-{second}")
            run.a_life(nth, 0)
            again = run.a_life(second, 0)
            run.a_life(second // 2 + 1, 0)
            run.power_cut(nth + second)
            run.recover()
            cut += bool(again.died)
            shutil.rmtree(run.directory)

    assert cut > 50


def test_what_a_start_finds_is_safe_before_it_builds_on_it(memory):
    """Killed while it makes generation 0; started, and killed while it publishes; and then the power fails."""
    built = 0
    for nth in range(1, 26):
        for seed in range(4):
            run = small(memory, f"{nth}-{seed}")
            run.a_life(nth, 0)
            built += run.a_life(0, 0, at=30).calls > 30
            run.power_cut(seed)
            run.recover()
            shutil.rmtree(run.directory)

    assert built == 100


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("delivery", ["exactly_once", "idempotent"])
def test_ten_thousand_kills_cost_nothing(memory, delivery):
    after, total = campaign(1_000_000, 0, 10_000, memory, delivery)

    print(f"seeds 1000000 to {after - 1}: 0 mismatches, 0 lost, 0 duplicated, 0 commits with a failed send\n{total}")
    assert total.killed >= 10_000
    assert total.deepest >= 3
