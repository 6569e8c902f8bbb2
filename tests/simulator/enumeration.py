"""
Every operation on the disk in a life with several checkpoints, each ended in every way: no chance in it.
"""

import errno
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from fakes import PACE

from simulator.disk import Kernel
from simulator.life import Life, World, forgetful, tiny
from simulator.log import Input, Output
from simulator.run import Simulation
from simulator.weather import SWIFT, Weather
from streamlstm.errors import CheckpointNotWritten, ConfigError, StreamlstmError

ENDS = {"kill": 0, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}
RECORDS = 40


@dataclass
class Nth(Weather):
    """The ``nth`` operation on the disk ends with the error ``number``, 0 for a kill."""

    nth: int = 0
    number: int = 0
    done: list[str] = field(default_factory=list)

    def disk(self, operation: str, what: str) -> int:
        self.done.append(operation)
        if len(self.done) != self.nth:
            return 0
        self.errors["disk"] = 1
        if not self.number:
            self.die(what)
        self.tell(f"{what}: {errno.errorcode[self.number]}")
        return self.number


class Enumeration(Simulation):
    """One small log, and lives whose only trouble is one operation each; ``leaving``: with series beyond memory."""

    def __init__(self, directory: Path, *, leaving: bool = False) -> None:
        super().__init__(0, directory)
        self.world = World(
            forgetful() if leaving else tiny(),
            Input({"in": 1}, keys=12 if leaving else 4),
            Output(),
            Kernel(directory / "small"),
            replace(PACE, checkpoint_every_records=12, commit_every_s=0.025),
        )
        self.world.input.grow(RECORDS, random.Random(17))

    def life(self, weather: Weather) -> Life:
        return Life(self.world, weather, (7, 5))

    def a_life(self, nth: int, number: int, at: int | None = None) -> Nth:
        """What became of it is in its weather."""
        weather = Nth(rng=random.Random(17), story=self.story, pace=SWIFT, at=at, nth=nth, number=number)
        life = self.life(weather)
        life.live()
        self.ended(life, superseded=False)
        self.announced = max(self.announced, life.announced)
        return weather

    def power_cut(self, seed: int) -> None:
        """What was announced must be there afterwards."""
        self.tell("power cut")
        self.world.kernel.power_cut(random.Random(seed))
        if self.announced >= 0:
            self.world.store().verify(self.announced)

    def allowed(self, weather: Weather, *, superseded: bool) -> tuple[type[StreamlstmError], ...]:
        return (CheckpointNotWritten, ConfigError) if weather.errors else ()

    def recover(self) -> None:
        """A life without trouble, and the oracle."""
        engine, _ = self.calm()
        self.check(engine)
