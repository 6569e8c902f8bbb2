"""
A replay that ends at any file operation, or loses what was not synced in a power cut, and goes on: three deep.

Everything is real but the process, the disk's word and the thread that writes generations.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from fakes import Crash, Fate, FatedDisk, fingerprint

from streamlstm.cli import replay_inputs
from streamlstm.cli.asked import Asked
from streamlstm.cli.engines import engine_maker
from streamlstm.cli.replaying import Machine, replay_history
from streamlstm.config.model import Config
from streamlstm.recovery.checkpoint import open_store
from streamlstm.transport.forecasts import ForecastWriter

ROWS, STEP = 300, 40
LAST = 6  # operations in which the outputs become whole: each is always tried
FIRST_S = 1_795_075_200


class Cut(FatedDisk):
    """
    A disk that dies with the process, and keeps of what was not synced what it likes: half of it, garbage, or nothing.
    Of names it keeps the old ones.

    Only of the outputs: what generations are worth after a power cut is another test's question.
    """

    def __init__(self, fate: Fate) -> None:
        super().__init__(fate)
        self.synced: dict[Path, int] = {}
        self.named: set[Path] = set()
        self.open: dict[int, Path] = {}
        self.renamed: list[tuple[Path, Path]] = []

    def extend(self, path: Path, length: int) -> BinaryIO:
        there = path.exists()
        file = super().extend(path, length)
        self.open[file.fileno()] = path
        self.synced[path] = length
        if there:
            self.named.add(path)
        return file

    def sync(self, file: BinaryIO) -> None:
        super().sync(file)
        if path := self.open.get(file.fileno()):
            self.synced[path] = path.stat().st_size

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.named |= {extended for extended in self.synced if extended.parent == path}
        self.renamed = [(old, new) for old, new in self.renamed if new.parent != path]

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        if old in self.synced:
            self.synced[new] = self.synced.pop(old)
            self.renamed.append((old, new))

    def lose(self, rng: random.Random) -> None:
        """The power is gone."""
        for old, new in self.renamed:
            new.rename(old)
        for path, length in self.synced.items():
            if path not in self.named and path.exists() and rng.random() < 0.5:
                path.unlink()
            elif path.exists():
                data = path.read_bytes()
                torn = bytearray(data[: rng.randrange(length, len(data) + 1)])
                for at in range(length, len(torn)):
                    torn[at] = torn[at] if rng.random() < 0.5 else 0
                path.write_bytes(torn)


class World:
    """A configuration, two files, and as many replays of them as are wanted."""

    def __init__(self, directory: Path, suffix: str) -> None:
        self.directory, self.suffix = directory, suffix
        self.config = Config.model_validate({
            "source": {"type": "files"},
            "decode": {"series_id": ["$.name"], "timestamp": {"path": "$.time"}, "target": "$.value"},
            "series": {"interval": "10s"},
            "model": {"hidden_size": 2, "horizons": 2, "calendar": [], "season": "none"},
            "training": {"k1": 4, "k2": 6},
            "checkpoint": {"every": {"records": 2 * STEP - 10, "time": "1d"}, "keep": {"last": 2}},
        })  # fmt: skip
        lines = [
            json.dumps(
                {"name": f"s{i % 5}", "time": FIRST_S + 10 * (i // 5), "value": math.sin(i / 9) + i % 5}
            ).encode()
            for i in range(ROWS)
        ]
        lines[7] = lines[ROWS // 2] = b"no JSON"
        self.files = [directory / "a.ndjson", directory / "b.ndjson"]
        self.files[0].write_bytes(b"\n".join(lines[:70]) + b"\n")
        self.files[1].write_bytes(b"\n".join(lines[70:]) + b"\n")

    def live(self, run: str, disk: FatedDisk, **options: Any) -> dict[str, Any]:
        """One life, to its end or its fate; what it says."""
        here = self.directory / run
        here.mkdir(exist_ok=True)
        asked = Asked(
            tuple(map(str, self.files)), None, None, None, 0, 30, recorded=False,
            out=here / f"f{self.suffix}", dead_letters=here / "dead.jsonl", strict=False,
            checkpoint_to=here / "kept", resume=True,
        )._replace(**options)  # fmt: skip
        machine = Machine(engine_maker(self.config, "cpu"), fingerprint(), disk, start=lambda work: work())
        (said,) = replay_history(self.config, asked, as_json=True, machine=machine)
        return {name: value for name, value in json.loads(said).items() if name != "seconds"}

    def left(self, run: str, said: dict[str, Any]) -> dict[str, Any]:
        """All that a run leaves."""
        here = self.directory / run
        store = open_store(here / "kept")
        files = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
        return {"files": files, "said": said, "digests": store.load(store.steps()[-1]).state.digests()}


@pytest.fixture(params=[".parquet", ".jsonl"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(replay_inputs, "_MESSAGES_A_STEP", STEP)
    monkeypatch.setitem(ForecastWriter.__init__.__kwdefaults__, "rows_at_once", 2 * STEP)
    torch.set_num_threads(1)
    return World(tmp_path, request.param)


def explore(world: World, every: int, make: Callable[[Fate], FatedDisk], seed: int) -> tuple[int, int]:
    """Kill at every so many operations of an undisturbed replay; how many it has, and the lives it took."""
    rng = random.Random(seed)
    fate = Fate()
    expected = world.left("calm", world.live("calm", FatedDisk(fate)))
    assert len(expected["files"]) == 2
    lives = 0
    for at in sorted({*range(rng.randrange(every), fate.calls, every), *range(fate.calls - LAST, fate.calls)}):
        run = f"killed-{at}"
        for depth in range(4):
            # The first kill goes through all operations, the others hit what follows, recovery included.
            ends = at if depth == 0 else rng.randrange(120) if depth < 3 else None
            disk = make(Fate(ends))
            lives += 1
            try:
                said = world.live(run, disk)
            except Crash:
                if isinstance(disk, Cut):
                    disk.lose(rng)
                continue
            break
        else:
            raise AssertionError("the last life was to be left alone")
        assert world.left(run, said) == expected, f"killed at operation {at}, seed {seed}"
        shutil.rmtree(world.directory / run)
    return fate.calls, lives


@pytest.mark.parametrize("make", [FatedDisk, Cut])
def test_wherever_a_replay_is_killed_it_ends_in_the_same_bytes(world: World, make: Callable[[Fate], FatedDisk]) -> None:
    operations, lives = explore(world, every=29, make=make, seed=17)
    assert operations > 150
    assert lives > operations / 29


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("make", [FatedDisk, Cut])
def test_whichever_operation_a_replay_is_killed_at_it_ends_in_the_same_bytes(
    world: World, make: Callable[[Fate], FatedDisk]
) -> None:
    for seed in range(2):
        operations, lives = explore(world, every=1, make=make, seed=seed)
        print(f"{make.__name__}, {world.suffix}, seed {seed}: {operations} operations, {lives} lives, all equal")
