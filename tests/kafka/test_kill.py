"""Killed at random moments, again and again, and nobody can tell from what was published."""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from broker import Cluster
from deployment import Deployment
from service import Service, wait_for

from streamlstm.engine.core import Engine
from streamlstm.records.decode import compile_decoder
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.progress import Chain, Incarnation, decode_record, read_chain
from streamlstm.service.encode import ForecastEncoder
from streamlstm.transport.kafka.topics import create_topics

SERIES = 200
KILLS = 20
RECORDS_A_KILL = 5_000
"""So many that a life has some of its own to go on with, on a machine that is quick too."""
RECORDS = KILLS * RECORDS_A_KILL
EVERY = {"records": 10_000, "time": "1h"}


def fill(deployment: Deployment, partitions: int, records: int = RECORDS) -> None:
    """
    Series that swing, some records late, twice, without a value, or not to be read.

    Up to now, because a topic's retention goes by the event times that forecasts carry.
    """
    first = int(time.time()) - 10 * (records // SERIES)
    rng = random.Random(17)
    producer = deployment.producer(batch_size=1 << 18)
    futures = []
    for i in range(records):
        series, at = i % SERIES, i // SERIES
        value: float | None = round(math.sin(at / 20 + series) + rng.gauss(0, 0.1), 3)
        odd = rng.random()
        if odd < 0.01:
            value = None
        elif odd < 0.02:
            at -= rng.randrange(3)
        body = b"not JSON" if 0.02 <= odd < 0.025 else json.dumps({"ts": first + 10 * at, "value": value}).encode()
        partition = series % partitions
        futures.append(producer.send(deployment.input, body, key=b"s%d" % series, partition=partition))
    producer.flush()
    for future in futures:
        future.get(30)


def chain_of(deployment: Deployment) -> Chain:
    return read_chain(deployment.progress().read(), deployment.name)


def ends_of(deployment: Deployment) -> dict[tuple[str, int], int]:
    return {(p.topic, p.partition): p.next_offset for p in deployment.source().end_offsets()}


def finish(deployment: Deployment, service: Service) -> None:
    """To the end of the input, and a clean stop."""
    service.start()
    service.wait_ready()
    service.wait_consumed(120)
    assert service.stop() == 0, service.said()
    assert chain_of(deployment).last_step > 0


def be_killed(service: Service, rng: random.Random, kills: int = KILLS) -> None:
    """
    So many lives, each ended at a moment of its own, all along the input.

    Every fourth while it starts or replays; the others somewhere between two polls, commits or checkpoints.
    """
    targets = sorted(rng.randrange(1, int(0.95 * RECORDS_A_KILL * kills)) for _ in range(kills))
    for kill, target in enumerate(targets):
        service.start()
        if kill % 4 == 3:
            time.sleep(rng.uniform(0.3, 3.0))
        else:
            service.wait_ready()
            reach(service, target)
            time.sleep(rng.uniform(0.0, 0.3))
        service.kill()


def reach(service: Service, target: int) -> None:
    """Until so much is committed; an earlier life may have come further than that."""
    wait_for(lambda: service.nothing_left() or service.committed() >= target, 60, f"{target} records are committed")


@pytest.fixture
def served() -> Generator[Callable[..., Service], None, None]:
    made: list[Service] = []

    def make(deployment: Deployment, directory: Path, **sections: object) -> Service:
        made.append(Service(deployment, directory, **sections))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.mark.timeout(600)
def test_one_partition_killed_and_not_killed_publish_the_same_bytes(
    cluster: Cluster, deploy: Callable[..., Deployment], served: Callable[..., Service], tmp_path: Path
) -> None:
    deployment = deploy(cluster).with_topics(partitions=1)
    fill(deployment, partitions=1)
    ours = [deployment.config.forecast_topic, deployment.config.dead_letter_topic, deployment.config.progress_topic]

    finish(
        deployment,
        served(
            deployment,
            tmp_path / "calm",
            partitions=1,
            checkpoint={"url": str(tmp_path / "calm/state"), "every": EVERY},
        ),
    )
    expected = [deployment.committed(topic) for topic in ours[:2]]
    assert len(expected[0]) + len(expected[1]) > 0.95 * RECORDS

    # The same names again, or the configuration's hash in each forecast would differ.
    with deployment.admin() as admin:
        admin.delete_topics(ours)
    wait_for(lambda: remade(deployment), 30, "the topics are made anew")
    service = served(
        deployment,
        tmp_path / "killed",
        partitions=1,
        checkpoint={"url": str(tmp_path / "killed/state"), "every": EVERY},
    )
    be_killed(service, random.Random(17))
    finish(deployment, service)

    assert [deployment.committed(topic) for topic in ours[:2]] == expected


def remade(deployment: Deployment) -> bool:
    """Deleting takes a moment, and until then a topic is still there."""
    made = create_topics(deployment.config)
    return all(m.outcome == "exists" for m in made) and not any(map(deployment.committed, [m.plan.name for m in made]))


@pytest.mark.timeout(600)
def test_four_partitions_killed_equal_their_recorded_cuts(
    cluster: Cluster, deploy: Callable[..., Deployment], served: Callable[..., Service], tmp_path: Path
) -> None:
    killed_they_equal_their_recorded_cuts(deploy(cluster), served, tmp_path, 18, KILLS)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(100, 110))
def test_killed_five_hundred_times_they_equal_their_recorded_cuts(
    cluster: Cluster, deploy: Callable[..., Deployment], served: Callable[..., Service], tmp_path: Path, seed: int
) -> None:
    began = time.monotonic()
    killed_they_equal_their_recorded_cuts(deploy(cluster), served, tmp_path, seed, 50)
    print(f"seed {seed}: 50 kills, {50 * RECORDS_A_KILL} records, {time.monotonic() - began:.0f} s: equal")


def killed_they_equal_their_recorded_cuts(
    deployment: Deployment, served: Callable[..., Service], tmp_path: Path, seed: int, kills: int
) -> None:
    deployment.with_topics(partitions=4)
    fill(deployment, partitions=4, records=kills * RECORDS_A_KILL)
    service = served(
        deployment,
        tmp_path / "killed",
        partitions=4,
        checkpoint={"url": str(tmp_path / "killed/state"), "every": EVERY},
        sink={"progress": {"trim": False}},
    )
    be_killed(service, random.Random(seed), kills)
    finish(deployment, service)

    entries = deployment.progress().read()
    incarnations = [r for e in entries if isinstance(r := decode_record(e), Incarnation)]
    assert len(incarnations) > kills / 2
    assert len({i.after for i in incarnations}) > kills / 2, "killed in between, not always at the same step"
    assert not any(i.rebased for i in incarnations)
    chain = read_chain(entries, deployment.name)
    assert chain.positions == ends_of(deployment)

    torch.set_num_threads(1)
    config = service.config
    engine, source = Engine.create(config, "cpu"), deployment.source()
    decoder, encoder = compile_decoder(config.decode), ForecastEncoder("0" * 64, config.model.horizons)
    coordinates: set[tuple[int, int]] = set()
    records = 0
    for step in chain.after(0):
        messages = source.read(step.cut, 10.0)
        report = engine.step(decoder.decode(messages))
        assert report.digest().hex() == step.digest, f"step {step.number}"
        records += sum(report.counts().values())
        for message in encoder.encode_forecasts(report):
            told = json.loads(message.value or b"")["source"]
            coordinates.add((told["partition"], told["offset"]))
    assert records == kills * RECORDS_A_KILL

    published = [json.loads(value)["source"] for value in deployment.committed(config.forecast_topic)]
    assert len(published) == len(coordinates)
    assert {(told["partition"], told["offset"]) for told in published} == coordinates
    store = open_store(config.checkpoint.url)
    assert store.load(store.steps()[-1]).state.digests() == engine.state().digests()
    shutil.rmtree(tmp_path / "killed")
