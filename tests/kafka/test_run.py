"""``streamlstm run`` as an operator meets it: how it ends, and with which word."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broker import Cluster
from deployment import Deployment, chain_of, coordinates, fill
from service import Service, wait_for

from streamlstm.recovery.checkpoint import open_store


def test_a_signal_under_load_commits_checkpoints_and_exits_0_in_time(
    deployment: Deployment, serve: Callable[..., Service]
) -> None:
    fill(deployment, 20_000)
    service = serve(deployment)
    service.start()
    service.wait_ready()
    service.wait_committed(500, 30)

    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < 10

    store = open_store(Path(service.config.checkpoint.url))
    assert store.steps()[-1] == chain_of(deployment).last_step
    service.start()
    ready = service.wait_ready()
    assert ready["replayed_steps"] == 0
    service.wait_consumed(60)
    assert service.stop() == 0
    published = coordinates(deployment)
    assert len(published) == len(set(published)) == 20_000


def test_another_process_on_the_same_directory_waits_its_turn(
    deployment: Deployment, serve: Callable[..., Service]
) -> None:
    first, second = serve(deployment), serve(deployment)
    first.start()
    first.wait_ready()
    second.start("--set", f"checkpoint.url={first.config.checkpoint.url}")

    assert second.wait() == 75
    assert "is in use by another process (pid" in second.complaint()
    assert first.stop() == 0


def test_a_zombie_is_fenced_publishes_nothing_and_is_not_to_be_restarted(
    deployment: Deployment, serve: Callable[..., Service], tmp_path: Path
) -> None:
    fill(deployment, 1000)
    zombie, successor = serve(deployment), serve(deployment)
    zombie.start()
    zombie.wait_ready()
    zombie.wait_committed(1000, 30)
    zombie.send(signal.SIGSTOP)
    shutil.copytree(zombie.config.checkpoint.url, successor.config.checkpoint.url)
    successor.start()
    successor.wait_ready()
    fill(deployment, 1000, first=1000)
    successor.wait_committed(2000, 30)
    assert successor.stop() == 0

    zombie.send(signal.SIGCONT)
    assert zombie.wait() == 76
    assert "another process took this deployment over" in zombie.complaint()
    published = coordinates(deployment)
    assert len(published) == len(set(published)) == 2000


def test_a_broker_that_is_killed_and_comes_back_costs_nothing(
    own_broker: Cluster, deploy: Callable[..., Deployment], serve: Callable[..., Service]
) -> None:
    deployment = deploy(own_broker).with_topics()
    fill(deployment, 20_000)
    service = serve(deployment, runtime={"deadline": "15s"})
    service.start()
    service.wait_ready()
    service.wait_committed(1000, 30)
    own_broker.do("kill")
    time.sleep(2)
    own_broker.do("start")

    def consumed() -> bool:
        assert service.child is not None
        code = service.child.poll()
        if code is not None:
            # The other good end: 75, and a supervisor.
            assert code == 75, service.said()
            service.child = None
            service.start()
            service.wait_ready()
        return service.nothing_left()

    wait_for(consumed, 120, "the input is consumed")
    assert service.stop() == 0
    published = coordinates(deployment)
    assert len(published) == len(set(published)) == 20_000


def test_a_broker_that_is_not_there_is_named(
    deploy: Callable[..., Deployment], cluster: Cluster, serve: Callable[..., Service]
) -> None:
    service = serve(deploy(cluster))
    service.start("--set", "source.bootstrap_servers=['127.0.0.1:1']")

    assert service.wait() == 69
    assert "127.0.0.1:1: nobody listens on port 1" in service.complaint()


def test_a_topic_that_is_not_there_is_named_with_what_to_do(
    deploy: Callable[..., Deployment], cluster: Cluster, serve: Callable[..., Service]
) -> None:
    deployment = deploy(cluster)
    service = serve(deployment)
    service.start()

    assert service.wait() == 78
    assert f"{deployment.input}: no such topic" in service.complaint()


@pytest.mark.parametrize("make", ["no parent", "a file"])
def test_a_directory_that_cannot_be_used_is_one_line(
    deployment: Deployment, serve: Callable[..., Service], tmp_path: Path, make: str
) -> None:
    (tmp_path / "file").touch()
    url = tmp_path / "missing" / "state" if make == "no parent" else tmp_path / "file"
    service = serve(deployment, checkpoint={"url": str(url)})
    service.start()

    assert service.wait() == 78
    assert f"checkpoint.url: {url}" in service.complaint()


def test_a_first_checkpoint_that_cannot_be_written_is_one_line_and_publishes_nothing(
    deployment: Deployment, serve: Callable[..., Service]
) -> None:
    service = serve(deployment)
    service.start(under="ulimit -f 4")

    assert service.wait() == 74
    assert "the checkpoint of step 0 could not be written" in service.complaint()
    assert deployment.progress().read() == []


def test_a_start_that_is_refused_leaves_no_directory_behind(
    deployment: Deployment, serve: Callable[..., Service], tmp_path: Path
) -> None:
    service = serve(deployment)
    service.start()
    service.wait_ready()
    assert service.stop() == 0
    service.start("--set", f"checkpoint.url={tmp_path / 'mistyped'}")
    assert service.wait() == 65
    assert f"{tmp_path / 'mistyped'} has no checkpoint" in service.complaint()
    assert not (tmp_path / "mistyped").exists()


def test_a_first_run_that_finds_forecasts_says_what_to_bring_back(
    deployment: Deployment, serve: Callable[..., Service]
) -> None:
    """Without transactions progress is in the state directory: who loses that begins anew, and nothing refuses it."""
    fill(deployment, 100)
    service = serve(deployment, sink={"delivery": "idempotent"})
    for life in ("first", "second"):
        service.start()
        service.wait_ready()
        service.wait_consumed(60)
        assert service.stop() == 0
        said = "this is a first run, but" in service.said()
        assert said == (life == "second")
        shutil.rmtree(service.config.checkpoint.url)
    assert f'"kept_in": "{service.config.checkpoint.url}"' in service.said()


def test_all_checkpoints_bad_is_refused_with_the_reason(deployment: Deployment, serve: Callable[..., Service]) -> None:
    service = serve(deployment)
    service.start()
    service.wait_ready()
    assert service.stop() == 0
    for path in Path(service.config.checkpoint.url).glob("0*/model.pt"):
        path.write_bytes(b"")
    service.start()

    assert service.wait() == 65
    assert "0: model.pt has 0 bytes instead of" in service.complaint()
