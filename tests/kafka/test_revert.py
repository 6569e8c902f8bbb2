"""A poisoned range is unlearnt: go back, learn on without it, and readers can tell."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from broker import Cluster
from deployment import Deployment
from service import Service, wait_for

from streamlstm.engine.core import Engine
from streamlstm.records.batch import Range
from streamlstm.records.decode import compile_decoder
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.exclusions import drop_excluded
from streamlstm.service.encode import ForecastEncoder

RECORDS, SERIES = 12_000, 20
POISON = (6_000, 6_200)


def fill(deployment: Deployment) -> None:
    """Series that swing, until somebody's sensor says a million."""
    first = int(time.time()) - 10 * (RECORDS // SERIES)
    producer = deployment.producer(batch_size=1 << 18)
    futures = []
    for i in range(RECORDS):
        series, at = i % SERIES, i // SERIES
        value = 1e6 * (-1) ** at if POISON[0] <= i < POISON[1] else round(math.sin(at / 20 + series), 3)
        body = json.dumps({"ts": first + 10 * at, "value": value}).encode()
        futures.append(producer.send(deployment.input, body, key=b"s%d" % series, partition=0))
    producer.flush()
    for future in futures:
        future.get(30)


def tool(service: Service, *args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "streamlstm.cli.main", *args, "-c", str(service.file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def service(cluster: Cluster, deploy: Callable[..., Deployment], tmp_path: Path) -> Generator[Service, None, None]:
    """A service that has learnt from the poisoned range, and was stopped."""
    deployment = deploy(cluster).with_topics(partitions=1)
    fill(deployment)
    state = {"url": str(tmp_path / "state"), "every": {"records": 2_000, "time": "1h"}, "keep": {"last": 20}}
    made = Service(deployment, tmp_path, partitions=1, checkpoint=state)
    made.deployment = deployment
    made.start()
    made.wait_ready()
    made.wait_consumed(120)
    assert made.stop() == 0
    yield made
    made.close()


def published(service: Service) -> dict[int, dict[int, bytes]]:
    """What committed readers see: by revision, by offset."""
    seen: dict[int, dict[int, bytes]] = {}
    for value in service.deployment.committed(service.config.forecast_topic):
        told = json.loads(value)
        of = seen.setdefault(told["model"]["revision"], {})
        assert told["source"]["offset"] not in of, "one forecast twice under the same revision"
        of[told["source"]["offset"]] = value
    return seen


def never_saw_it(service: Service, excluded: Range) -> tuple[dict[int, bytes], dict[str, str]]:
    """The oracle: a fresh engine, and an input without the range. With one partition the log alone decides."""
    torch.set_num_threads(1)
    config, source = service.config, service.deployment.source()
    engine, decoder = Engine.create(config, "cpu"), compile_decoder(config.decode)
    encoder = ForecastEncoder(open_hash(service), config.model.horizons, 1)
    source.seek(source.resolve_start("earliest"))
    forecasts: dict[int, bytes] = {}
    for start in range(0, RECORDS, 997):
        cut = (excluded._replace(start=start, end=min(RECORDS, start + 997)),)
        messages, _ = drop_excluded(source.read(cut, 10.0), [excluded])
        report = engine.step(decoder.decode(messages))
        for message in encoder.encode_forecasts(report):
            forecasts[json.loads(message.value)["source"]["offset"]] = message.value
    return forecasts, engine.state().digests()


def open_hash(service: Service) -> str:
    store = open_store(service.config.checkpoint.url)
    return store.verify(store.steps()[-1]).provenance.settings.hash


@pytest.mark.timeout(300)
def test_a_poisoned_range_is_unlearnt_and_readers_can_tell(service: Service) -> None:
    before = published(service)
    assert list(before) == [0]
    store = open_store(service.config.checkpoint.url)
    old = store.steps()
    places = {step: store.header(step).generation.provenance.positions[0].next_offset for step in old}
    good = max(step for step, at in places.items() if 0 < at <= POISON[0])
    excluded = Range(service.deployment.input, 0, *POISON)
    option = f"{excluded.topic}:0:{POISON[0]}-{POISON[1]}"

    code, _, said = tool(service, "checkpoint", "revert", str(old[-1]), "--exclude", option)
    assert code == 65
    assert "has learnt from" in said
    chain = service.deployment.progress().read()
    code, out, _ = tool(service, "checkpoint", "revert", str(good), "--exclude", option, "--dry-run", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["revision"] == 1
    assert told["relearnt"]["offsets"] == RECORDS - places[good] - (POISON[1] - POISON[0])
    assert (told["relearnt"]["steps"], told["put_aside_at_next_start"]) == (
        old[-1] - good,
        [s for s in old if s > good],
    )
    assert service.deployment.progress().read() == chain
    service.start()
    service.wait_ready()
    assert tool(service, "checkpoint", "revert", str(good), "--exclude", option)[0] == 75
    assert service.stop() == 0

    code, out, said = tool(service, "checkpoint", "revert", str(good), "--exclude", option)
    assert code == 0, said
    assert "revision 1" in out
    assert "nothing was done" in tool(service, "checkpoint", "revert", str(good), "--exclude", option)[1]

    service.start()
    service.wait_ready()
    wait_for(lambda: service.committed() >= POISON[1] + 1_000, 60, "some of it is relearnt")
    service.kill()
    service.start()
    service.wait_ready()
    service.wait_consumed(120)
    code, out, said = tool(service, "verify", "--from", str(old[0]), "--json")
    assert code == 0, said
    told = json.loads(out)
    assert told["holds"]
    assert told["compared"] == told["steps"] > good
    assert good in told["states"]
    assert service.stop() == 0

    seen = published(service)
    assert seen[0] == before[0], "what was published stays"
    forecasts, digests = never_saw_it(service, excluded)
    assert seen[1] == {offset: value for offset, value in forecasts.items() if offset >= places[good]}
    assert not any(POISON[0] <= offset < POISON[1] for offset in seen[1])
    newest = store.load(store.steps()[-1])
    assert newest.state.digests() == digests
    assert newest.generation.provenance.revision == 1
    assert newest.generation.provenance.excluded == (excluded,)
    assert {name.split(".")[0] for name in store.bad()} >= {f"{step:020d}" for step in old if step > good}


@pytest.mark.parametrize("command", [["verify", "--from", "0"], ["replay", "--cuts", "progress"]])
def test_a_chain_that_has_no_topic_is_refused_as_at_a_start(
    cluster: Cluster, deploy: Callable[..., Deployment], tmp_path: Path, command: list[str]
) -> None:
    deployment = deploy(cluster)
    deployment.make_topic(deployment.input, 1)
    code, _, said = tool(Service(deployment, tmp_path, partitions=1), *command)
    assert code == 78
    assert f"{deployment.config.progress_topic}: no such topic; make it with `streamlstm topics create" in said
