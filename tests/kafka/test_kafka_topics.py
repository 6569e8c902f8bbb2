"""Topics: made, checked, refused."""

import json
from collections.abc import Callable

import pytest
import yaml
from broker import Cluster
from deployment import Deployment
from kafka.admin import ConfigResource, ConfigResourceType

from streamlstm.cli.main import main
from streamlstm.errors import ConfigError
from streamlstm.transport.kafka.topics import check_topics, create_topics


@pytest.fixture
def bare(deploy: Callable[..., Deployment], cluster: Cluster) -> Deployment:
    """A deployment whose topics are not made."""
    return deploy(cluster)


def config_file(deployment: Deployment) -> str:
    path = deployment.directory / "config.yaml"
    path.write_text(yaml.safe_dump(deployment.config.model_dump(mode="json", exclude_unset=True)))
    return str(path)


def settings(deployment: Deployment, topic: str) -> dict[str, str]:
    with deployment.admin() as admin:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all")
    return {key: entry["value"] for key, entry in found["topic"][topic].items()}


def test_the_topics_of_a_deployment_have_the_settings_they_need(bare: Deployment) -> None:
    bare.make_topic(bare.input, 3)
    made = create_topics(bare.config)
    assert [(m.plan.role, m.plan.partitions, m.outcome) for m in made] == [
        ("forecasts", 3, "created"),
        ("dead letters", 3, "created"),
        ("progress", 1, "created"),
    ]
    progress = settings(bare, bare.config.progress_topic)
    assert (progress["cleanup.policy"], progress["retention.ms"], progress["retention.bytes"]) == ("delete", "-1", "-1")
    assert settings(bare, bare.config.forecast_topic)["message.timestamp.type"] == "CreateTime"
    room = int(settings(bare, bare.config.dead_letter_topic)["max.message.bytes"])
    assert room > int(settings(bare, bare.input)["max.message.bytes"])


def test_making_them_twice_changes_nothing_and_says_so(bare: Deployment) -> None:
    bare.make_topic(bare.input, 2)
    create_topics(bare.config)
    assert {m.outcome for m in create_topics(bare.config)} == {"exists"}
    assert all(not m.differs for m in create_topics(bare.config))


def test_what_is_there_and_differs_is_said_and_left_alone(bare: Deployment) -> None:
    bare.make_topic(bare.input, 2)
    bare.make_topic(bare.config.progress_topic, 2, retention_ms="1000")
    made = {m.plan.role: m for m in create_topics(bare.config)}
    assert made["progress"].outcome == "exists"
    assert "2 partitions instead of 1" in made["progress"].differs
    assert "retention.ms=1000 instead of -1" in made["progress"].differs


def test_a_dry_run_makes_nothing(bare: Deployment) -> None:
    bare.make_topic(bare.input, 2)
    assert {m.outcome for m in create_topics(bare.config, dry_run=True)} == {"would be created"}
    assert {m.outcome for m in create_topics(bare.config, dry_run=True)} == {"would be created"}


def test_more_copies_than_brokers_are_refused_with_the_brokers_reason(bare: Deployment) -> None:
    bare.make_topic(bare.input, 1)
    with pytest.raises(ConfigError, match=rf"refuses to create {bare.config.forecast_topic}: InvalidReplication"):
        create_topics(bare.config, replicas=7)


def test_missing_topics_are_named_with_what_to_do_next(bare: Deployment) -> None:
    with pytest.raises(ConfigError) as raised:
        check_topics(bare.config)
    message = str(raised.value)
    assert f"{bare.input}: no such topic" in message
    assert "streamlstm produce" in message
    assert bare.config.progress_topic in message
    assert "streamlstm topics create -c FILE" in message


def test_good_topics_give_warnings_about_one_replica_only(deployment: Deployment) -> None:
    warnings = check_topics(deployment.config)
    assert [w for w in warnings if "has one replica" not in w and "retention.ms" not in w] == []
    assert any(deployment.config.progress_topic in w for w in warnings)


def test_a_progress_topic_with_two_partitions_is_refused(bare: Deployment) -> None:
    bare.make_topic(bare.input, 1)
    bare.make_topic(bare.config.progress_topic, 2)
    create_topics(bare.config)
    with pytest.raises(ConfigError, match="has 2 partitions and needs 1"):
        check_topics(bare.config)


def test_a_compacted_progress_topic_is_refused(bare: Deployment) -> None:
    bare.make_topic(bare.input, 1)
    bare.make_topic(bare.config.progress_topic, 1, cleanup_policy="compact")
    create_topics(bare.config)
    with pytest.raises(ConfigError, match=r"cleanup\.policy=compact"):
        check_topics(bare.config)


def test_limits_that_bite_later_are_told_at_once(bare: Deployment) -> None:
    bare.make_topic(bare.input, 1, max_message_bytes="5000000", cleanup_policy="compact", retention_ms="-1")
    bare.make_topic(bare.config.progress_topic, 1, retention_ms="86400000")
    bare.make_topic(bare.config.dead_letter_topic, 1)
    create_topics(bare.config)
    said = "\n".join(check_topics(bare.config))
    assert f"{bare.config.progress_topic} has retention.ms=86400000" in said
    assert f"{bare.config.dead_letter_topic} has max.message.bytes" in said
    assert f"{bare.input} is compacted" in said
    assert "are deleted as soon as they are made" in said


def test_a_topic_that_an_election_may_cut_back_is_told(bare: Deployment) -> None:
    progress, forecasts = bare.config.progress_topic, bare.config.forecast_topic
    for topic, value in ((bare.input, "true"), (progress, "true"), (forecasts, "false")):
        bare.make_topic(topic, 1, unclean_leader_election_enable=value)
    create_topics(bare.config)
    said = [w.partition(":")[0] for w in check_topics(bare.config) if "unclean" in w]
    assert sorted(said) == sorted(f"{t} has unclean.leader.election.enable=true" for t in (bare.input, progress))


def test_a_topic_of_ours_that_refuses_times_the_input_accepts_is_told(bare: Deployment) -> None:
    bare.make_topic(bare.input, 1, message_timestamp_after_max_ms="7200000")
    bare.make_topic(bare.config.forecast_topic, 1, message_timestamp_after_max_ms="3600000")
    bare.make_topic(bare.config.dead_letter_topic, 1, message_timestamp_before_max_ms="1000")
    create_topics(bare.config)
    said = "\n".join(check_topics(bare.config))
    assert f"{bare.config.forecast_topic} has message.timestamp.after.max.ms=3600000 and {bare.input} 7200000" in said
    assert f"{bare.config.dead_letter_topic} has message.timestamp.before.max.ms=1000" in said
    assert f"{bare.config.forecast_topic} has message.timestamp.before" not in said


def test_topics_create_prints_a_line_for_each(bare: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    bare.make_topic(bare.input, 2)
    assert main(["topics", "create", "-c", config_file(bare), "--partitions", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["created", bare.config.forecast_topic],
        ["created", bare.config.dead_letter_topic],
        ["created", bare.config.progress_topic],
    ]
    assert lines[0].endswith("partitions: 4")


def test_topics_create_speaks_json(bare: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    bare.make_topic(bare.input, 2)
    assert main(["topics", "create", "-c", config_file(bare), "--dry-run", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [m["outcome"] for m in made] == ["would be created"] * 3


def test_topics_create_without_the_input_ends_with_78(bare: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "create", "-c", config_file(bare)]) == 78
    assert f"{bare.input}: no such topic" in capsys.readouterr().err
