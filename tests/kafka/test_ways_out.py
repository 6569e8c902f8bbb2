"""What an operator does when a start is refused for good, and when learning keys are to change; on a real broker."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from broker import Cluster
from deployment import Deployment
from service import Service, published, wait_for

RECORDS = 2_000


def fill(deployment: Deployment, first: int, last: int) -> None:
    producer = deployment.producer(batch_size=1 << 18)
    futures = []
    for i in range(first, last):
        body = json.dumps({"ts": 1_700_000_000 + 10 * (i // 10), "value": i * 7 % 31}).encode()
        futures.append(producer.send(deployment.input, body, key=b"s%d" % (i % 10), partition=0))
    producer.flush()
    for future in futures:
        future.get(30)


@pytest.fixture
def service(cluster: Cluster, deploy: Callable[..., Deployment], tmp_path: Path) -> Generator[Service, None, None]:
    deployment = deploy(cluster).with_topics(partitions=1)
    fill(deployment, 0, RECORDS)
    state = {"url": str(tmp_path / "state"), "every": {"records": 700, "time": "1h"}, "keep": {"last": 50}}
    made = Service(deployment, tmp_path, partitions=1, checkpoint=state, sink={"progress": {"trim": False}})
    made.deployment = deployment
    yield made
    made.close()


def lives(service: Service, *options: str) -> dict:
    """One life until all is consumed; what it said when it was ready."""
    service.start(*options)
    ready = service.wait_ready()
    service.wait_consumed(90)
    assert service.stop() == 0
    return ready


def is_refused(service: Service, *options: str) -> str:
    service.start(*options)
    assert service.wait() == 65
    return service.complaint()


def proven(service: Service, *options: str) -> dict:
    command = [sys.executable, "-m", "streamlstm.cli.main", "verify", "-c", str(service.file), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
def test_each_way_out_works_on_a_real_broker(service: Service) -> None:
    deployment = service.deployment
    assert lives(service)["source"] == "fresh"

    # The state directory is lost: everything is computed again, and nothing is published twice.
    shutil.rmtree(service.config.checkpoint.url)
    assert "--rebuild-from-log" in is_refused(service)
    ready = lives(service, "--rebuild-from-log")
    assert ready["replayed_steps"] == ready["step"] > 0
    assert ready["bits"] == "can be expected to match"
    assert published(service) == {0: list(range(RECORDS))}

    # Learning keys change at a clean stop; killed after it, the change is crossed by the replay.
    changed = ("--set", "training.k2=40", "--set", "training.k1=8")
    fill(deployment, RECORDS, 2 * RECORDS)
    service.start(*changed)
    service.wait_ready()
    service.wait_committed(RECORDS + 500, 60)
    service.kill()
    lives(service, *changed)
    assert published(service) == {0: list(range(2 * RECORDS))}
    told = proven(service, "--from", "0", *changed)
    assert told["holds"]
    assert told["compared"] == told["steps"] > 0

    # The topic is made anew: begin anew on it, and readers can tell.
    with deployment.admin() as admin:
        admin.delete_topics([deployment.input])
        gone = lambda: admin.describe_topics([deployment.input])[0]["error_code"] != 0  # noqa: E731, because it reads better here
        wait_for(gone, 30, "the topic is gone")
    deployment.make_topic(deployment.input, 1)
    fill(deployment, 0, 300)
    assert "`run --fresh`" in is_refused(service, *changed)
    for _ in range(2):  # it may stay in a unit file
        assert lives(service, "--fresh", *changed)["bits"] == "can be expected to match"
    assert published(service) == {0: list(range(2 * RECORDS)), 1: list(range(300))}
