"""A replay that is killed goes on, and nobody can tell from what it leaves."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from streamlstm.recovery.checkpoint import open_store

CONFIG = """\
source: {type: files}
decode: {series_id: [$.name], timestamp: {path: $.time}, target: $.value}
series: {interval: 10s}
model: {hidden_size: 4, horizons: 3, calendar: []}
training: {k1: 4, k2: 8}
checkpoint: {every: {records: 500}}
"""
ROWS, SERIES, FIRST_S = 2_400, 30, 1_795_075_200


def rows(first: int, last: int, seed: int = 17) -> list[bytes]:
    """Series that swing, some records late, twice, without a value, or not to be read."""
    rng = random.Random(seed)
    lines = []
    for i in range(ROWS):
        series, at = i % SERIES, i // SERIES
        value: float | None = round(math.sin(at / 20 + series) + rng.gauss(0, 0.1), 3)
        odd = rng.random()
        if odd < 0.01:
            value = None
        elif odd < 0.02:
            at -= rng.randrange(3)
        body = json.dumps({"name": f"s{series}", "time": FIRST_S + 10 * at, "value": value}).encode()
        lines.append(b"not JSON" if 0.02 <= odd < 0.03 else body)
    return lines[first:last]


class Lives:
    """``streamlstm replay`` as often as it is started, each life a process of its own, forked from one that loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "c.yaml"
        self.config.write_text(CONFIG)
        self.data = []
        for name, first, last in (("a", 0, ROWS // 3), ("b", ROWS // 3, ROWS)):
            self.data.append(directory / f"{name}.ndjson")
            self.data[-1].write_bytes(b"\n".join(rows(first, last)) + b"\n")
        (directory / "warm").mkdir()
        self.zygote = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self.live("warm", ["--version"])

    def argv(self, run: str, suffix: str, *options: object) -> list[str]:
        here = self.directory / run
        here.mkdir(exist_ok=True)
        sources = [word for path in self.data for word in ("--from", str(path))]
        files = ["--out", str(here / f"f{suffix}"), "--dead-letters", str(here / "dead.jsonl")]
        kept = ["--checkpoint-to", str(here / "kept"), "--json"]
        return ["replay", "-c", str(self.config), *sources, *files, *kept, *map(str, options)]

    def live(
        self,
        run: str,
        argv: list[str],
        after_s: float | None = None,
        number: int = signal.SIGKILL,
        once: Path | None = None,
    ) -> int:
        """One life, which gets a signal after so long, or ``once`` there is a checkpoint; how it ended."""
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        asked = {
            "argv": argv,
            "said": str(self.directory / run / "said"),
            "after_s": after_s,
            "signal": number,
            "once": str(once) if once else None,
        }
        self.zygote.stdin.write(json.dumps(asked) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def errors(self, run: str) -> str:
        return (self.directory / run / "said.err").read_text()

    def left(self, run: str) -> dict[str, Any]:
        """All that a run leaves, but for how long it took."""
        here = self.directory / run
        files = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file() and "said" not in path.name}
        said = json.loads((here / "said").read_text())
        del said["seconds"]
        store = open_store(here / "kept")
        newest = store.load(store.steps()[-1])
        assert newest.beside is not None
        parts = {name: value for name, value in newest.beside.values.items() if name not in ("life", "outputs")}
        return {"files": files, "said": said, "digests": newest.state.digests(), "beside": parts}

    def close(self) -> None:
        self.zygote.kill()
        self.zygote.wait()
        for pipe in (self.zygote.stdin, self.zygote.stdout):
            if pipe:
                pipe.close()


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Generator[Lives, None, None]:
    made = Lives(tmp_path_factory.mktemp("lives"))
    yield made
    made.close()


def calm(lives: Lives, suffix: str) -> tuple[dict[str, Any], float]:
    """What a run leaves that nobody kills, and how long it takes."""
    run = f"calm{suffix}"
    shutil.rmtree(lives.directory / run, ignore_errors=True)
    began_s = time.monotonic()
    assert lives.live(run, lives.argv(run, suffix)) == 0, lives.errors(run)
    return lives.left(run), time.monotonic() - began_s


def be_killed(lives: Lives, run: str, suffix: str, longest_s: float, rng: random.Random) -> int:
    """Live until a life comes to its end before it is killed; how many were killed."""
    for kills in range(1000):
        code = lives.live(run, lives.argv(run, suffix, "--resume"), rng.uniform(0.0, longest_s))
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, lives.errors(run)
        longest_s *= 1.2  # or a machine that became slow would never get anywhere
    raise AssertionError("it never comes to an end")


def campaign(lives: Lives, kills: int, seed: int) -> int:
    rng, done, rounds = random.Random(seed), 0, 0
    expected = {suffix: calm(lives, suffix) for suffix in (".parquet", ".jsonl")}
    while done < kills or rounds < len(expected):
        suffix = (".parquet", ".jsonl")[rounds % 2]
        left, took_s = expected[suffix]
        run = f"killed-{seed}-{rounds}"
        done += be_killed(lives, run, suffix, 0.7 * took_s, rng)
        assert lives.left(run) == left, f"round {rounds} of seed {seed}, {done} kills"
        rounds += 1
    print(f"{done} kills in {rounds} replays, seed {seed}: all that was left is equal")
    return done


def test_a_replay_that_is_killed_again_and_again_leaves_the_same_bytes(lives: Lives) -> None:
    assert campaign(lives, 8, seed=17) >= 8


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_kills_leave_no_trace(lives: Lives) -> None:
    assert campaign(lives, 200, seed=int(os.environ.get("REPLAY_SEED", "18"))) >= 200


def test_a_request_to_stop_leaves_a_checkpoint_and_says_how_to_go_on(lives: Lives) -> None:
    expected, _ = calm(lives, ".jsonl")
    run = "stopped"
    kept = lives.directory / run / "kept"

    assert lives.live(run, lives.argv(run, ".jsonl"), number=signal.SIGTERM, once=kept) == 75, lives.errors(run)
    (line,) = lives.errors(run).splitlines()
    assert re.fullmatch(
        r"streamlstm: error: stopped after [\d,]+ messages; the same command with --resume goes on", line
    )
    assert lives.live(run, lives.argv(run, ".jsonl", "--resume")) == 0, lives.errors(run)
    assert lives.left(run) == expected
