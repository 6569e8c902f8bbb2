"""What becomes of the service when other brokers become leaders: those that know all, and those that do not."""

import re
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from broker import Cluster, wait_until
from deployment import Deployment, fill
from kafka import errors as kafka_errors
from service import Service, published
from test_bad_network import LONGEST_S, Campaign, equals_a_run_without_faults

from streamlstm.cli.main import main
from streamlstm.transport.kafka.topics import create_topics

CUT_BACK = r"read up to offset 800, but the log was cut back at offset 500 since \(unclean leader election\)"


class Input:
    """A topic on brokers 1 and 2 that is content with one of them, whoever it is."""

    def __init__(self, deployment: Deployment, brokers: Cluster) -> None:
        self._deployment, self._brokers = deployment, brokers
        self.records = 0
        plan = {
            "assignments": {0: [1, 2]},
            "configs": {"min.insync.replicas": "1", "unclean.leader.election.enable": "true"},
        }
        with deployment.admin() as admin:
            admin.create_topics({deployment.input: plan})
            admin.wait_for_topics([deployment.input])
        self._wait_for(lambda partition: partition["isr_nodes"] == [1, 2])

    def append(self, records: int) -> None:
        fill(self._deployment, records, first=self.records, partitions=1)
        self.records += records

    def lose_the_follower(self) -> None:
        self._brokers.do("kill", broker=2)
        self._wait_for(lambda partition: partition["isr_nodes"] == [1])

    def elect_the_follower(self) -> None:
        """It knows nothing of what came since it was lost."""
        self._brokers.do("kill", broker=1)
        self._brokers.do("start", broker=2)
        self._wait_for(lambda partition: partition["leader_id"] == 2)

    def mend(self) -> None:
        self._brokers.do("start", broker=1)
        self._wait_for(lambda partition: sorted(partition["isr_nodes"]) == [1, 2])

    def _wait_for(self, so: Callable[[dict], bool]) -> None:
        def is_so() -> bool:
            # The admin client may ask a broker that is dead.
            with suppress(kafka_errors.KafkaError), self._deployment.admin() as admin:
                (topic,) = admin.describe_topics([self._deployment.input])
                return so(topic["partitions"][0])
            return False

        wait_until(is_so, 30, "the partition is as it should be")


def in_sync(deployment: Deployment, replicas: int) -> bool:
    """Whether each of its partitions has so many replicas in sync. The admin client may ask a broker that is dead."""
    with suppress(kafka_errors.KafkaError), deployment.admin() as admin:
        topics = [deployment.input, deployment.config.forecast_topic]
        partitions = [p for topic in admin.describe_topics(topics) for p in topic["partitions"]]
        return all(len(p["isr_nodes"]) == replicas for p in partitions)
    return False


@pytest.fixture
def serve(
    three_brokers: Cluster, deploy: Callable[..., Deployment], tmp_path: Path
) -> Generator[Callable[[int], tuple[Service, Input]], None, None]:
    made: list[Service] = []

    def make(checkpoint_every: int) -> tuple[Service, Input]:
        deployment = deploy(three_brokers)
        input_ = Input(deployment, three_brokers)
        create_topics(deployment.config)
        every = {"records": checkpoint_every, "time": "1h"}
        state = {"url": str(tmp_path / f"state-{len(made)}"), "every": every, "keep": {"last": 50}}
        service = Service(deployment, tmp_path / f"service-{len(made)}", partitions=1, checkpoint=state)
        service.deployment = deployment
        made.append(service)
        return service, input_

    yield make
    for service in made:
        service.close()


class TestElections:
    """The brokers are shared: starting three of them takes longest."""

    @pytest.mark.soak
    @pytest.mark.parametrize("delivery", ["exactly_once", "idempotent"])
    def test_whichever_broker_is_killed_the_others_go_on_with_what_is_committed(
        self, three_brokers: Cluster, deploy: Callable[..., Deployment], tmp_path: Path, delivery: str
    ) -> None:
        """Leaders of input and output, and coordinators of transactions and groups, are on all three."""
        deployment = deploy(three_brokers, delivery=delivery).with_topics(partitions=1)
        it = Campaign(deployment, three_brokers.bootstrap, tmp_path)

        def kill(broker: int) -> None:
            it.more_input()
            three_brokers.do("kill", broker=broker)
            it.more_input()

        try:
            it.see_through("the start", it.more_input)
            for broker in (1, 2, 3, 1):
                it.see_through(f"broker {broker} killed", partial(kill, broker))
                three_brokers.do("start", broker=broker)
                wait_until(partial(in_sync, deployment, 3), 60, "all brokers have caught up")
            assert it.service.stop() == 0, it.service.said()
        finally:
            it.service.close()
        assert it.longest_s < LONGEST_S
        assert equals_a_run_without_faults(it) == it.filled
        print(f"{delivery}: restarts {it.restarts}, {it.filled} records, longest {it.longest_s:.1f} s: equal")

    @pytest.mark.parametrize(
        ("meanwhile", "checkpoint_every", "told"),
        [
            ("runs", 200, CUT_BACK),
            pytest.param("stopped", 200, CUT_BACK, marks=pytest.mark.soak),
            pytest.param("killed", 100_000, r"step \d+ gives another output now", marks=pytest.mark.soak),
        ],
    )
    def test_records_that_an_election_took_back_after_they_were_learnt_are_never_relearnt_in_silence(
        self, serve: Callable[[int], tuple[Service, Input]], meanwhile: str, checkpoint_every: int, told: str
    ) -> None:
        """The log grows past the old position at once, so offsets alone say nothing."""
        service, input_ = serve(checkpoint_every)
        input_.append(500)
        service.start()
        service.wait_ready()
        service.wait_committed(500, 60)
        input_.lose_the_follower()
        input_.append(300)
        service.wait_committed(800, 60)
        if meanwhile == "stopped":
            assert service.stop() == 0
        elif meanwhile == "killed":
            service.kill()
        input_.elect_the_follower()
        input_.append(600)

        for start in (False,) if meanwhile == "runs" else (True, True):
            if start:
                service.start()
            assert service.wait(120) == 65, service.said()
            assert re.search(told, service.complaint())
        assert published(service) == {0: list(range(800))}

        (step,) = re.findall(r"`streamlstm checkpoint revert (\d+)`", service.complaint())
        input_.mend()
        assert main(["checkpoint", "revert", step, "-c", str(service.file)]) == 0
        service.start()
        service.wait_ready()
        service.wait_consumed(60)
        assert service.stop() == 0
        seen = published(service)
        assert seen[0] == list(range(800))
        assert seen[1] == list(range(seen[1][0], 1100))
        assert seen[1][0] <= 500
