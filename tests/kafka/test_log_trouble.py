"""Trouble with the input log and its broker, as an operator meets it: how the service ends, and how it goes on."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from broker import Cluster
from deployment import Deployment, coordinates, fill
from kafka.structs import TopicPartition
from service import Service, wait_for

from streamlstm.recovery.progress import Gap, decode_record, read_chain


def test_a_gap_is_refused_with_both_offsets_or_passed_over_and_recorded(
    deployment: Deployment, serve: Callable[..., Service]
) -> None:
    """While it was away, and killed at that, retention deleted some of what was not read yet."""
    fill(deployment, 2000)
    service = serve(deployment, checkpoint={"url": str(deployment.directory / "state"), "every": {"time": "1h"}})
    service.start()
    service.wait_ready()
    service.wait_committed(2000, 60)
    service.kill()
    fill(deployment, 2000, first=2000)
    with deployment.admin() as admin:
        admin.delete_records({TopicPartition(deployment.input, 0): 1500})

    service.start()
    assert service.wait() == 65
    assert re.search(r"offset 0 is needed, but retention has deleted all before 1500", service.complaint())
    assert "source.on_gap: skip" in service.complaint()

    service.start("--set", "source.on_gap=skip")
    service.wait_ready()
    service.wait_consumed(60)
    service.kill()
    service.start()
    service.wait_ready()
    service.wait_consumed(60)
    assert service.stop() == 0

    entries = deployment.progress().read()
    gaps = [record for entry in entries if isinstance(record := decode_record(entry), Gap)]
    assert [(r.start, r.end) for gap in gaps for r in gap.ranges] == [(0, 1500)]
    chain = read_chain(entries, deployment.name)
    assert chain.positions == {(deployment.input, 0): 2000, (deployment.input, 1): 2000}
    published = coordinates(deployment)
    assert len(published) == len(set(published))
    expected = {(0, at) for at in (*range(1000), *range(1500, 2000))} | {(1, at) for at in range(2000)}
    assert set(published) == expected


def test_a_bomb_is_one_dead_letter_and_costs_little_memory(
    deploy: Callable[..., Deployment], cluster: Cluster, serve: Callable[..., Service]
) -> None:
    deployment = deploy(cluster).with_topics(partitions=1)
    service = serve(
        deployment,
        partitions=1,
        decode={
            "series_id": ["@key"], "timestamp": {"path": "$.ts"}, "target": "$.value", "max_batch_bytes": "8MiB",
        },
    )  # fmt: skip
    fill(deployment, 100, partitions=1)
    service.start()
    service.wait_ready()
    service.wait_committed(100, 60)
    before = peak_bytes(service)
    producer = deployment.producer(
        compression_type="gzip", max_request_size=1 << 28, batch_size=1 << 28, linger_ms=5000
    )
    sent = [producer.send(deployment.input, bytes(1 << 24), partition=0) for _ in range(10)]
    producer.flush()
    assert sent[-1].get(60).offset == 109
    fill(deployment, 100, first=100, partitions=1)
    service.wait_committed(210, 60)
    assert peak_bytes(service) - before < 64 << 20
    with_outcomes = {o: n for o, n in service.status()["records"].items() if n}
    assert with_outcomes["dead"] == 10
    assert service.stop() == 0
    assert len(coordinates(deployment)) == 200
    assert deployment.committed(deployment.config.dead_letter_topic) == [b""]


def peak_bytes(service: Service) -> int:
    assert service.child is not None
    told = Path(f"/proc/{service.child.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", told)[1])


def test_a_broker_that_is_frozen_ends_in_75_and_costs_nothing(
    own_broker: Cluster, deploy: Callable[..., Deployment], serve: Callable[..., Service]
) -> None:
    """Its sockets are open, its port takes connections, and nothing ever answers."""
    deployment = deploy(own_broker).with_topics()
    fill(deployment, 20_000)
    service = serve(deployment, runtime={"deadline": "6s"})
    service.start()
    service.wait_ready()
    service.wait_committed(1000, 60)
    own_broker.do("pause")
    frozen = time.monotonic()
    try:
        assert service.wait(60) == 75
        took = time.monotonic() - frozen
    finally:
        own_broker.do("resume")
    assert took < 30
    wait_for(lambda: recovered(service), 120, "it is up again and has read all")
    assert service.stop() == 0
    published = coordinates(deployment)
    assert len(published) == len(set(published)) == 20_000


def recovered(service: Service) -> bool:
    """A supervisor: whatever is mended by another start is started again."""
    if service.child is None:
        service.start()
    assert service.child is not None
    code = service.child.poll()
    if code is not None:
        assert code in (69, 75), service.said()
        service.child = None
        return False
    return '"event": "ready"' in service.said() and service.nothing_left()
