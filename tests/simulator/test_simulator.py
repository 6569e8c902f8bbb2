"""Exactly once, whatever happens: seeded campaigns, and every disk operation ended in every way."""

import collections
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from simulator.__main__ import campaign, scratch
from simulator.enumeration import ENDS, Enumeration
from simulator.run import TWISTS, Simulation

RUNS = 160
KILLS = 200
TWISTED = [
    ("forgetful", 12, {"linked files", "series that left"}),
    ("gaps", 30, {"gap"}),
    ("branches", 30, {"branch"}),
    ("bucket", 40, {"store", "hang", "torn", "late arrivals"}),
]
"""Which, in how many runs here, and what must be met in them."""


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


@pytest.mark.parametrize(("twist", "runs", "wanted"), TWISTED, ids=TWISTS)
def test_each_twist_costs_nothing_either(memory, twist, runs, wanted):
    after, total = campaign(0, runs, 0, memory, twists=[twist])

    print(f"seeds 0 to {after - 1}, {twist}\n{total}")
    assert total.killed >= runs
    assert {**total.met, **total.errors}.keys() >= wanted


def test_without_transactions_going_back_costs_nothing_either(memory):
    after, total = campaign(0, 30, 30, memory, "idempotent", ["gaps", "branches"])

    print(f"seeds 0 to {after - 1}, idempotent, gaps and branches\n{total}")
    assert {"gap", "branch"} <= total.met.keys()


@pytest.mark.parametrize("twists", [(), TWISTS])
def test_a_seed_tells_the_same_story_twice(memory, twists):
    stories = []
    for name in ("a", "b"):
        (memory / name).mkdir()
        simulation = Simulation(4, memory / name, twists=twists)
        simulation.run()
        stories.append([line.replace(str(memory / name), "") for line in simulation.story])

    assert stories[0] == stories[1]
    assert any("killed" in line for line in stories[0])


def small(memory: Path, name: object, *, leaving: bool = False) -> Enumeration:
    directory = memory / str(name)
    directory.mkdir()
    return Enumeration(directory, leaving=leaving)


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


def test_every_link_to_a_file_of_an_older_checkpoint_may_fail_or_be_the_last(memory):
    """And what stands right behind the last of them: the manifest, and the sync of the directory they are in."""
    kinds = small(memory, "calm", leaving=True).a_life(0, 0).done
    links = [nth for nth, kind in enumerate(kinds, 1) if kind == "link"]
    behind = [nth for nth in range(links[-1] + 1, links[-1] + 6) if nth <= len(kinds)]
    for nth in (*links, *behind):
        for end, number in ENDS.items():
            run = small(memory, f"{nth}-{end}", leaving=True)
            run.a_life(nth, number)
            run.power_cut(nth)
            run.recover()
            shutil.rmtree(run.directory)

    print(f"{len(links)} links x {', '.join(ENDS)}")
    assert len(links) >= 2


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
@pytest.mark.parametrize(
    ("delivery", "twists"),
    [
        ("exactly_once", ()),
        ("idempotent", ()),
        *(("exactly_once", (twist,)) for twist in TWISTS),
        ("exactly_once", TWISTS),
        ("idempotent", ("forgetful", "gaps", "branches")),
    ],
)
def test_thousands_of_kills_cost_nothing(memory, delivery, twists):
    kills = 2_000 if "forgetful" in twists else 10_000  # its engine is the real one, and slower by as much
    after, total = campaign(1_000_000, 0, kills, memory, delivery, twists)

    print(f"seeds 1000000 to {after - 1}: 0 mismatches, 0 lost, 0 duplicated, 0 commits with a failed send\n{total}")
    assert total.killed >= kills
    assert total.deepest >= 3
