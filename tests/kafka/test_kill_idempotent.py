"""Killed at random moments without transactions: nothing is lost, and a second copy is byte for byte the first."""

import json
import math
import random
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from broker import Cluster
from deployment import Deployment
from service import Service, wait_for

from streamlstm.cli.main import main
from streamlstm.config.keys import config_hash
from streamlstm.engine.core import Engine
from streamlstm.records.decode import compile_decoder
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.journal import Journal
from streamlstm.recovery.progress import Chain, Incarnation, decode_record, read_chain
from streamlstm.service.encode import ForecastEncoder

RECORDS = 20_000
SERIES = 40
EVERY = {"records": 4000, "time": "1h"}


def fill(deployment: Deployment, partitions: int = 2, records: int = RECORDS) -> None:
    first = int(time.time()) - 10 * (records // SERIES)
    producer = deployment.producer(batch_size=1 << 18)
    futures = []
    for i in range(records):
        series, at = i % SERIES, i // SERIES
        body = json.dumps({"ts": first + 10 * at, "value": round(math.sin(at / 20 + series), 3)}).encode()
        body = b"not JSON" if i % 211 == 7 else body
        futures.append(producer.send(deployment.input, body, key=b"s%d" % series, partition=series % partitions))
    producer.flush()
    for future in futures:
        future.get(30)


@pytest.fixture
def serve(tmp_path: Path) -> Generator[Callable[..., Service], None, None]:
    made: list[Service] = []

    def make(deployment: Deployment, **sections: object) -> Service:
        sink = {"delivery": "idempotent", "progress": {"trim": False}}
        state = {"url": str(tmp_path / "state"), "every": EVERY}
        made.append(Service(deployment, tmp_path, sink=sink, checkpoint=state, **sections))
        return made[-1]

    yield make
    for service in made:
        service.close()


def chain_of(deployment: Deployment, directory: Path) -> Chain:
    """From the journal, as the running service leaves it."""
    return read_chain(Journal(directory / "state" / "journal").read(), deployment.name)


def seen(deployment: Deployment, topic: str) -> list[bytes]:
    """What a reader sees who knows nothing of transactions."""
    return [v for values in deployment.committed_by_partition(topic, "read_uncommitted") for v in values]


def recomputed(deployment: Deployment, service: Service, chain: Chain) -> tuple[set[bytes], dict[str, str]]:
    """The oracle: the journal's cuts, fed to a fresh engine without interruption."""
    torch.set_num_threads(1)
    config = service.config
    engine, source = Engine.create(config, "cpu"), deployment.source()
    decoder, encoder = compile_decoder(config.decode), ForecastEncoder(config_hash(config), config.model.horizons)
    forecasts: set[bytes] = set()
    for step in chain.after(0):
        report = engine.step(decoder.decode(source.read(step.cut, 10.0)))
        assert report.digest().hex() == step.digest, f"step {step.number}"
        forecasts |= {message.value or b"" for message in encoder.encode_forecasts(report)}
    return forecasts, engine.state().digests()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.soak)])
def test_killed_again_and_again_all_is_there_and_no_copy_differs(
    cluster: Cluster,
    deploy: Callable[..., Deployment],
    serve: Callable[..., Service],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kills: int,
) -> None:
    deployment = deploy(cluster, delivery="idempotent").with_topics(partitions=2)
    fill(deployment)
    service = serve(deployment)
    rng = random.Random(17)
    for kill, target in enumerate(sorted(rng.randrange(1, int(0.9 * RECORDS)) for _ in range(kills))):
        service.start()
        if kill % 3 == 2:
            time.sleep(rng.uniform(0.5, 3.0))
        else:
            service.wait_ready()
            wait_for(lambda at=target: service.nothing_left() or service.committed() >= at, 60, f"{target} records")
            time.sleep(rng.uniform(0.0, 0.2))
        service.kill()
    service.start()
    service.wait_ready()
    service.wait_consumed(120)
    assert service.stop() == 0, service.said()

    chain = chain_of(deployment, tmp_path)
    entries = Journal(tmp_path / "state" / "journal").read()
    starts = [r for e in entries if isinstance(r := decode_record(e), Incarnation)]
    assert len({i.after for i in starts}) > kills / 2, "killed in between, not always at the same step"
    forecasts, digests = recomputed(deployment, service, chain)
    published = seen(deployment, service.config.forecast_topic)
    assert set(published) == forecasts
    assert len(seen(deployment, service.config.dead_letter_topic)) >= len(range(7, RECORDS, 211))
    assert len(forecasts) + len(range(7, RECORDS, 211)) == RECORDS
    store = open_store(service.config.checkpoint.url)
    assert store.load(store.steps()[-1]).state.digests() == digests

    capsys.readouterr()
    assert main(["replay", "-c", str(service.file), "--cuts", "progress", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recorded_digests"] == {"compared": chain.last_step, "differing": 0}
    print(f"{kills} kills, {len(starts)} starts, {len(published) - len(forecasts)} second copies of {RECORDS} records")


@pytest.mark.timeout(300)
def test_a_broker_that_freezes_ends_it_with_75_and_it_goes_on_without_a_loss(
    own_broker: Cluster, deploy: Callable[..., Deployment], serve: Callable[..., Service], tmp_path: Path
) -> None:
    deployment = deploy(own_broker, delivery="idempotent").with_topics()
    fill(deployment, records=8000)
    service = serve(deployment, runtime={"deadline": "5s"})
    service.start()
    service.wait_ready()
    service.wait_committed(500, 30)
    own_broker.do("pause")
    try:
        assert service.wait(60) == 75, service.said()
    finally:
        own_broker.do("resume")

    service.start()
    service.wait_ready()
    service.wait_consumed(120)
    assert service.stop(30) == 0, service.said()
    forecasts, _ = recomputed(deployment, service, chain_of(deployment, tmp_path))
    assert set(seen(deployment, service.config.forecast_topic)) == forecasts
    assert len(forecasts) + len(range(7, 8000, 211)) == 8000


def test_the_state_directory_is_the_fence(
    deploy: Callable[..., Deployment], cluster: Cluster, serve: Callable[..., Service]
) -> None:
    deployment = deploy(cluster, delivery="idempotent").with_topics()
    first = serve(deployment)
    first.start()
    first.wait_ready()
    first.send(signal.SIGSTOP)
    second = Service(deployment, first.file.parent / "second", sink={"delivery": "idempotent"})
    second.start("--set", f"checkpoint.url={first.config.checkpoint.url}")

    assert second.wait() == 75
    assert "is in use by another process (pid" in second.complaint()
    first.send(signal.SIGCONT)
    assert first.stop() == 0
