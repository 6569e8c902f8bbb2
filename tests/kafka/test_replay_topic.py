import json
import math
from collections.abc import Generator
from pathlib import Path

import pytest
from deployment import Deployment
from service import Service, wait_for

from streamlstm.cli.main import main
from streamlstm.recovery.progress import read_chain

START_S = 1_795_075_200


def fill(deployment: Deployment, records: int = 60) -> None:
    """Two partitions whose broker timestamps interleave, ten seconds apart; one record is no JSON."""
    producer = deployment.producer()
    for partition in (0, 1):
        for i in range(records):
            second = START_S + 20 * i + 10 * partition
            value = json.dumps({"ts": second, "value": math.sin(i / 3 + partition)}).encode()
            if (partition, i) == (1, 7):
                value = b"no JSON"
            producer.send(deployment.input, value, b"s%d" % partition, partition=partition, timestamp_ms=1000 * second)
    producer.flush()


@pytest.fixture
def service(deployment: Deployment, tmp_path: Path) -> Generator[Service, None, None]:
    made = Service(deployment, tmp_path / "service", sink={"progress": {"trim": False}})
    yield made
    made.close()


def replay(capsys: pytest.CaptureFixture[str], service: Service, *argv: object) -> dict:
    capsys.readouterr()
    assert main(["replay", "-c", str(service.file), *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_topic_is_replayed_from_its_beginning_to_its_end_or_between_times(
    deployment: Deployment, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(deployment)
    letters = tmp_path / "dead.ndjson"
    whole = replay(capsys, service, "--from", deployment.input, "--dead-letters", letters)
    assert whole["messages"] == 120
    assert sum(whole["records"].values()) == 120
    assert whole["records"]["dead"] == 1
    (letter,) = map(json.loads, letters.read_text().splitlines())
    assert (letter["key"], letter["value"]) == ("s1", "no JSON")
    assert letter["headers"]["streamlstm.error.topic"] == deployment.input

    again = replay(capsys, service, "--from", deployment.input)
    assert again["digests"] == whole["digests"], "the order of a merged replay is a function of the log"

    start, end = "2026-11-19T08:03:20Z", "2026-11-19T08:06:40Z"  # 200 s and 400 s after the start
    between = replay(capsys, service, "--from", deployment.input, "--start", start, "--end", end)
    assert between["messages"] == 20
    assert replay(capsys, service, "--from", deployment.input, "--rows", 33)["messages"] == 33


def test_recorded_cuts_give_what_the_live_run_gave(
    deployment: Deployment, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(deployment)
    service.start()
    service.wait_ready()
    ends = {(deployment.input, p): 60 for p in (0, 1)}
    wait_for(
        lambda: read_chain(deployment.progress().read(), deployment.name).positions == ends, 60, "all was consumed"
    )
    assert service.stop() == 0
    said = replay(capsys, service, "--cuts", "progress")
    steps = read_chain(deployment.progress().read(), deployment.name).last_step
    assert said["messages"] == 120
    assert said["steps"] == said["recorded_digests"]["compared"] == steps
    assert said["recorded_digests"]["differing"] == 0
