"""
The broker: input topics that transactions, aborts, compaction and retention go over, and the output topics behind a
transaction coordinator that can lose a reply after it has committed.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fakes import Broker, Clock, MemorySource, message
from kafka import errors as kafka_errors

from simulator.weather import Weather
from streamlstm.config.model import Config
from streamlstm.errors import LogGap, Temporary, Unavailable
from streamlstm.records.batch import Cut, Messages
from streamlstm.recovery.journal import Journal
from streamlstm.transport.interfaces import Position, ProgressEntry
from streamlstm.transport.kafka.idempotent import IdempotentPublisher
from streamlstm.transport.kafka.publisher import KafkaPublisher


class SimulatedSource(MemorySource):
    """Refuses positions that are not in the log, as a client does that is forbidden to reset them."""

    fate: Weather

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:
        if self.fate.struck("away", "poll"):
            raise Unavailable("the broker is away")
        for place, at in self.at.items():
            self._must_reach(place, at)
        return super().poll(max_records, timeout_s)

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        if self.fate.struck("away", "read"):
            raise Temporary("the broker is away")
        for r in cut:
            self._must_reach((r.topic, r.partition), r.end)
        return super().read(cut, timeout_s)

    def resolve_start(self, start: str) -> list[Position]:
        if self.fate.struck("away", "resolve_start"):
            raise Temporary("the broker is away")
        return super().resolve_start(start)

    def _must_reach(self, place: tuple[str, int], end: int) -> None:
        if end > (last := self.broker.ends()[place]):
            raise LogGap(f"{place[0]}-{place[1]}: the log up to {end} is needed, and it ends at {last}")


class Input(Broker):
    """Topics of one deployment, appended to as other people's producers do."""

    def __init__(self, partitions: dict[str, int], keys: int = 4) -> None:
        super().__init__(
            {topic: [[] for _ in range(count)] for topic, count in partitions.items()},
            topic_ids={topic: f"id-{topic}" for topic in partitions},
        )
        self.made, self.keys = 0, keys

    def grow(self, records: int, rng: random.Random) -> None:
        """
        Runs of records, some of them bad; transactions with their marker, some aborted.

        An offset without a record is a marker, part of an aborted transaction, or was compacted away before anybody
        read it: a committed reader sees the same gap.
        """
        places = [(t, p) for t, logs in self.inputs.items() for p in range(len(logs))]
        while records > 0:
            topic, partition = rng.choice(places)
            log = self.inputs[topic][partition]
            run = rng.randrange(1, 8)
            fate = rng.random()
            if fate < 0.1:
                log += [None] * (run + 1)
                continue
            log += [self._record(rng) for _ in range(run)]
            if fate < 0.4:
                log.append(None)
            if fate > 0.95:
                log[-1] = None
            records -= run

    def _record(self, rng: random.Random) -> bytes:
        self.made += 1
        if rng.random() < 0.04:
            return b"broken"
        return message(f"s{rng.randrange(self.keys)}", float(rng.randrange(-50, 50)))

    def delete(self, rng: random.Random) -> None:
        """Retention is faster than whoever reads."""
        for place, end in self.ends().items():
            if rng.random() < 0.5:
                first = self.first(*place)
                self.beginning[place] = rng.randrange(first, min(end, first + 30) + 1)

    def compact(self, read: dict[tuple[str, int], int], rng: random.Random) -> None:
        """Of what nobody has read yet; what was read in recorded cuts must stay, and the README says so."""
        for (topic, partition), at in read.items():
            log = self.inputs[topic][partition]
            for offset in range(at, len(log)):
                if rng.random() < 0.1:
                    log[offset] = None


@dataclass(eq=False)
class Transaction:
    """``open`` → ``aborted``, or ``prepared`` → ``committed``: once prepared it will be committed, reply or none."""

    state: str = "open"
    topics: set[str] = field(default_factory=set)


ALONE = Transaction("committed")


@dataclass(eq=False)
class Stored:
    offset: int
    value: bytes
    made_in: Transaction


class Output:
    """The output topics, one partition each, and the coordinator of the one transactional id that writes them."""

    def __init__(self) -> None:
        self.topics: dict[str, list[Stored]] = {}
        self.next_offset: dict[str, int] = {}
        self.begins: dict[str, int] = {}
        self.epoch = 0
        self.current: Transaction | None = None

    def init(self) -> int:
        """Whoever was there is fenced; an open transaction is aborted, one that was prepared is committed."""
        self._finish("aborted")
        self.epoch += 1
        return self.epoch

    def time_out(self) -> None:
        """The open transaction took too long: aborted, and its producer fenced by nobody."""
        self._finish("aborted")
        self.epoch += 1

    def begin(self) -> Transaction:
        self._finish("aborted")
        self.current = Transaction()
        return self.current

    def append(self, topic: str, value: bytes) -> int:
        assert self.current is not None
        offset = self.next_offset.get(topic, 0)
        self.next_offset[topic] = offset + 1
        self.topics.setdefault(topic, []).append(Stored(offset, value, self.current))
        self.current.topics.add(topic)
        return offset

    def append_alone(self, topic: str, value: bytes) -> int:
        """Without a transaction: seen at once."""
        offset = self.next_offset.get(topic, 0)
        self.next_offset[topic] = offset + 1
        self.topics.setdefault(topic, []).append(Stored(offset, value, ALONE))
        return offset

    def commit(self, *, markers: bool) -> None:
        """The decision is made; without ``markers`` it becomes visible later."""
        assert self.current is not None
        self.current.state = "prepared"
        if markers:
            self._finish("aborted")

    def _finish(self, undecided: str) -> None:
        if self.current is None:
            return
        self.current.state = "committed" if self.current.state == "prepared" else undecided
        for topic in self.current.topics:
            self.next_offset[topic] += 1  # the marker
        self.current = None

    def committed(self, topic: str) -> list[Stored]:
        """All that was ever committed, trimmed or not."""
        return [stored for stored in self.topics.get(topic, ()) if stored.made_in.state == "committed"]

    def values(self, topic: str) -> list[bytes]:
        return [stored.value for stored in self.committed(topic)]


class SimulatedProgress:
    """The progress log as a committed reader has it who waits for a transaction that is being ended."""

    def __init__(self, output: Output, topic: str, weather: Weather, clock: Clock) -> None:
        self.output, self.topic, self.weather, self.clock = output, topic, weather, clock

    def read(self, start: int = 0) -> list[ProgressEntry]:
        self.weather.point("read progress")
        if self.weather.struck("away", "read progress"):
            raise Temporary("the broker is away")
        if self.output.current is not None:
            self.clock.advance(40.0)
            self.output.time_out()
        start = max(start, self.output.begins.get(self.topic, 0))
        return [ProgressEntry(s.offset, s.value) for s in self.output.committed(self.topic) if s.offset >= start]

    def trim(self, before: int) -> None:
        self.weather.point("trim progress")
        if self.weather.struck("away", "trim progress"):
            raise Temporary("not trimmed")
        self.output.begins[self.topic] = max(before, self.output.begins.get(self.topic, 0))


class _Sent:
    """A future of kafka-python's: a result, an error, or nothing yet."""

    def __init__(self, topic: str, value: bytes) -> None:
        self.topic, self.payload = topic, value
        self.value: Any = None
        self.exception: Exception | None = None

    def get(self, timeout: float | None = None) -> Any:
        if self.exception is not None:
            raise kafka_errors.KafkaError("failed", self.exception)
        if self.value is None:
            raise kafka_errors.KafkaTimeoutError("not within the time")
        return self.value


@dataclass
class _Metadata:
    offset: int


class SimulatedProducer:
    """
    kafka-python's transactional producer with its faults.

    Sends are delivered by ``flush`` or ``commit_transaction``, and each may fail by itself. ``flush`` says nothing
    about it; ``commit_transaction`` returns as if all were well, having committed the rest. ``believed`` counts the
    commits that were asked for although a send had failed or was never looked at: our publisher must never ask.
    """

    def __init__(self, output: Output, weather: Weather) -> None:
        self.output, self.weather = output, weather
        self.epoch = -1
        self.sent: list[_Sent] = []
        self.transaction: Transaction | None = None
        self.believed = 0

    def init_transactions(self) -> None:
        self.weather.point("init_transactions")
        if self.weather.struck("init", "init_transactions"):
            raise kafka_errors.KafkaTimeoutError("no coordinator")
        self.epoch = self.output.init()
        self.weather.point("init_transactions, done")
        if self.weather.struck("init", "init_transactions, its reply"):
            raise kafka_errors.KafkaTimeoutError("the reply was lost")

    def partitions_for(self, topic: str) -> set[int]:
        return {0, 1, 2}

    def begin_transaction(self) -> None:
        self.weather.point("begin")
        self.sent, self.transaction = [], None

    def send(self, topic: str, value: bytes, **_: object) -> _Sent:
        if self.weather.struck("refused", f"send to {topic}"):
            raise kafka_errors.KafkaTimeoutError("no room")
        self.sent.append(_Sent(topic, value))
        return self.sent[-1]

    def flush(self, timeout: float | None = None) -> None:
        self.weather.point("flush")
        self._deliver()
        if self.weather.struck("flush", "flush"):
            raise kafka_errors.UnknownError("Future not done")

    def commit_transaction(self) -> None:
        self.weather.point("commit")
        if any(sent.value is None for sent in self.sent):
            self.believed += 1
        self._deliver()
        if self.weather.struck("timed out", "the transaction") and self.epoch == self.output.epoch:
            self.output.time_out()
        self._check()
        if self.transaction is None or self.output.current is not self.transaction:
            return  # nothing was ever added to it: the library calls that a success
        if self.weather.struck("commit", "commit, before it was done"):
            self._fail("before")
        self.output.commit(markers=not self.weather.struck("prepared", "commit, its markers come later"))
        self.weather.point("commit, done")
        if self.weather.struck("reply", "commit, its reply"):
            self._fail("after")

    def close(self, timeout: float | None = None) -> None: ...

    def _fail(self, when: str) -> NoReturn:
        """It raises, or hangs until the deadline ends the process."""
        if self.weather.rng.random() < 0.3:
            self.weather.die(f"the deadline, {when} the commit")
        raise kafka_errors.KafkaConnectionError("the reply was lost")

    def _deliver(self) -> None:
        for sent in self.sent:
            if sent.value is not None or sent.exception is not None:
                continue
            if self.weather.struck("send", f"a send to {sent.topic}"):
                sent.exception = self.weather.rng.choice(LOST)("lost")
                continue
            try:
                self._check()
            except kafka_errors.KafkaError as error:
                sent.exception = error
                continue
            if self.transaction is None:
                self.transaction = self.output.begin()
            sent.value = _Metadata(self.output.append(sent.topic, sent.payload))

    def _check(self) -> None:
        if self.epoch != self.output.epoch:
            raise kafka_errors.ProducerFencedError("fenced")


LOST: Sequence[Callable[[str], Exception]] = (
    kafka_errors.KafkaTimeoutError,
    kafka_errors.NotEnoughReplicasError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.UnknownProducerIdError,
)


class PlainProducer(SimulatedProducer):
    """Without transactions: each message is there once it was delivered, and the process may die between two."""

    def _deliver(self) -> None:
        left = [sent for sent in self.sent if sent.value is None and sent.exception is None]
        for sent in self.weather.rng.sample(left, len(left)):
            self.weather.point(f"a send to {sent.topic}")
            if self.weather.struck("send", f"a send to {sent.topic}"):
                sent.exception = self.weather.rng.choice(LOST)("lost")
                continue
            sent.value = _Metadata(self.output.append_alone(sent.topic, sent.payload))
            if self.weather.struck("reply", f"the reply of a send to {sent.topic}"):
                sent.value, sent.exception = None, kafka_errors.KafkaTimeoutError("the reply was lost")


class Unwatched:
    """A deadline that the simulation keeps itself, by killing the process."""

    limit_s = 30.0

    def guard(self, doing: str) -> nullcontext[None]:
        return nullcontext()


class SimulatedPublisher(KafkaPublisher):
    """The product's checked commit over a simulated producer."""

    def __init__(self, config: Config, output: Output, weather: Weather) -> None:
        super().__init__(config, Unwatched())  # type: ignore[arg-type]  # because it is a deadline to its caller
        self._output, self._weather = output, weather
        self.producers: list[SimulatedProducer] = []

    def begin_session(self) -> None:
        self.close()
        producer = SimulatedProducer(self._output, self._weather)
        try:
            producer.init_transactions()
        except kafka_errors.KafkaError as error:
            raise Temporary("no coordinator") from error
        self.producers.append(producer)
        self._producer = producer

    @property
    def believed(self) -> int:
        return sum(producer.believed for producer in self.producers)


class SimulatedIdempotentPublisher(IdempotentPublisher):
    """The product's journal and sends over a simulated producer."""

    believed = 0

    def __init__(self, config: Config, journal: Journal, output: Output, weather: Weather) -> None:
        super().__init__(config, journal, Unwatched())  # type: ignore[arg-type]  # because it is a deadline to its caller
        self._output, self._weather = output, weather

    def begin_session(self) -> None:
        self.close()
        self._log.open()
        if self._weather.struck("init", "a new producer"):
            raise Temporary("no broker")
        self._producer = PlainProducer(self._output, self._weather)
