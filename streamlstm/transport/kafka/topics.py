"""
Topics: what they are, whether they will do, and making those that are ours.

Ours are three: forecasts, dead letters, and progress, whose one partition per shard is the chain of committed steps;
without transactions that chain is on the disk, and there are two.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import TopicPartition

from streamlstm.config.model import Config, Source
from streamlstm.errors import ConfigError, NotAuthorised
from streamlstm.transport.kafka.clients import Admin, admin, close_consumer, open_consumer
from streamlstm.transport.kafka.explain import explain, explained

SHARDS = 1
"""Progress has one partition per shard."""

_OFFSETS_TIMEOUT_MS = 10_000
_FOR_EVER = "-1"
_ANY_TIME = str((1 << 63) - 1)
_HEADROOM = 64 << 10
"""What the headers of a dead letter may add to a message that just fitted."""


@dataclass(frozen=True, slots=True)
class Topic:
    """
    A topic as the broker describes it. ``settings`` is ``None`` when we may not read them.

    ``replicas`` is the smallest number of replicas any of its partitions has.
    """

    name: str
    id: str
    partitions: tuple[int, ...]
    replicas: int
    settings: Mapping[str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A topic to make, and with which settings; ``role`` says what it is for."""

    name: str
    role: Literal["forecasts", "dead letters", "progress", "input"]
    partitions: int
    replicas: int
    settings: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a plan. ``exists``: it was there, and was left as it is; ``differs`` says in what."""

    plan: Plan
    outcome: Literal["exists", "created", "would be created"]
    differs: tuple[str, ...] = ()


def describe(client: Admin, names: Iterable[str], *, settings: bool = False) -> dict[str, Topic | None]:
    """
    The named topics, ``None`` for one that does not exist. Names are never created by asking for them.

    Raises :class:`~streamlstm.errors.NotAuthorised` for a topic we may not see.
    """
    wanted = list(dict.fromkeys(names))
    with explained("describing topics"):
        found: dict[str, dict[str, Any]] = {t["name"]: t for t in client.describe_topics(wanted)}
        values = _settings(client, wanted) if settings else {}
    return {name: _topic(name, found.get(name), values.get(name)) for name in wanted}


def _topic(name: str, found: Mapping[str, Any] | None, settings: Mapping[str, str | None] | None) -> Topic | None:
    if found is None:
        return None
    kind = kafka_errors.for_code(found["error_code"])
    if kind is kafka_errors.InvalidTopicError:
        raise ConfigError(f"{name!r} is no valid name for a topic")
    if kind is kafka_errors.UnknownTopicOrPartitionError:
        return None
    if kind not in (kafka_errors.NoError, kafka_errors.LeaderNotAvailableError):
        raise explain(kind(name), f"describing topic {name}")
    return Topic(
        name=name,
        id=str(found["topic_id"] or ""),
        partitions=tuple(sorted(p["partition_index"] for p in found["partitions"])),
        replicas=min((len(p["replica_nodes"]) for p in found["partitions"]), default=0),
        settings=settings,
    )


def _settings(client: Admin, names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """What may be read of each topic's settings; reading them is a right of its own that we can do without."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    try:
        described: dict[str, dict[str, Any]] = client.describe_configs(resources, config_filter="all")["topic"]
    except (kafka_errors.AuthorizationError, kafka_errors.UnsupportedVersionError):
        return {}
    return {name: {key: entry["value"] for key, entry in described[name].items()} for name in names if described[name]}


def count_held(config: Config, topic: str) -> int:
    """How many offsets a topic holds, in all partitions together."""
    consumer = open_consumer(config)
    try:
        with explained(f"asking what {topic} holds"):
            places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
            first, end = (
                ask(places, timeout_ms=_OFFSETS_TIMEOUT_MS)
                for ask in (consumer.beginning_offsets, consumer.end_offsets)
            )
    finally:
        close_consumer(consumer)
    return sum(end[place] - first[place] for place in places)


def no_such_topic(source: Source, topic: str) -> ConfigError:
    """The one line about a topic to read or fill, and what to do next."""
    return ConfigError(
        f"{topic}: no such topic at {', '.join(source.bootstrap_servers)}; check the name, or make it and fill it with "
        f"`streamlstm produce --to {topic} --create-topic --from FILE`"
    )


def missing(config: Config, topics: Iterable[str]) -> ConfigError:
    """The same about several, of which some may be ours."""
    wanted = sorted(topics)
    parts = [str(no_such_topic(config.source, topic)) for topic in wanted if topic in config.source.topics]
    if ours := [topic for topic in wanted if topic not in config.source.topics]:
        parts.append(f"{', '.join(ours)}: no such topic; make it with `streamlstm topics create -c FILE`")
    return ConfigError("; ".join(parts))


def check_topics(config: Config) -> list[str]:
    """
    Whether the topics will do, before anything is consumed or fenced. Returns what an operator should know.

    Refused (:class:`~streamlstm.errors.ConfigError`): a topic that is missing; a progress topic with another number
    of partitions than shards, or compacted, for it is a chain and not a table.
    """
    with admin(config.source) as client:
        found = describe(client, [*config.source.topics, *_ours(config)], settings=True)
    there = {name: topic for name, topic in found.items() if topic is not None}
    if len(there) < len(found):
        raise missing(config, found.keys() - there.keys())
    forecasts, dead_letters, *chain = (there[name] for name in _ours(config))
    for progress in chain:
        _refuse_progress(progress)
    warnings = [w for topic in (*chain, forecasts) for w in _durability(topic)]
    warnings += [w for topic in there.values() for w in _unclean(topic)]
    warnings += [w for progress in chain for w in _progress_retention(progress)]
    inputs = [there[name] for name in config.source.topics]
    warnings += [w for topic in inputs for w in _input_warnings(topic)]
    warnings += _room_for_dead_letters(dead_letters, inputs)
    warnings += [w for topic in inputs for w in _kept_too_short(forecasts, topic)]
    warnings += [w for ours in (forecasts, dead_letters) for topic in inputs for w in _narrower_times(ours, topic)]
    return warnings


def check_readable(config: Config) -> None:
    """
    Whether the input and the chain are there to be read; else :class:`~streamlstm.errors.ConfigError`, as at a start.

    A consumer would wait for a topic that does not exist.
    """
    chain = (config.progress_topic,) if config.sink.delivery == "exactly_once" else ()
    with admin(config.source) as client:
        found = describe(client, [*config.source.topics, *chain])
    if absent := [name for name, topic in found.items() if topic is None]:
        raise missing(config, absent)


def _ours(config: Config) -> tuple[str, ...]:
    """Forecasts, dead letters, and progress where it is kept in a topic."""
    outputs = config.forecast_topic, config.dead_letter_topic
    return (*outputs, config.progress_topic) if config.sink.delivery == "exactly_once" else outputs


def _refuse_progress(topic: Topic) -> None:
    if len(topic.partitions) != SHARDS:
        raise ConfigError(
            f"sink.progress.topic: {topic.name} has {len(topic.partitions)} partitions and needs {SHARDS}, one per "
            "shard; make it with `streamlstm topics create -c FILE`"
        )
    policy = (topic.settings or {}).get("cleanup.policy") or "delete"
    if "compact" in policy:
        raise ConfigError(
            f"sink.progress.topic: {topic.name} has cleanup.policy={policy}: compaction would tear the chain of "
            "steps; set it to delete"
        )


def _durability(topic: Topic) -> list[str]:
    in_sync = int((topic.settings or {}).get("min.insync.replicas") or 1)
    if topic.replicas < 2:
        return [f"{topic.name} has one replica: what is committed is lost with its disk"]
    if in_sync < 2:
        return [f"{topic.name} has min.insync.replicas={in_sync}: a commit may be lost with one broker; set it to 2"]
    if in_sync >= topic.replicas:
        return [f"{topic.name} has min.insync.replicas={in_sync} of {topic.replicas}: it stalls without any one broker"]
    return []


def _unclean(topic: Topic) -> list[str]:
    key = "unclean.leader.election.enable"
    if (topic.settings or {}).get(key) == "true":
        return [f"{topic.name} has {key}=true: an election may take back what was learnt or committed; set it to false"]
    return []


def _progress_retention(topic: Topic) -> list[str]:
    if topic.settings is None:
        return [f"{topic.name}: its settings may not be read, so its retention is not known to be unlimited"]
    return [
        f"{topic.name} has {key}={value}: steps needed to resume may be deleted; set it to -1"
        for key in ("retention.ms", "retention.bytes")
        if (value := topic.settings.get(key)) not in (None, _FOR_EVER)
    ]


def _input_warnings(topic: Topic) -> list[str]:
    policy = (topic.settings or {}).get("cleanup.policy") or "delete"
    if "compact" in policy:
        return [f"{topic.name} is compacted: recorded steps whose records are gone cannot be replayed to the same bits"]
    return []


def _kept_too_short(forecasts: Topic, topic: Topic) -> list[str]:
    """A forecast has its record's timestamp, so retention may delete it as soon as it is made."""
    kept_ms, input_ms = ((t.settings or {}).get("retention.ms") for t in (forecasts, topic))
    if kept_ms is None or input_ms is None or kept_ms == _FOR_EVER:
        return []
    if input_ms == _FOR_EVER or int(input_ms) > int(kept_ms):
        shorter = f"{forecasts.name} has retention.ms={kept_ms} and {topic.name} {input_ms}"
        return [f"{shorter}: forecasts of its older records are deleted as soon as they are made"]
    return []


def _narrower_times(ours: Topic, topic: Topic) -> list[str]:
    """What goes out has its record's timestamp, so a topic of ours must accept what the input accepted."""
    out, into = ours.settings or {}, topic.settings or {}
    if out.get("message.timestamp.type") == "LogAppendTime":
        return []
    return [
        f"{ours.name} has {key}={allowed} and {topic.name} {given}: a record outside it stops the stream; widen it"
        for key in ("message.timestamp.before.max.ms", "message.timestamp.after.max.ms")
        if (allowed := out.get(key)) is not None and (given := into.get(key)) is not None and int(allowed) < int(given)
    ]


def _room_for_dead_letters(dead_letters: Topic, inputs: Sequence[Topic]) -> list[str]:
    room = int((dead_letters.settings or {}).get("max.message.bytes") or 0)
    largest = max((int((t.settings or {}).get("max.message.bytes") or 0) for t in inputs), default=0)
    if room and largest and room < largest + _HEADROOM:
        fix = f"set it to {largest + _HEADROOM}, or a large dead letter stops the stream"
        return [f"{dead_letters.name} has max.message.bytes={room} and the inputs {largest}: {fix}"]
    return []


def plan_topics(config: Config, inputs: Sequence[Topic], partitions: int | None, replicas: int | None) -> list[Plan]:
    """
    The topics of a deployment, with the settings they need. ``None`` = as many partitions as the widest input;
    the broker's own replication factor.

    Timestamps of forecasts and dead letters are those of their inputs, however old or far ahead.
    """
    forecasts, dead_letters, *chain = _ours(config)
    wide = partitions or max((len(t.partitions) for t in inputs), default=1)
    copies = replicas or -1
    times = {
        "message.timestamp.type": "CreateTime",
        "message.timestamp.before.max.ms": _ANY_TIME,
        "message.timestamp.after.max.ms": _ANY_TIME,
    }
    largest = max((int((t.settings or {}).get("max.message.bytes") or 1_048_588) for t in inputs), default=1_048_588)
    kept = {"cleanup.policy": "delete", "retention.ms": _FOR_EVER, "retention.bytes": _FOR_EVER}
    return [
        Plan(forecasts, "forecasts", wide, copies, times),
        Plan(dead_letters, "dead letters", wide, copies, {**times, "max.message.bytes": str(largest + _HEADROOM)}),
        *(Plan(progress, "progress", SHARDS, copies, kept) for progress in chain),
    ]


def create_topics(
    config: Config, *, dry_run: bool = False, partitions: int | None = None, replicas: int | None = None
) -> list[Made]:
    """
    Make the topics of a deployment that are not there yet, and say in what the others differ. Run it as often as you
    like. With ``dry_run`` the broker only checks.
    """
    with admin(config.source) as client:
        inputs = describe(client, config.source.topics, settings=True)
        there = [topic for topic in inputs.values() if topic is not None]
        if len(there) < len(inputs) and partitions is None:
            raise missing(config, (name for name, topic in inputs.items() if topic is None))
        return ensure(client, plan_topics(config, there, partitions, replicas), dry_run=dry_run)


def ensure(client: Admin, plans: Sequence[Plan], *, dry_run: bool = False) -> list[Made]:
    """Make what is planned and not there. Made means: has a leader for every partition."""
    found = describe(client, [p.name for p in plans], settings=True)
    made: list[Made] = []
    for plan in plans:
        existing = found[plan.name]
        if existing is not None:
            made.append(Made(plan, "exists", tuple(_differences(plan, existing))))
            continue
        request = {
            plan.name: {
                "num_partitions": plan.partitions,
                "replication_factor": plan.replicas,
                "configs": dict(plan.settings),
            }
        }
        try:
            client.create_topics(request, validate_only=dry_run)
        except kafka_errors.AuthorizationError as error:
            raise NotAuthorised(
                f"we may not create {plan.name}: it needs CREATE on the topic or the cluster"
            ) from error
        except (
            kafka_errors.InvalidReplicationFactorError,
            kafka_errors.InvalidPartitionsError,
            kafka_errors.InvalidConfigurationError,
            kafka_errors.InvalidTopicError,
            kafka_errors.PolicyViolationError,
        ) as error:
            reason = error.args[0] if error.args else ""
            raise ConfigError(f"the broker refuses to create {plan.name}: {type(error).__name__}: {reason}") from error
        except kafka_errors.KafkaError as error:
            raise explain(error, f"creating {plan.name}") from error
        made.append(Made(plan, "would be created" if dry_run else "created"))
    created = [m.plan.name for m in made if m.outcome == "created"]
    with explained(f"waiting for {', '.join(created)}"):
        client.wait_for_topics(created)
    return made


def _differences(plan: Plan, topic: Topic) -> Iterable[str]:
    if len(topic.partitions) != plan.partitions:
        yield f"{len(topic.partitions)} partitions instead of {plan.partitions}"
    for key, value in plan.settings.items():
        actual = (topic.settings or {}).get(key)
        if topic.settings is not None and actual != value:
            yield f"{key}={actual} instead of {value}"
