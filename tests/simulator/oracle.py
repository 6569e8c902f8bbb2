"""
What must have come of it: the records of the chain, followed by an engine that nobody interrupts.

Branches and gaps are followed as they are meant and not as the product does it: what counts is a list of cuts, and the
offsets that nobody learns from are taken out of the log.
"""

import collections
from collections.abc import Iterable

from fakes import SETTINGS, Broker

from simulator.life import Coordinates, World
from simulator.log import SimulatedSource
from simulator.weather import Weather
from streamlstm.engine.state import EngineState
from streamlstm.records.batch import Cut, Messages, Range
from streamlstm.recovery.progress import Branch, Gap, Incarnation, Record, Steps
from streamlstm.service.daemon import encode_outputs


class Oracle:
    """
    The log is read from ``begins`` on, and ``cuts`` are the steps that count.

    ``passed_over`` are offsets that retention took, ``excluded`` those that the operator did. ``forecasts`` and
    ``dead_letters`` were to be published, in this order. Without transactions those of the newest record may be missing
    (``excused``) where the chain went back before it, or where input was gone when they were computed again: what that
    gave is ``perhaps`` there.
    """

    def __init__(self, world: World) -> None:
        self._world, self._maker = world, world.mind.maker(None)
        self.begins: dict[tuple[str, int], int] = {}
        self.cuts: list[Cut] = []
        self.excluded: set[Coordinates] = set()
        self.passed_over: set[Coordinates] = set()
        self.forecasts: list[bytes] = []
        self.dead_letters: list[bytes] = []
        self.perhaps: set[bytes] = set()
        self.excused: collections.Counter[bytes] = collections.Counter()
        self._newest: dict[Coordinates, bytes] = {}
        self._made: list[list[bytes]] = []
        self._revision = self._first = 0
        self._begin()

    def _begin(self) -> None:
        self._engine = self._maker.create(SETTINGS.learning)
        without = self.excluded | self.passed_over
        log = {
            topic: [
                [None if (topic, p, at) in without else value for at, value in enumerate(values)]
                for p, values in enumerate(logs)
            ]
            for topic, logs in self._world.input.inputs.items()
        }
        self._log = SimulatedSource(Broker(log), Weather(), clock=None)  # type: ignore[arg-type]  # because nobody polls

    def follow(self, record: Record) -> None:
        """The next record of the chain."""
        match record:
            case Incarnation():
                if record.origin:
                    self.begins = {(topic, partition): at for topic, partition, at in record.origin.positions}
            case Steps():
                encoder, self._first = self._world.mind.encoder(self._revision), record.first
                for step in record.steps:
                    cut = tuple(Range(record.topics[topic], *ranged) for topic, *ranged in step.ranges)
                    messages = self._messages(cut)
                    report = self._engine.step(self._world.mind.decode(messages))
                    self.cuts.append(cut)
                    assert report.digest().hex() == step.digest, f"the outputs of step {len(self.cuts)}"
                    assert sum(report.counts().values()) == len(messages)
                    forecasts, dead_letters = (
                        [m.value or b"" for m in out] for out in encode_outputs(encoder, report, messages)
                    )
                    self.forecasts += forecasts
                    self.dead_letters += dead_letters
                    self._newest |= {self._world.mind.read(value)[0]: value for value in forecasts}
                    self._made.append([*forecasts, *dead_letters])
            case Branch():
                self._excuse(record.after)
                del self.cuts[record.after :], self._made[record.after :]
                self.excluded = coordinates(record.excluded)
                self._revision = record.revision
                self._again(0)
            case Gap():
                self._excuse(record.checkpoint)
                self.passed_over |= coordinates(record.ranges)
                self._again(record.checkpoint)

    def _excuse(self, kept: int) -> None:
        if self._world.delivery == "exactly_once":
            return
        for made in self._made[max(kept, self._first - 1) :]:
            self.excused.update(made)

    def _again(self, kept: int) -> None:
        """All that counts, computed again; what steps beyond ``kept`` gave is not what they gave before."""
        self._begin()
        encoder = self._world.mind.encoder(self._revision)
        for number, cut in enumerate(self.cuts, 1):
            messages = self._messages(cut)
            report = self._engine.step(self._world.mind.decode(messages))
            if number > kept:
                self.perhaps |= {m.value or b"" for out in encode_outputs(encoder, report, messages) for m in out}

    def _messages(self, cut: Cut) -> Messages:
        return self._log._messages(cut)

    @property
    def digests(self) -> dict[str, str]:
        state: EngineState = self._engine.state()
        return state.digests()

    def learnt(self) -> list[Coordinates]:
        """Every input that counts."""
        return [
            (*messages.cut[r][:2], at)
            for messages in map(self._messages, self.cuts)
            for r, at in zip(messages.range_index.tolist(), messages.offset.tolist(), strict=True)
        ]

    def reader(self, values: Iterable[bytes]) -> None:
        """A reader who takes the highest revision of each sees what counts."""
        newest: dict[Coordinates, tuple[int, set[bytes]]] = {}
        for value in values:
            at, revision = self._world.mind.read(value)
            known, _ = newest.get(at, (-1, set()))
            if revision > known:
                newest[at] = revision, {value}
            elif revision == known:
                newest[at][1].add(value)
        for at in self.learnt():
            if (value := self._newest.get(at)) is not None and value not in self.excused:
                _, seen = newest[at]
                assert value in seen, f"the newest forecast of {at}"
                assert seen <= {value, *self.perhaps}


def coordinates(ranges: Iterable[Range]) -> set[Coordinates]:
    return {(r.topic, r.partition, at) for r in ranges for at in range(r.start, r.end)}
