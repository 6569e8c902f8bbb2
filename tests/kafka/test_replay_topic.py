import json
import math
from collections.abc import Generator
from pathlib import Path

import pytest
from deployment import Deployment
from service import Service, wait_for

from streamlstm.cli.main import main
from streamlstm.recovery.checkpoint import open_store
from streamlstm.recovery.progress import read_chain

START_S = 1_795_075_200


def fill(deployment: Deployment, records: int = 60, first: int = 0) -> None:
    """Two partitions whose broker timestamps interleave, ten seconds apart; one record is no JSON."""
    producer = deployment.producer()
    for partition in (0, 1):
        for i in range(first, first + records):
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


def consumed(deployment: Deployment, records: int) -> None:
    """Wait until both partitions were committed so far."""
    ends = {(deployment.input, p): records for p in (0, 1)}
    wait_for(
        lambda: read_chain(deployment.progress().read(), deployment.name).positions == ends, 60, "all was consumed"
    )


def coordinates(value: bytes) -> tuple[int, int, int]:
    told = json.loads(value)["source"]
    return told["partition"], told["offset"], told["row"]


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
    consumed(deployment, 60)
    assert service.stop() == 0
    said = replay(capsys, service, "--cuts", "progress")
    steps = read_chain(deployment.progress().read(), deployment.name).last_step
    assert said["messages"] == 120
    assert said["steps"] == said["recorded_digests"]["compared"] == steps
    assert said["recorded_digests"]["differing"] == 0

    # From the last checkpoint on there is nothing: no error, but it must not look like a replay that went well.
    from_latest = ["replay", "-c", str(service.file), "--cuts", "progress", "--from-checkpoint", "latest"]
    assert main(from_latest) == 0
    told = capsys.readouterr()
    assert f"note: nothing was replayed: no recorded step follows step {steps}" in told.err
    assert "steps     0; digests: 0 as recorded, 0 differ" in told.out


def test_from_a_checkpoint_on_the_published_bytes_are_computed_again_beside_the_running_service(
    deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The front of the chain is trimmed, so that there is no other way to them; and nothing of the service is moved."""
    every = {"url": str(tmp_path / "service/state"), "every": {"records": 20}, "keep": {"last": 3}}
    fill(deployment, 200)
    service = Service(
        deployment,
        tmp_path / "service",
        source={
            "bootstrap_servers": deployment.cluster.bootstrap, "topics": [deployment.input], "poll": {"max_records": 9}
        },
        checkpoint=every,
    )  # fmt: skip
    try:
        service.start()
        service.wait_ready()
        consumed(deployment, 200)
        store = open_store(every["url"])
        wait_for(lambda: len(store.steps()) == 3, 30, "old checkpoints are pruned")
        positions = {p.partition: p.next_offset for p in store.verify(store.steps()[0]).provenance.positions}
        assert 0 < sum(positions.values()) < 400
        out = tmp_path / "f.jsonl"
        options = ["--cuts", "progress", "--from-checkpoint", store.steps()[0], "--out", out]
        said = replay(capsys, service, *options)
        assert said["recorded_digests"] == {"compared": said["steps"], "differing": 0}
        assert service.child is not None
        assert service.child.poll() is None
        assert service.stop() == 0
    finally:
        service.close()
    published = [
        value
        for value in deployment.committed(deployment.config.forecast_topic)
        if coordinates(value)[1] >= positions[coordinates(value)[0]]
    ]
    assert published
    assert sorted(out.read_bytes().splitlines(), key=coordinates) == sorted(published, key=coordinates)


@pytest.mark.parametrize("which", ["topic", "cuts"])
def test_a_replay_of_a_topic_that_was_interrupted_goes_on_to_the_end_it_had(
    deployment: Deployment, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    fill(deployment, 400)
    if which == "cuts":
        service.start()
        service.wait_ready()
        consumed(deployment, 400)
        assert service.stop() == 0
    options = ["--cuts", "progress"] if which == "cuts" else ["--from", deployment.input]
    outs = {run: ["--out", tmp_path / f"{run}.jsonl", "--dead-letters", tmp_path / f"{run}.dead"] for run in "ab"}
    calm = replay(capsys, service, *options, *outs["a"])

    kept = [*options, *outs["b"], "--checkpoint-to", tmp_path / "kept"]
    part = replay(capsys, service, *kept, "--rows", 500)
    assert 500 <= part["messages"] < 800
    fill(deployment, 10)  # what came later is not part of a replay that had begun
    whole = replay(capsys, service, *kept, "--resume")

    for said in (calm, whole):
        del said["seconds"]
    assert whole == calm
    for suffix in (".jsonl", ".dead"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"a{suffix}").read_bytes()
    assert len((tmp_path / "a.jsonl").read_bytes().splitlines()) == 799


def test_recorded_steps_are_computed_under_the_learning_values_they_were_made_with(
    deployment: Deployment, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between the two as well: the state that goes on is the one of other values than the configuration's."""
    fill(deployment, 300)
    for first in (True, False):
        service.start(*([] if first else ["--set", "training.k1=8", "--set", "training.clip_norm=0.01"]))
        service.wait_ready()
        consumed(deployment, 300 if first else 600)
        assert service.stop() == 0
        if first:
            fill(deployment, 300, first=300)
    out = tmp_path / "f.jsonl"
    kept = ["--cuts", "progress", "--out", out, "--checkpoint-to", tmp_path / "kept", "--resume"]
    replay(capsys, service, *kept, "--rows", 100)
    replay(capsys, service, *kept, "--rows", 700)
    said = replay(capsys, service, *kept)
    assert said["recorded_digests"] == {"compared": said["steps"], "differing": 0}
    published = deployment.committed(deployment.config.forecast_topic)
    assert len({json.loads(value)["model"]["config"] for value in published}) == 2
    assert sorted(out.read_bytes().splitlines(), key=coordinates) == sorted(published, key=coordinates)
