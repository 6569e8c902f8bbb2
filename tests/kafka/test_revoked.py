"""Rights and credentials taken away in mid-run: the service ends with 77, says what it lacks, and goes on with it."""

import re
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from broker import Cluster
from deployment import Deployment, coordinates, fill
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)
from service import Service, wait_for

USER, PASSWORD = "bob", "bob-secret"
READ, WRITE, DELETE = ACLOperation.READ, ACLOperation.WRITE, ACLOperation.DELETE

Right = tuple[ResourceType, str, ACLOperation]


class Guarded:
    """A deployment whose service is a user with rights, and the hands that give and take them."""

    def __init__(self, deployment: Deployment, directory: Path) -> None:
        listener = deployment.cluster.secure
        assert listener is not None
        self.deployment = deployment
        secret = directory / "password"
        secret.write_text(PASSWORD)
        self.know_user()
        config = deployment.config
        ours = (config.forecast_topic, config.dead_letter_topic, config.progress_topic)
        self.grant(
            *((ResourceType.TOPIC, topic, WRITE) for topic in ours),
            *((ResourceType.TOPIC, topic, READ) for topic in (deployment.input, config.progress_topic)),
            (ResourceType.TOPIC, config.progress_topic, DELETE),
            (ResourceType.TRANSACTIONAL_ID, f"{config.name}-0", WRITE),
            (ResourceType.GROUP, config.name, READ),
        )
        self.service = Service(
            deployment,
            directory,
            source={
                "bootstrap_servers": [listener.bootstrap],
                "topics": [deployment.input],
                "security": {
                    "protocol": "SASL_SSL",
                    "sasl_mechanism": "SCRAM-SHA-512",
                    "username": USER,
                    "password_file": str(secret),
                    "ca_file": listener.ca,
                },
            },
            runtime={"deadline": "6s"},
        )
        self.records = 0

    def append(self, records: int) -> None:
        fill(self.deployment, records, first=self.records)
        self.records += records

    def know_user(self) -> None:
        self._credentials(UserScramCredentialUpsertion(USER, ScramMechanism.SCRAM_SHA_512, PASSWORD))

    def forget_user(self) -> None:
        self._credentials(UserScramCredentialDeletion(USER, ScramMechanism.SCRAM_SHA_512))

    def grant(self, *rights: Right) -> None:
        with self.deployment.admin() as admin:
            acls = [
                ACL(f"User:{USER}", "*", operation, ACLPermissionType.ALLOW, ResourcePattern(kind, name))
                for kind, name, operation in rights
            ]
            assert admin.create_acls(acls)["failed"] == []

    def revoke(self, kind: ResourceType, name: str, operation: ACLOperation) -> None:
        wanted = ResourcePatternFilter(kind, name, ACLResourcePatternType.LITERAL)
        with self.deployment.admin() as admin:
            found = admin.delete_acls([ACLFilter(f"User:{USER}", "*", operation, ACLPermissionType.ALLOW, wanted)])
            assert len(found[0][1]) == 1

    def _credentials(self, alteration: object) -> None:
        with self.deployment.admin() as admin:
            assert admin.alter_user_scram_credentials([alteration]) == {USER: None}


@pytest.fixture
def guarded(
    deploy: Callable[..., Deployment], guarded_cluster: Cluster, tmp_path: Path
) -> Generator[Guarded, None, None]:
    guarded = Guarded(deploy(guarded_cluster).with_topics(), tmp_path)
    yield guarded
    guarded.service.close()


def lives_on(guarded: Guarded, records: int) -> None:
    """A start that is well, and some more input."""
    guarded.service.start()
    guarded.service.wait_ready()
    guarded.append(records)
    guarded.service.wait_committed(guarded.records, 120)


def each_once(guarded: Guarded) -> None:
    assert guarded.service.stop() == 0
    published = coordinates(guarded.deployment)
    assert len(published) == len(set(published)) == guarded.records


INPUT, FORECASTS, PROGRESS, TRANSACTIONS = "input", "forecasts", "progress", "transactions"


@pytest.mark.parametrize(
    "taken",
    [[FORECASTS, TRANSACTIONS], pytest.param([INPUT, PROGRESS], marks=pytest.mark.soak)],
    ids="-".join,
)
def test_a_right_that_is_revoked_ends_in_77_by_name_and_once_it_is_back_nothing_is_missing(
    guarded: Guarded, taken: list[str]
) -> None:
    config = guarded.deployment.config
    topics = {
        INPUT: (guarded.deployment.input, READ),
        FORECASTS: (config.forecast_topic, WRITE),
        PROGRESS: (config.progress_topic, WRITE),
    }
    for what in taken:
        if what == TRANSACTIONS:
            right = (ResourceType.TRANSACTIONAL_ID, f"{config.name}-0", WRITE)
            told = "grant our user WRITE on the transactional id"
        else:
            topic, operation = topics[what]
            right = (ResourceType.TOPIC, topic, operation)
            told = f"refuses us a topic .*grant .*'{topic}'"
        lives_on(guarded, 200)
        guarded.revoke(*right)
        guarded.append(200)
        assert guarded.service.wait(120) == 77
        assert re.search(told, guarded.service.complaint())
        guarded.grant(right)
    lives_on(guarded, 200)
    each_once(guarded)


@pytest.mark.soak
def test_without_the_right_to_its_group_it_goes_on_and_says_so_once(guarded: Guarded) -> None:
    guarded.revoke(ResourceType.GROUP, guarded.deployment.name, READ)
    lives_on(guarded, 200)
    wait_for(lambda: "offsets for lag tools not committed" in guarded.service.said(), 30, "it is said")
    assert guarded.service.said().count("offsets for lag tools not committed") == 1
    each_once(guarded)


@pytest.mark.soak
def test_credentials_that_are_revoked_end_in_77_and_once_they_are_back_nothing_is_missing(guarded: Guarded) -> None:
    lives_on(guarded, 200)
    guarded.forget_user()
    guarded.append(200)
    assert guarded.service.wait(120) == 77, guarded.service.said()
    assert re.search(f"refuses (user {USER}|our credentials)", guarded.service.complaint())
    guarded.service.start()
    assert guarded.service.wait(120) == 77, "a supervisor that starts it all the same changes nothing"
    assert f"refuses user {USER} by SCRAM-SHA-512: wrong name or password" in guarded.service.complaint()
    guarded.know_user()
    lives_on(guarded, 200)
    each_once(guarded)
