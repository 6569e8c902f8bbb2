"""``python -m simulator --seed N`` repeats one run and tells its story; ``--runs`` or ``--kills`` is a campaign."""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from simulator.run import TWISTS, Delivery, Simulation, Tally, Twist, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the run, or of the first one")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0, help="go on until so many processes were killed")
    parser.add_argument("--delivery", choices=("exactly_once", "idempotent"), default="exactly_once")
    parser.add_argument("--twist", choices=TWISTS, action="append", default=[], help="may be given several times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=scratch()) as scratch_dir:
        if options.runs == 1 and not options.kills:
            simulation = Simulation(options.seed, Path(scratch_dir), options.delivery, options.twist)
            try:
                print(simulation.run())
            finally:
                print("\n".join(simulation.story))
            return 0
        seed, total = campaign(
            options.seed, options.runs, options.kills, Path(scratch_dir), options.delivery, options.twist
        )
    print(f"seeds {options.seed} to {seed - 1}: 0 mismatches, 0 lost, 0 duplicated, 0 commits with a failed send")
    print(total)
    return 0


def scratch() -> str | None:
    """Memory, if there is a file system of it: nothing here needs a real disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def campaign(
    first: int,
    runs: int,
    kills: int,
    directory: Path,
    delivery: Delivery = "exactly_once",
    twists: Collection[Twist] = (),
) -> tuple[int, Tally]:
    """Runs from seed ``first`` on; the seed after the last one, and what was seen."""
    total, seed, began = Tally(), first, time.monotonic()
    while total.runs < runs or total.killed < kills:
        work = directory / str(seed)
        work.mkdir()
        total.add(simulate(seed, work, delivery, twists))
        shutil.rmtree(work)
        seed += 1
        if total.runs % 500 == 0:
            print(f"{total.runs} runs, {total.killed} kills, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return seed, total


if __name__ == "__main__":
    sys.exit(main())
