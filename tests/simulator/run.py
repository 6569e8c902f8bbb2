"""
One run: lives that end badly, one after the other, then one that does not, and the oracle over all of them.
"""

import collections
import random
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fakes import PACE

from simulator.bucket import Bucket
from simulator.disk import Kernel
from simulator.life import CONFIG, SETTINGS_NAME, Life, World, forgetful, real, sizes, tiny
from simulator.log import Input, Output
from simulator.oracle import Oracle
from simulator.weather import DISK, SWIFT, Weather
from streamlstm.engine.state import EngineState
from streamlstm.errors import (
    CheckpointError,
    CheckpointNotWritten,
    ConfigError,
    LogGap,
    ProgressError,
    StreamlstmError,
    Superseded,
    Temporary,
    TopicChanged,
    Unavailable,
)
from streamlstm.records.batch import Range
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.progress import Branch, Chain, Gap, Incarnation, decode_record, read_chain
from streamlstm.recovery.provenance import Generation
from streamlstm.recovery.standing import why_not_on
from streamlstm.recovery.stored import SCRATCH
from streamlstm.series.table import Rows
from streamlstm.transport.interfaces import ProgressEntry

Delivery = Literal["exactly_once", "idempotent"]
Twist = Literal["forgetful", "gaps", "branches", "bucket"]
"""What a run has beside the usual: memory for a few series, retention that is too fast, going back, an object store."""

TWISTS: tuple[Twist, ...] = ("forgetful", "gaps", "branches", "bucket")
STORE_TROUBLE = ("store", "hang")
BROKER_TROUBLE = ("away", "init", "refused", "send", "flush", "timed out", "commit", "prepared", "reply")


@dataclass
class Tally:
    """What a campaign saw."""

    runs: int = 0
    lives: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    met: collections.Counter[str] = field(default_factory=collections.Counter)
    deepest: int = 0
    records: int = 0
    replayed_steps: int = 0

    @property
    def killed(self) -> int:
        return sum(self.kills.values())

    def add(self, other: "Tally") -> None:
        self.runs += other.runs
        self.lives += other.lives
        self.kills += other.kills
        self.errors += other.errors
        self.ends += other.ends
        self.met += other.met
        self.deepest = max(self.deepest, other.deepest)
        self.records += other.records
        self.replayed_steps += other.replayed_steps

    def __str__(self) -> str:
        told = [
            f"{self.runs} runs, {self.lives} lives",
            f"{self.killed} kills: {_listed(self.kills)}; up to {self.deepest} starts in a row were cut",
            f"injected: {_listed(self.errors)}",
            f"ends: {_listed(self.ends)}",
            f"{self.records} records, {self.replayed_steps} steps replayed",
            *([f"met: {_listed(self.met)}"] if self.met else []),
        ]
        return "\n".join(told)


def _listed(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


class Simulation:
    """Everything that happens in one run, told by its seed alone."""

    def __init__(
        self, seed: int, directory: Path, delivery: Delivery = "exactly_once", twists: Collection[Twist] = ()
    ) -> None:
        assert delivery == "exactly_once" or "bucket" not in twists, "the journal needs a directory"
        self.seed, self.twists = seed, twists
        self.rng = random.Random(seed)
        self.story: list[str] = []
        self.tally = Tally(runs=1)
        rng = self.rng
        topics = {f"in{i}": rng.randrange(1, 4) for i in range(rng.choice((1, 1, 2)))}
        self.directory = directory
        mind = real() if rng.random() < 0.1 else tiny()
        self.world = World(
            mind=forgetful() if "forgetful" in twists else mind,
            input=Input(topics, keys=12 if "forgetful" in twists else 4),
            output=Output(),
            kernel=Kernel(directory / "disk"),
            pace=replace(
                PACE,
                checkpoint_every_records=rng.choice((8, 15, 40)),
                commit_every_s=rng.choice((0.0, 0.025, 0.1)),
                trim=rng.random() < 0.6,
            ),
            keep=rng.randrange(2, 4),
            delivery=delivery,
            on_gap="skip" if "gaps" in twists else "fail",
            bucket=Bucket() if "bucket" in twists else None,
        )
        self.announced = -1
        self.cut_short = 0
        self.reached: dict[tuple[str, int], int] = {}

    def run(self) -> Tally:
        """Raises ``AssertionError`` on the first thing that is not as promised."""
        rng = self.rng
        self.world.input.grow(rng.randrange(20, 90), rng)
        for _ in range(rng.randrange(1, 7)):
            self.one_life()
            self.between()
        self.world.input.grow(rng.randrange(0, 20), rng)
        engine, life = self.calm()
        self.check(engine)
        if rng.random() < 0.25:
            self.refused()
        self.tally.records = sum(self.world.input.ends().values())
        assert life.publisher.believed == 0
        return self.tally

    def one_life(self) -> None:
        """Until it is killed, gives up, or stops; whatever it does must be one of the ends that are allowed."""
        rng = self.rng
        weather = self.weather()
        self.tell(f"life {self.tally.lives + 1}: {dict(weather.rates) or 'fair'}, killed at {weather.at}")
        life = self.life(weather)
        # Without transactions nobody is fenced, and only a lock that knows one host keeps two apart.
        asleep = rng.random() < 0.12 and self.world.begun and self.world.delivery == "exactly_once"
        if asleep:
            weather.sleep_at = rng.randrange(1, 150)
            weather.while_asleep = self.succeed
        elif "gaps" in self.twists and rng.random() < 0.4:
            weather.sleep_at = rng.randrange(1, 150)
            weather.while_asleep = self.delete
        kernel, announced = self.world.kernel, self.announced
        life.live()
        self.ended(life, superseded=self.world.kernel is not kernel)
        if self.newest_incarnation() in life.made:
            # Nobody took over, or nobody who lived to be the last one to do so.
            self.world.kernel, self.announced = kernel, announced
        if self.world.kernel is kernel:
            self.announced = max(self.announced, life.announced)

    def life(self, weather: Weather) -> Life:
        """A process that begins now."""
        return Life(self.world, weather, sizes(self.rng))

    def weather(self) -> Weather:
        rng = self.rng
        storage = STORE_TROUBLE if self.world.bucket else ("disk",)
        kinds = rng.sample((*BROKER_TROUBLE, *storage), rng.choice((0, 1, 1, 2, 3)))
        rates = {kind: rng.choice((0.01, 0.05, 0.3)) for kind in kinds}
        if self.world.bucket and rng.random() < 0.5:
            rates["store"] = 0.05
        # Starting takes some thirty calls: half of the kills are in there, and those after them hit the next start.
        at = rng.choice((None, rng.randrange(40), rng.randrange(40), rng.randrange(400), rng.randrange(400)))
        numbers = tuple(rng.sample(DISK, rng.randrange(1, len(DISK) + 1)))
        return self.fresh(at=at, rates=rates, numbers=numbers, pace=rng.choice((0, 1, 3, 30)))

    def fresh(self, **facts: object) -> Weather:
        return Weather(rng=self.rng, story=self.story, **facts)  # type: ignore[arg-type]  # because they are mixed

    def succeed(self) -> None:
        """
        Another host takes over while this one is asleep, with a copy of its directory; from now on that one counts.
        """
        other = Kernel(self.directory / f"host-{self.tally.lives}")
        if not self.world.bucket:
            shutil.copytree(self.world.directory, other.root / "state", ignore=shutil.ignore_patterns(SCRATCH))
            other.adopt()
        self.world.kernel = other
        weather = self.weather()
        self.tell(f"a successor: {dict(weather.rates) or 'fair'}, killed at {weather.at}")
        life = self.life(weather)
        life.live()
        self.ended(life, superseded=False)
        self.announced = life.announced
        self.world.input.grow(self.rng.randrange(10), self.rng)

    def ended(self, life: Life, *, superseded: bool) -> None:
        tally, weather = self.tally, life.weather
        tally.lives += 1
        tally.errors.update(weather.errors)
        assert life.publisher.believed == 0, "a commit was asked for although a send had failed"
        assert self.world.kernel.broken == []
        self.world.chain()  # seen before the next one trims it
        if life.ready is not None:
            tally.replayed_steps += life.ready.replayed_steps
        tally.met["linked files"] += life.disk.linked
        if life.end == "killed":
            tally.kills[f"{life.doing}, on the disk" if " state" in weather.died else life.doing] += 1
        tally.ends[life.end if isinstance(life.end, str) else f"{type(life.end).__name__}"] += 1
        self.cut_short = self.cut_short + 1 if life.end == "killed" and life.doing == "starting" else 0
        tally.deepest = max(tally.deepest, self.cut_short)
        if isinstance(life.end, StreamlstmError):
            allowed = self.allowed(weather, superseded=superseded)
            assert type(life.end) in allowed or isinstance(life.end, allowed), f"it may not end with {life.end!r}"
            assert "\n" not in str(life.end)

    def allowed(self, weather: Weather, *, superseded: bool) -> tuple[type[StreamlstmError], ...]:
        errors: list[type[StreamlstmError]] = []
        if "disk" in weather.errors:
            errors += [CheckpointNotWritten, ConfigError]
        if weather.pace < SWIFT:
            errors += [CheckpointNotWritten]  # it was not written in the time it took to consume too much
        if set(weather.errors) & set(BROKER_TROUBLE):
            errors += [Temporary, Unavailable]
        if set(weather.errors) & set(STORE_TROUBLE):
            errors += [CheckpointNotWritten, Temporary]
        if "gaps" in self.twists:
            errors += [Temporary]  # retention overtook a replay
        if superseded:
            errors += [Superseded, Temporary]
            # The other wrote what this one was to write or put aside; or began while this one had no generation yet.
            errors += [CheckpointNotWritten if self.world.bucket else ProgressError]
        return tuple(errors)

    def between(self) -> None:
        """Time passes: the power fails, the input grows, is compacted, and is deleted where nobody needs it."""
        rng, world = self.rng, self.world
        if world.bucket:
            world.bucket.settle(rng)
        if rng.random() < 0.3:
            self.tell("power cut")
            if not world.bucket:
                world.kernel.power_cut(rng)
            store = world.store()
            newer = [step for step in store.steps() if step > self.announced and _whole(store, step)]
            if self.announced >= 0 and len(newer) < world.keep:  # else a process pruned it before it said a newer one
                store.verify(self.announced)
        if rng.random() < 0.15:
            self.damage()
        world.input.grow(rng.choice((0, 0, 10, 30)), rng)
        consumed = self.consumed(self.chain())
        if rng.random() < 0.2 and world.output.current is None:
            world.input.compact(consumed, rng)
        if rng.random() < 0.3:
            self.retain()
        if "gaps" in self.twists and rng.random() < 0.4:
            self.delete()
        if "branches" in self.twists and rng.random() < 0.4:
            self.go_back()

    def delete(self) -> None:
        """Retention deletes, needed or not."""
        self.world.input.delete(self.rng)
        self.tell(f"retention: the log begins at {self.world.input.beginning}")

    def go_back(self) -> None:
        """The operator has the chain go on from an older generation, without some ranges; that may be cut too."""
        rng, world = self.rng, self.world
        store = world.store()
        retained = [entry for entry in world.chain() if entry.offset >= world.begins()]
        chain = read_chain(retained, SETTINGS_NAME)
        there = [made for step in store.steps() if _whole(store, step) and _stands(made := store.verify(step), chain)]
        if not there:
            return
        made = rng.choice(there)
        exclude = []
        for p in rng.sample(made.provenance.positions, rng.randrange(len(made.provenance.positions) + 1)):
            start = p.next_offset + rng.randrange(20)
            exclude.append(Range(p.topic, p.partition, start, start + rng.randrange(1, 15)))
        weather = self.weather()
        weather.at = rng.choice((None, rng.randrange(12)))
        self.tell(f"going back to {made.step} without {exclude}, killed at {weather.at}")
        life = self.life(weather)
        life.go_back(made.step, exclude)
        self.ended(life, superseded=False)
        self.announced = min(self.announced, made.step)

    def damage(self) -> None:
        """A bit of the newest generation turns, or its end is gone. Only when an older one is whole."""
        store = self.world.store()
        good = [step for step in store.steps() if _whole(store, step)]
        if len(good) < 2 or self.broken_chain(good[-2]):
            return
        files = self.world.files(good[-1])
        name = self.rng.choice(sorted(files))
        data = bytearray(files[name])
        at = self.rng.randrange(len(data))
        if self.rng.random() < 0.5:
            data[at] ^= 1 << self.rng.randrange(8)
            how = f"bit of byte {at} turned"
        else:
            del data[at:]
            how = f"cut at {at}"
        self.world.change(name, bytes(data))
        assert not _whole(store, good[-1])
        left = [step for step in good if _whole(store, step)]
        if not left or self.broken_chain(left[-1]):
            self.world.change(name, files[name])  # a file that all of them share
            return
        self.tell(f"rot: {name.rpartition('/state/')[2]}: {how}")
        self.tally.errors["rot"] += 1
        self.announced = min(self.announced, left[-1])

    def broken_chain(self, step: int) -> bool:
        """Whether the chain no longer reaches back to this generation: then it is no fallback."""
        link = self.world.store().verify(step).provenance.progress
        return self.world.begins() > (link.offset if link else 0)

    def retain(self) -> None:
        """Retention deletes what no generation needs."""
        world, store = self.world, self.world.store()
        needed: dict[tuple[str, int], int] = {}
        for step in store.steps():
            if _whole(store, step):
                for p in store.verify(step).provenance.positions:
                    place = (p.topic, p.partition)
                    needed[place] = min(p.next_offset, needed.get(place, p.next_offset))
        first = world.input.first
        world.input.beginning |= {place: max(at, first(*place)) for place, at in needed.items()}

    def calm(self) -> tuple[object, Life]:
        """A life without trouble, to the end of the input."""
        self.tell("a calm life")
        life = self.life(self.fresh(pace=SWIFT))
        engine = life.live()
        self.ended(life, superseded=False)
        assert life.end == "stopped", f"a calm life ended with {life.end!r}"
        return engine, life

    def chain(self) -> Chain:
        """Of all that was ever committed, trimmed or not. Reading it checks that steps are contiguous."""
        return read_chain(self.world.chain(), SETTINGS_NAME)

    def newest_incarnation(self) -> str:
        """The id of whoever took over last, as far as it is decided, seen or not."""
        stored = self.world.output.topics.get(CONFIG.progress_topic, ())
        records = [
            decode_record(ProgressEntry(s.offset, s.value))
            for s in stored
            if s.made_in.state in {"prepared", "committed"}
        ]
        return next((record.id for record in reversed(records) if isinstance(record, Incarnation)), "")

    def consumed(self, chain: Chain) -> dict[tuple[str, int], int]:
        """Up to where anybody ever read, and be it before the chain went back."""
        for place in self.world.input.ends():
            self.reached[place] = max(self.reached.get(place, 0), chain.positions.get(place, 0))
        return self.reached

    def check(self, engine: object) -> None:
        """The oracle's word against what is there."""
        world = self.world
        assert self.chain().positions == world.input.ends()
        oracle = Oracle(world)
        for entry in world.chain():
            record = decode_record(entry)
            oracle.follow(record)
            if isinstance(record, Gap | Branch):
                self.tally.met[type(record).__name__.lower()] += 1
        there = {
            (topic, partition, offset)
            for topic, logs in world.input.inputs.items()
            for partition, log in enumerate(logs)
            for offset, value in enumerate(log)
            if value is not None and offset >= oracle.begins[topic, partition]
        }
        learnt = oracle.learnt()
        assert sorted(learnt) == sorted(there - oracle.excluded - oracle.passed_over), "every input exactly once"
        assert all(at < world.input.first(topic, partition) for topic, partition, at in oracle.passed_over)
        forecasts = world.output.values(CONFIG.forecast_topic)
        for published, expected in (
            (forecasts, oracle.forecasts),
            (world.output.values(CONFIG.dead_letter_topic), oracle.dead_letters),
        ):
            if world.delivery == "exactly_once":
                assert published == expected
            else:
                # Each at least once, and a copy is no different, where the input is still what it was.
                assert set(published) <= set(expected) | oracle.perhaps
                assert collections.Counter(published) >= collections.Counter(expected) - oracle.excused
        oracle.reader(forecasts)
        state = engine.state()  # type: ignore[attr-defined]  # because a life stopped has one
        assert state.digests() == oracle.digests
        self.tally.met["series that left"] += sum(len(rows) for rows in stored_rows(state))
        store = world.store()
        assert store.load(store.steps()[-1]).state.digests() == oracle.digests
        assert len(list(world.directory.glob(f"{SCRATCH}/*.sqlite"))) <= 1, "what killed processes left is gone"
        if world.bucket:
            self.tally.met["late arrivals"] += world.bucket.arrived

    def refused(self) -> None:
        """What cannot be mended is refused, again and again, and nothing is published."""
        rng, world = self.rng, self.world
        before = world.output.values(CONFIG.progress_topic)
        place = rng.choice(sorted(place for place, end in world.input.ends().items() if end))
        topic, partition = place
        kinds = ["retention", "cut back", "made anew", "partitions", "all bad", "no progress"]
        if world.on_gap == "skip":
            kinds.remove("retention")
        if world.delivery == "exactly_once":
            kinds.append("no checkpoint")  # the journal would be gone too, and all would begin anew
        kind = rng.choice(kinds)
        self.tell(f"never again: {kind} of {place}")
        expected: type[StreamlstmError]
        if kind == "retention":
            world.input.inputs[topic][partition] += [b"broken"] * 3
            world.input.beginning[place] = world.input.ends()[place] - 1
            expected = LogGap
        elif kind == "cut back":
            del world.input.inputs[topic][partition][-1:]
            expected = LogGap
        elif kind == "made anew":
            world.input.topic_ids[topic] = "another"
            expected = TopicChanged
        elif kind == "partitions":
            world.input.inputs[topic].append([])
            expected = TopicChanged
        elif kind == "no checkpoint":
            world.lose_checkpoints()
            expected = ProgressError
        elif kind == "all bad":
            for step in world.store().steps():
                for name in world.files(step):
                    if name.endswith("optim.pt"):
                        world.change(name, b"")
            expected = CheckpointError
        else:
            world.lose_chain()
            expected = ProgressError
        published = world.output.values(CONFIG.forecast_topic)
        for _ in range(2):
            life = self.life(self.fresh(pace=SWIFT))
            life.live()
            self.tally.lives += 1
            assert isinstance(life.end, expected), f"{kind}: {life.end!r}"
            assert life.end.exit_code == 65
            self.tally.ends[type(life.end).__name__] += 1
        assert world.output.values(CONFIG.forecast_topic) == published
        if kind != "cut back":
            assert world.output.values(CONFIG.progress_topic) == before

    def tell(self, event: str) -> None:
        self.story.append(event)


def _whole(store: CheckpointStore, step: int) -> bool:
    try:
        store.verify(step)
    except (CheckpointError, OSError):
        return False
    return True


def _stands(generation: Generation, chain: Chain) -> bool:
    """Whether the chain can go on from it."""
    try:
        return chain.tip is not None and why_not_on(chain, generation) is None
    except ProgressError:
        return False


def stored_rows(state: EngineState) -> Iterator[Rows]:
    for place in state.stored.places() if state.stored else ():
        yield from state.stored.rows(*place)


def simulate(seed: int, directory: Path, delivery: Delivery = "exactly_once", twists: Collection[Twist] = ()) -> Tally:
    """One run. On failure the story so far is part of the message."""
    simulation = Simulation(seed, directory, delivery, twists)
    try:
        return simulation.run()
    except BaseException as error:
        story = "\n".join(simulation.story)
        error.add_note(f"simulated with seed {seed}:\n{story}")
        raise
