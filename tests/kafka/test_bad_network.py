"""
Replies that never come, connections that break, fall silent or crawl, between us and a real broker.

Nobody knows then what became of a request: the broker may have done it. What was asked is never assumed done or not
done; who asks again is told apart by the broker, or the progress log says.
"""

import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from broker import Cluster, wait_until
from deployment import Deployment, fill, outputs
from network import Fault, Network
from service import Service

from streamlstm.config.keys import config_hash
from streamlstm.engine.core import Engine
from streamlstm.errors import Temporary
from streamlstm.records.decode import compile_decoder
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.journal import Journal
from streamlstm.recovery.progress import read_chain
from streamlstm.service.encode import ForecastEncoder
from streamlstm.transport.interfaces import Outputs, ProgressEntry
from streamlstm.transport.kafka.idempotent import IdempotentPublisher
from streamlstm.transport.kafka.publisher import KafkaPublisher

LONGEST_S = 30.0
"""No call blocks longer."""

FAULTS = [
    Fault.REPLY_LOST,
    Fault.REPLY_SWALLOWED,
    pytest.param(Fault.REQUEST_TORN, marks=pytest.mark.soak),
    pytest.param(Fault.REQUEST_SWALLOWED, marks=pytest.mark.soak),
]


@pytest.fixture
def network(cluster: Cluster) -> Generator[Network, None, None]:
    network = Network(cluster.bootstrap, seed=17)
    yield network
    network.close()


def far(deployment: Deployment, network: Network) -> Any:
    """Its configuration, with the network in between."""
    source = deployment.config.source.model_copy(update={"bootstrap_servers": network.bootstrap})
    return deployment.config.model_copy(update={"source": source})


class Session:
    """A publisher as the service uses it: whatever fails is begun again, and what is there decides how it goes on."""

    def __init__(self, publisher: KafkaPublisher | IdempotentPublisher, progress: Callable[[], list[bytes]]) -> None:
        self._publisher, self._progress = publisher, progress
        self.longest_s = 0.0

    def publish(self, step: bytes) -> None:
        """A session of its own for each step, or several."""
        published = False
        while not published:
            with suppress(Temporary):
                self._timed(self._publisher.begin_session)
                there = self._progress()
                if there[-1:] != [step]:
                    self._timed(self._publisher.commit, outputs_of(step))
                elif isinstance(self._publisher, IdempotentPublisher):
                    again = outputs_of(step)
                    self._timed(self._publisher.publish, again.forecasts, again.dead_letters)
                published = True

    def _timed(self, call: Callable[..., object], *args: object) -> None:
        began = time.monotonic()
        try:
            call(*args)
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began)


def outputs_of(step: bytes) -> Outputs:
    return outputs(step, [step + b" a", step + b" b"], [step + b" bad"])


def be_struck(network: Network, session: Session, requests: Sequence[bytes], fault: Fault) -> None:
    """At each of these requests in turn, with something published every time."""
    for request in requests:
        strike = network.strike(request.decode(), fault)
        session.publish(request)
        assert strike.struck.is_set()
    assert session.longest_s < LONGEST_S


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transaction_is_there_once_or_not_at_all_and_the_progress_log_says_which(
    deploy: Callable[..., Deployment], cluster: Cluster, network: Network, fault: Fault
) -> None:
    deployment = deploy(cluster, deadline="1s").with_topics(partitions=1)
    publisher = KafkaPublisher(far(deployment, network), deployment.deadline)
    session = Session(publisher, lambda: [entry.value for entry in deployment.progress().read()])
    steps = [b"InitProducerId", b"AddPartitionsToTxn", b"Produce", b"EndTxn"]
    with closing(publisher):
        be_struck(network, session, steps, fault)

    assert [entry.value for entry in deployment.progress().read()] == steps
    forecasts = [step + part for step in steps for part in (b" a", b" b")]
    assert deployment.committed(deployment.config.forecast_topic) == forecasts
    assert deployment.committed(deployment.config.dead_letter_topic) == [step + b" bad" for step in steps]


@pytest.mark.parametrize("fault", FAULTS)
def test_without_transactions_all_of_it_is_there_and_a_second_copy_is_the_same(
    deploy: Callable[..., Deployment], cluster: Cluster, network: Network, tmp_path: Path, fault: Fault
) -> None:
    deployment = deploy(cluster, deadline="1s", delivery="idempotent").with_topics(partitions=1)
    publisher = IdempotentPublisher(far(deployment, network), Journal(tmp_path / "journal"), deployment.deadline)
    session = Session(publisher, lambda: [entry.value for entry in Journal(tmp_path / "journal").read()])
    steps = [b"InitProducerId", b"Produce"]
    with closing(publisher):
        be_struck(network, session, steps, fault)

    assert [entry.value for entry in Journal(tmp_path / "journal").read()] == steps
    forecasts = {step + part for step in steps for part in (b" a", b" b")}
    assert set(deployment.committed(deployment.config.forecast_topic)) == forecasts
    assert set(deployment.committed(deployment.config.dead_letter_topic)) == {step + b" bad" for step in steps}


RECORDS = 200
"""Sent to the input after each change in the weather."""

AWAY_S = 2.0
DEADLINE_S = 6.0


class Campaign:
    """The service under a supervisor, while more and more input comes and one thing after the other befalls it."""

    def __init__(self, deployment: Deployment, bootstrap: list[str], directory: Path) -> None:
        self.deployment, self.directory = deployment, directory
        self.service = Service(
            deployment,
            directory,
            partitions=1,
            source={
                "bootstrap_servers": bootstrap,
                "topics": [deployment.input],
                "poll": {"max_records": 50},
            },
            checkpoint={"url": str(directory / "state"), "every": {"records": 500, "time": "1h"}},
            sink={"delivery": deployment.config.sink.delivery, "progress": {"trim": False}},
            runtime={"deadline": f"{DEADLINE_S:g}s"},
        )
        self.filled = self.restarts = 0
        self.starting_s = 0.0
        self.longest_s = 0.0

    def entries(self) -> list[ProgressEntry]:
        """The chain, wherever it is kept."""
        if self.deployment.config.sink.delivery == "exactly_once":
            return self.deployment.progress().read()
        return Journal(self.directory / "state" / "journal").read()

    def more_input(self) -> None:
        fill(self.deployment, RECORDS, first=self.filled, partitions=1)
        self.filled += RECORDS

    def see_through(self, what: str, happens: Callable[[], None], happened: Callable[[], bool] = lambda: True) -> None:
        """Until it has happened and all input is committed; whatever a restart mends is started again."""
        began = time.monotonic()
        happens()
        wait_until(lambda: self._up() and happened() and self._all_committed(), 90, f"{what}: {self.service.log}")
        took_s = time.monotonic() - began
        self.longest_s = max(self.longest_s, took_s - self.starting_s)
        print(f"{what}: {took_s:.1f} s, {self.starting_s:.1f} s of it to start")
        self.starting_s = 0.0

    def _all_committed(self) -> bool:
        """A session that has committed nothing yet tells no positions: the one before may have committed all."""
        with suppress(Temporary, OSError):  # the broker is away, or the service ends this moment
            told = sum(p["next_offset"] or 0 for p in self.service.status()["positions"])
            return self.filled in (told, self.positions_recorded())
        return False

    def positions_recorded(self) -> int:
        return sum(read_chain(self.entries(), self.deployment.name).positions.values())

    def _up(self) -> bool:
        child = self.service.child
        if child is not None and (code := child.poll()) is not None:
            assert code == 75, self.service.said()
            self.service.child = None
            self.restarts += 1
        if self.service.child is None:
            began = time.monotonic()
            self.service.start()
            with suppress(AssertionError):  # it ended before: the next look says with which code
                self.service.wait_ready()
            self.starting_s += time.monotonic() - began
            return False
        return '"event": "ready"' in self.service.said()


@pytest.fixture
def campaign(
    deploy: Callable[..., Deployment], cluster: Cluster, network: Network, tmp_path: Path
) -> Generator[Callable[[str], Campaign], None, None]:
    made: list[Campaign] = []

    def make(delivery: str) -> Campaign:
        deployment = deploy(cluster, delivery=delivery).with_topics(partitions=1)
        made.append(Campaign(deployment, network.bootstrap, tmp_path / delivery))
        return made[-1]

    yield make
    for one in made:
        one.service.close()


def equals_a_run_without_faults(campaign: Campaign) -> int:
    """
    A fresh engine, fed the recorded cuts: the same digests, the same state, the same bytes; how many records.

    Each once with transactions; without them a second copy is byte for byte the first.
    """
    torch.set_num_threads(1)
    deployment, config = campaign.deployment, campaign.service.config
    chain = read_chain(campaign.entries(), deployment.name)
    engine, source = Engine.create(config, "cpu"), deployment.source()
    decoder, encoder = compile_decoder(config.decode), ForecastEncoder(config_hash(config), config.model.horizons)
    expected: list[bytes] = []
    for step in chain.after(0):
        report = engine.step(decoder.decode(source.read(step.cut, 10.0)))
        assert report.digest().hex() == step.digest, f"step {step.number}"
        expected += [message.value or b"" for message in encoder.encode_forecasts(report)]
    published = deployment.committed(config.forecast_topic)
    if config.sink.delivery == "exactly_once":
        assert published == expected
    else:
        assert set(published) == set(expected)
    store = open_store(config.checkpoint.url)
    assert store.load(store.steps()[-1]).state.digests() == engine.state().digests()
    return len(expected)


APIS = {
    "exactly_once": ["Produce", "AddPartitionsToTxn", "EndTxn", "Fetch", "InitProducerId"],
    "idempotent": ["Produce", "Fetch", "InitProducerId"],
}
SOME, ALL = 2, 99


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("delivery", APIS)
@pytest.mark.parametrize(
    ("seed", "faults"), [(17, SOME), *(pytest.param(seed, ALL, marks=pytest.mark.soak) for seed in range(18, 21))]
)
def test_in_any_weather_what_is_published_is_what_a_calm_run_publishes(
    campaign: Callable[[str], Campaign], network: Network, delivery: str, seed: int, faults: int
) -> None:
    it = campaign(delivery)
    it.see_through("the start", it.more_input)
    weather = [(api, fault) for api in APIS[delivery] for fault in Fault]
    random.Random(seed).shuffle(weather)
    for api, fault in weather[:faults]:
        if api == "InitProducerId":
            it.service.kill()
        strike = network.strike(api, fault)
        it.see_through(f"{api}, {fault.name}", it.more_input, strike.struck.is_set)

    network.crawls = True
    it.see_through("a slow connection", it.more_input)
    network.crawls = False

    def go_away_for_some_seconds() -> None:
        network.cut()
        it.more_input()
        time.sleep(AWAY_S)
        network.mend()

    it.see_through("all connections cut", go_away_for_some_seconds)
    assert it.service.stop() == 0, it.service.said()
    assert it.longest_s < LONGEST_S
    assert equals_a_run_without_faults(it) == it.filled
    print(f"{delivery}, seed {seed}: restarts {it.restarts}, {it.filled} records, longest {it.longest_s:.1f} s: equal")
