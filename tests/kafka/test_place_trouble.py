"""The service while the place of its checkpoints is full, read-only or frozen: a real file system, a real server."""

import re
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from deployment import Deployment, coordinates, fill
from object_servers import CREDENTIALS, Server, s3_server
from service import Service, wait_for

from streamlstm.recovery.checkpoint import open_store

EVERY = {"records": 1000, "time": "1s"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system with room for a few checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def use_up(disk: Path) -> Path:
    """Leave no room on a disk; the file that holds it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return ballast


def failed(service: Service) -> int:
    return len(re.findall('"event": "checkpoint failed"', service.said()))


def kept(service: Service) -> int:
    return len(re.findall('"event": "checkpoint"', service.said()))


def whole(url: str | Path) -> int:
    """The newest generation's step; none is bad."""
    loaded, refused = open_store(url).newest()
    assert loaded is not None
    assert refused == []
    return loaded.generation.step


def once(deployment: Deployment, records: int) -> None:
    published = coordinates(deployment)
    assert len(published) == len(set(published)) == records


@pytest.mark.soak
def test_a_full_disk_costs_checkpoints_and_no_forecast_until_there_is_room_again(
    deployment: Deployment, serve: Callable[..., Service], small_disk: Path
) -> None:
    state = small_disk / "state"
    service = serve(deployment, checkpoint={"url": str(state), "every": EVERY, "keep": {"last": 2, "daily": 0}})
    service.start()
    service.wait_ready()
    fill(deployment, 2000)
    wait_for(lambda: kept(service), 30, "a checkpoint is kept")
    service.wait_committed(2000, 30)
    ballast = use_up(small_disk)
    before = whole(state)
    fill(deployment, 2000, first=2000)
    wait_for(lambda: failed(service), 30, "a checkpoint fails")
    service.wait_committed(4000, 30)

    assert whole(state) >= before
    assert not list(state.glob(".tmp-*"))
    assert "No space left on device" in service.said()
    ballast.unlink()
    done = kept(service)
    fill(deployment, 1000, first=4000)
    wait_for(lambda: kept(service) > done, 30, "there is room again")
    service.wait_committed(5000, 30)
    assert service.stop() == 0
    once(deployment, 5000)


def test_a_disk_that_stays_full_ends_the_service_when_too_much_would_be_replayed(
    deployment: Deployment, serve: Callable[..., Service], small_disk: Path
) -> None:
    state = small_disk / "state"
    service = serve(deployment, checkpoint={"url": str(state), "every": {"records": 300, "time": "1h"}})
    service.start()
    service.wait_ready()
    ballast = use_up(small_disk)
    fill(deployment, 6000)

    assert service.wait() == 74
    assert "too many to replay" in service.complaint()
    assert "then start again: nothing is lost" in service.complaint()
    assert failed(service)
    assert whole(state) == 0
    service.start()
    assert service.wait() == 74  # nothing was mended: it comes no further away
    ballast.unlink()
    service.start()
    assert service.wait_ready()["replayed_steps"] > 0
    service.wait_consumed(60)
    assert service.stop() == 0
    once(deployment, 6000)


def test_a_read_only_directory_is_refused_at_the_start(
    deployment: Deployment, serve: Callable[..., Service], small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for url in (small_disk / "state", small_disk):
        service = serve(deployment, checkpoint={"url": str(url)})
        service.start()
        assert service.wait() == 78
        assert "Read-only file system" in service.complaint()


def test_a_directory_that_becomes_unwritable_costs_checkpoints_and_no_forecast(
    deployment: Deployment, serve: Callable[..., Service]
) -> None:
    service = serve(deployment)
    state = Path(service.config.checkpoint.url)
    service.start("--set", "checkpoint.every={records: 1000, time: 1s}")
    service.wait_ready()
    if subprocess.run(["chattr", "+i", state], check=False, capture_output=True).returncode:
        pytest.skip("may not make a directory immutable")
    try:
        fill(deployment, 3000)
        wait_for(lambda: failed(service), 30, "a checkpoint fails")
        service.wait_committed(3000, 30)
        assert whole(state) == 0
    finally:
        subprocess.run(["chattr", "-i", state], check=True)
    done = kept(service)
    fill(deployment, 1000, first=3000)
    wait_for(lambda: kept(service) > done, 30, "it may be written again")
    service.wait_committed(4000, 30)
    assert service.stop() == 0
    once(deployment, 4000)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Generator[Server, None, None]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as running:
        yield running


def test_killed_anywhere_it_goes_on_from_a_bucket(
    deployment: Deployment, serve: Callable[..., Service], s3: Server
) -> None:
    url = f"s3://bucket/prefix?scheme=http&endpoint_override={s3.address}"
    service = serve(deployment, checkpoint={"url": url, "every": {"records": 700, "time": "1s"}})
    fill(deployment, 6000)
    for wait_s in (0.4, 1.6):
        service.start()
        service.wait_ready()
        time.sleep(wait_s)
        service.kill()
        service.child = None
        whole(url)
    service.start()
    service.wait_ready()
    service.wait_consumed(60)
    assert service.stop() == 0

    assert whole(url) > 0
    once(deployment, 6000)


@pytest.mark.soak
def test_a_frozen_bucket_costs_checkpoints_and_a_stop_does_not_wait_for_it(
    deployment: Deployment, serve: Callable[..., Service], s3: Server
) -> None:
    url = f"s3://bucket/prefix?scheme=http&endpoint_override={s3.address}"
    service = serve(deployment, checkpoint={"url": url, "every": {"records": 1000, "time": "1s"}})
    service.start()
    service.wait_ready()
    s3.freeze()
    fill(deployment, 3000)
    wait_for(lambda: failed(service), 40, "a checkpoint fails")
    service.wait_committed(3000, 30)

    began = time.monotonic()
    code = service.stop()
    took = time.monotonic() - began
    s3.thaw()
    assert took < 12
    assert code in (0, 74)
    service.start()
    service.wait_ready()
    assert service.stop() == 0
    once(deployment, 3000)
