"""A broker that goes away under the running service while there is nothing to read."""

from collections.abc import Callable
from pathlib import Path

from broker import Cluster
from deployment import Deployment
from service import Service, wait_for


def test_the_service_waits_for_a_broker_then_leaves_with_75(
    own_broker: Cluster, deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    deployment = deploy(own_broker).with_topics()
    service = Service(deployment, tmp_path / "run", runtime={"deadline": "10s"})
    service.start()
    wait_for(lambda: '"event": "ready"' in service.said(), 60, "ready")
    own_broker.do("kill")
    wait_for(lambda: "the broker is away; waiting" in service.said(), 30, "the trouble said")
    own_broker.do("start")
    wait_for(lambda: "the broker is back" in service.said(), 30, "the recovery said")
    own_broker.do("kill")
    assert service.child is not None
    assert service.child.wait(60) == 75
    assert "the broker has been away for 10 s" in service.said()
