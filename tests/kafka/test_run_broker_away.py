"""A broker that goes away under the running service while there is nothing to read."""

from collections.abc import Callable

from broker import Cluster
from deployment import Deployment
from service import START_TIMEOUT_S, Service, wait_for


def test_the_service_waits_for_a_broker_then_leaves_with_75(
    own_broker: Cluster, deploy: Callable[..., Deployment], serve: Callable[..., Service]
) -> None:
    """The second life waits less: how long a broker takes to come back depends on the machine."""
    service = serve(deploy(own_broker).with_topics())
    service.start("--set", "runtime.deadline=5m")
    service.wait_ready()
    own_broker.do("kill")
    wait_for(lambda: "the broker is away; waiting" in service.said(), START_TIMEOUT_S, "the trouble said")
    own_broker.do("start")
    wait_for(lambda: "the broker is back" in service.said(), START_TIMEOUT_S, "the recovery said")
    assert service.stop() == 0

    service.start("--set", "runtime.deadline=10s")
    service.wait_ready()
    own_broker.do("kill")
    assert service.wait(START_TIMEOUT_S) == 75
    assert "the broker has been away for 10 s" in service.said()
