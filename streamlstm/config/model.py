"""
The configuration as pydantic sections: every key with its type, default, meaning and class.

A key's class says what may become of a change to it:

- *identity*: decode, series, model shape. A change is refused, or starts afresh with ``--fresh``.
- *learning*: rates, k1, k2. Taken over from a clean stop only, and recorded in progress.
- *free*: polls, commits, checkpoints, HTTP, logging. Not part of the hash.

Frozen: a configuration is a value. Strict: text is no number, and a number no text. What one key must be stands at
the key; what keys must agree on stands in :func:`_conflicts`, so that all of it can be told at once.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from streamlstm.config.urls import split_object_url

_Quantity = TypeVar("_Quantity", int, float)

KeyClass = Literal["identity", "learning", "free"]

_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SHORTEST_S, _LONGEST_S = 1e-6, 3650 * 86_400.0  # in ns, both are far inside 64 bits
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 1000, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True)
class Means:
    """What a type is, in words, for messages and the reference; one of a list, and several of them."""

    one: str
    many: str = ""


def _parse_duration(value: object) -> object:
    """Seconds. Plain numbers are refused: nobody remembers the unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip()) if isinstance(value, str) else None
    if match and _SHORTEST_S <= (seconds := float(match[1]) * _MILLISECONDS[match[2]] / 1000) <= _LONGEST_S:
        return seconds
    raise ValueError("write a duration, a number with its unit, from 0.001ms to 3650d: 200ms, 10s, 5m, 1h or 7d")


def format_duration(seconds: float) -> str:
    """
    The shortest text that is read back as the same duration.

    >>> format_duration(0.2), format_duration(90.0), format_duration(3600.0), format_duration(0.0005)
    ('200ms', '90s', '1h', '0.5ms')
    """
    milliseconds = round(seconds * 1000, 6)
    for unit in ("d", "h", "m", "s"):
        if milliseconds % _MILLISECONDS[unit] == 0:
            return f"{milliseconds // _MILLISECONDS[unit]:.0f}{unit}"
    return f"{milliseconds:.6f}".rstrip("0").rstrip(".") + "ms"


def _parse_size(value: object) -> object:
    """Bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if (
        isinstance(value, str)
        and (match := re.fullmatch(r"(\d+)\s*(B|[KMG]iB|[kMG]B)", value.strip()))
        and int(match[1]) > 0
    ):
        return int(match[1]) * _BYTES[match[2]]
    raise ValueError("write a number of bytes above zero, with a unit if you like: 64KiB, 1MiB")


def format_size(size: int) -> int | str:
    """
    The largest binary unit that divides it.

    >>> format_size(1 << 20), format_size(1000)
    ('1MiB', 1000)
    """
    for unit in ("GiB", "MiB", "KiB"):
        if size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return size


def _between(
    least: _Quantity, most: _Quantity, text: Callable[[_Quantity], object]
) -> Callable[[_Quantity], _Quantity]:
    """What refuses a quantity outside of these, told in its own unit."""

    def check(value: _Quantity) -> _Quantity:
        if least <= value <= most:
            return value
        raise ValueError(f"write {text(least)} to {text(most)}")

    return check


def _parse_interval(value: object) -> object:
    if value is None or value == "auto":
        return value
    try:
        return _parse_duration(value)
    except ValueError:
        raise ValueError("write auto, null, or a duration with its unit: 10s, 5m, 1h") from None


def _format_interval(value: float | str | None) -> str | None:
    return value if value is None or isinstance(value, str) else format_duration(value)


def _known_start(value: str) -> str:
    if value in ("earliest", "latest"):
        return value
    try:
        moment = datetime.fromisoformat(value.removeprefix("timestamp:"))
    except ValueError:
        moment = None
    if value.startswith("timestamp:") and moment and moment.tzinfo:
        return value
    raise ValueError("write earliest, latest or timestamp:2026-01-01T00:00:00Z (ISO 8601 with its zone)")


def _topic_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,249}", value) and value not in (".", ".."):
        return value
    raise ValueError("write a topic name: 1 to 249 letters, digits, dots, dashes and underscores")


def split_address(value: str) -> tuple[str, int]:
    """
    Host and port.

    >>> split_address("[::1]:9108")
    ('::1', 9108)
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/@\[\]]+):(\d{1,5})", value)
    if not match or int(match[2]) > 65535:
        raise ValueError("write host:port with a port up to 65535, as localhost:9092 or [::1]:9092")
    return match[1].strip("[]"), int(match[2])


def _server(value: str) -> str:
    if split_address(value)[1] == 0:
        raise ValueError("write host:port, and not port 0")
    return value


def _listen(value: str) -> str:
    split_address(value)
    return value


def _path(value: str) -> str:
    """Only what a path begins with; decoding compiles the rest, and knows whether there are columns or depth."""
    if value == "$" or (value.startswith(("$.", "@.", "$[", "@[")) and len(value) > 2):
        return value
    raise ValueError(f"write a path from the message's root: $.{value.lstrip('$@.[') or 'name'}")


def _series_part(value: str) -> str:
    if value in ("@key", "@field", "@topic", "@partition") or (value.startswith("@header.") and len(value) > 8):
        return value
    if value.startswith("@") and not value.startswith(("@.", "@[")):
        raise ValueError("write a path ($.host), @key, @field, @topic, @partition or @header.NAME")
    return _path(value)


def _time_unit(value: str) -> str:
    if value in ("auto", "s", "ms", "us", "ns", "iso8601"):
        return value
    sample = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
    try:
        readable = "%" in value and datetime.strptime(sample.strftime(value), value).year == sample.year  # noqa: DTZ007, because only the year counts
    except ValueError:
        readable = False
    if not readable:
        raise ValueError("write auto, s, ms, us, ns, iso8601, or a strptime pattern with a year: %Y-%m-%d %H:%M")
    return value


def _store_url(value: str) -> str:
    if not value.strip():
        raise ValueError("write a local directory, s3://bucket/prefix or gs://bucket/prefix")
    split_object_url(value)
    return value


_CLIENT = "the transport decides this itself, because correctness hangs on it: take it out"
_SECURITY = "this belongs under source.security"
_NOT_PROPERTIES = {
    **dict.fromkeys(
        (
            "acks", "allow_auto_create_topics", "auto_commit_interval_ms", "auto_offset_reset", "check_crcs",
            "consumer_timeout_ms", "enable_auto_commit", "enable_idempotence", "group_id", "group_instance_id",
            "isolation_level", "kafka_client", "key_deserializer", "key_serializer",
            "max_in_flight_requests_per_connection", "partition_assignment_strategy", "partitioner", "retries",
            "transactional_id", "value_deserializer", "value_serializer",
        ),
        _CLIENT,
    ),
    **dict.fromkeys(
        ("sasl_mechanism", "sasl_plain_username", "security_protocol", "ssl_cafile", "ssl_certfile", "ssl_keyfile"),
        _SECURITY,
    ),
    **dict.fromkeys(("ssl_check_hostname", "ssl_context"), "the broker's name is always checked: take it out"),
    "bootstrap_servers": "write source.bootstrap_servers instead",
    "max_poll_records": "write source.poll.max_records instead",
}  # fmt: skip


def _property_name(name: str) -> str:
    """A client setting that may be set; whether the client knows it, the transport finds out."""
    if re.search("password|secret|token", name, re.IGNORECASE):
        raise ValueError("secrets come from files only: source.security.password_file")
    plain = name.replace(".", "_").replace("-", "_").lower()
    if plain in _NOT_PROPERTIES:
        raise ValueError(_NOT_PROPERTIES[plain])
    if plain != name:
        raise ValueError(f"kafka-python writes it {plain}")
    return name


Duration = Annotated[
    float,
    BeforeValidator(_parse_duration),
    PlainSerializer(format_duration, when_used="json"),
    Means("a duration such as 200ms, 10s, 5m, 1h or 7d"),
]
Size = Annotated[
    int,
    BeforeValidator(_parse_size),
    PlainSerializer(format_size, when_used="json"),
    Means("a number of bytes, or a size such as 64KiB or 1MiB"),
]
MessageSize = Annotated[Size, AfterValidator(_between(1, 64 << 20, format_size))]
BatchSize = Annotated[Size, AfterValidator(_between(1 << 20, 1 << 30, format_size))]
KeySize = Annotated[Size, AfterValidator(_between(16, 64 << 10, format_size))]
Patience = Annotated[Duration, AfterValidator(_between(1.0, _LONGEST_S, format_duration))]
Interval = Annotated[
    float | Literal["auto"] | None,
    BeforeValidator(_parse_interval),
    PlainSerializer(_format_interval, when_used="json"),
    Means("auto, a duration such as 10s or 1h, or null"),
]
Start = Annotated[str, AfterValidator(_known_start), Means("earliest, latest or timestamp:2026-01-01T00:00:00Z")]
Topic = Annotated[str, AfterValidator(_topic_name), Means("a topic name", "topic names")]
Server = Annotated[str, AfterValidator(_server), Means("host:port", "host:port")]
Listen = Annotated[str, AfterValidator(_listen), Means("host:port")]
Path = Annotated[str, AfterValidator(_path), Means("a path such as $.value", "paths such as $.value")]
SeriesPart = Annotated[
    str, AfterValidator(_series_part), Means("a path or an @name", "paths such as $.host or names such as @key")
]
TimeUnit = Annotated[
    str, AfterValidator(_time_unit), Means("auto, s, ms, us, ns, iso8601, or a strptime pattern such as %Y-%m-%d %H:%M")
]
StoreUrl = Annotated[
    str, AfterValidator(_store_url), Means("a local directory, s3://bucket/prefix or gs://bucket/prefix")
]
PropertyName = Annotated[str, AfterValidator(_property_name), Means("a setting of the Kafka client", "client settings")]
Setting = Annotated[str | int | float | bool, Means("text, a number, true or false", "text, numbers, true or false")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), Means("auto, cpu, cuda or cuda:N")]
Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
    Means("a name of 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or digit"),
]
Character = Annotated[str, Field(min_length=1, max_length=1), Means("a single character")]


def key(default: Any, klass: KeyClass, **constraints: Any) -> Any:  # noqa: ANN401, because it stands for any field
    """A field with its class, which the reference prints and the hash obeys."""
    return Field(default, json_schema_extra={"class": klass}, **constraints)


def required(klass: KeyClass, example: object = None) -> Any:  # noqa: ANN401, because it stands for any field
    """A field without a default. If it is no section, the example is what messages and the reference propose."""
    return Field(json_schema_extra={"class": klass}, examples=[example])


class Section(BaseModel):
    """Unknown keys are refused; the docstring under a field is its entry in the reference."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        strict=True,
        allow_inf_nan=False,
    )


class Poll(Section):
    """How much is read at once."""

    max_records: int = key(2000, "free", ge=1, le=100_000)
    """Most messages in one cut."""
    timeout: Duration = key("200ms", "free")
    """Longest wait for the first message of a cut."""


class Security(Section):
    """TLS and SASL, handed to the client. Secrets come from files only."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = key("PLAINTEXT", "free")
    """How the broker's listener speaks."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = key(None, "free")
    """How we say who we are, with `SASL_*`."""
    username: str | None = key(None, "free")
    """SASL user."""
    password_file: str | None = key(None, "free")
    """File that holds the SASL password; a trailing newline is ignored."""
    ca_file: str | None = key(None, "free")
    """PEM file of the certificate authority; none = the system's."""
    cert_file: str | None = key(None, "free")
    """PEM file of the client's certificate, for mutual TLS."""
    key_file: str | None = key(None, "free")
    """PEM file of the client's key, for mutual TLS."""


class Source(Section):
    """Where records come from."""

    type: Literal["kafka", "files"] = key("kafka", "identity")
    """`kafka` for the service; `files` marks a configuration made for `replay`."""
    bootstrap_servers: list[Server] = key(["localhost:9092"], "free", min_length=1)
    """Brokers to ask first, `host:port`."""
    topics: list[Topic] = key([], "identity", examples=[["metrics.raw"]])
    """Input topics, in the order their partitions take turns. Needed with `type: kafka`."""
    start: Start = key("earliest", "identity")
    """Where a first run begins: `earliest`, `latest` or `timestamp:2026-01-01T00:00:00Z`. Later runs go on
    where the last one stopped."""
    poll: Poll = key(Poll(), "free")
    on_gap: Literal["fail", "skip"] = key("fail", "free")
    """When retention deleted offsets before they were read: exit 65 with both offsets, or go on behind them and record
    the gap in the progress chain."""
    security: Security = key(Security(), "free")
    properties: dict[PropertyName, Setting] = key({}, "free")
    """Further settings of the Kafka client, names checked. What correctness hangs on cannot be set."""


class Timestamp(Section):
    """Where the event time stands."""

    path: Path | list[Path] = required("identity", "$.timestamp")
    """Field path; several are joined by a space."""
    unit: TimeUnit = key("auto", "identity")
    """`auto`, `s`, `ms`, `us`, `ns`, `iso8601` or a strptime pattern. `auto` takes numbers by magnitude
    (<1e11 s, <1e14 ms, <1e17 µs, else ns) and text as ISO 8601; a time without a zone is UTC."""
    fallback: Literal["broker", "none"] = key("broker", "identity")
    """What a record without a time gets: the broker's timestamp, or a dead letter."""


class Csv(Section):
    """How CSV files are written."""

    delimiter: Character = key(",", "identity")
    """Between fields."""
    decimal: Character = key(".", "identity")
    """Between the whole and the fraction of a number."""


class Decode(Section):
    """From bytes to records."""

    format: Literal["json", "csv"] = key("json", "identity")
    """`json` (a message, or a line of an NDJSON file) or `csv` (files only)."""
    explode: Path | None = key(None, "identity")
    """Path of an array of observations inside one message; the other paths may then start at `$` (the
    message) or `@.` (the observation)."""
    series_id: Annotated[list[SeriesPart], Field(min_length=1)] = required("identity", ["$.host", "$.name"])
    """Paths joined with `|`; also `@key @field @topic @partition @header.NAME`."""
    timestamp: Timestamp = required("identity")
    csv: Csv = key(Csv(), "identity")
    target: Path | dict[str, Path] = required("identity", "$.value")
    """What is forecast: a path, a map `{name: path}`, or `$.*` (every number but the time): several are
    several series, told apart by `@field`, which is appended to `series_id` when it is not there."""
    on_error: Literal["dead_letter", "skip", "fail"] = key("dead_letter", "identity")
    """What becomes of a record that cannot be understood. `skip` counts it, `fail` exits 65."""
    max_bytes: MessageSize = key("1MiB", "identity")
    """Longest message that is decoded, at most 64MiB; a longer one is a dead letter."""
    max_batch_bytes: BatchSize = key("64MiB", "identity")
    """Most that one compressed batch of messages may unpack to, 1MiB to 1GiB; a batch that would become more is one
    dead letter for all its offsets. Memory for it may be needed once for each partition."""
    max_key_bytes: KeySize = key("1KiB", "identity")
    """Longest key of a series (its `series_id`, joined), 16 bytes to 64KiB; a record with a longer one is a
    dead letter."""
    tombstone: Literal["ignore", "reset", "dead_letter"] = key("ignore", "identity")
    """What a message without a value means: nothing, that the series named by its key start anew, or a fault.
    It is counted as skipped, or as a dead letter."""
    max_rows: int = key(10_000, "identity", ge=1, le=1_000_000)
    """Most records in one message (observations × targets); a message of more is one dead letter as a whole."""


class Series(Section):
    """The clock of a series, and how many there may be."""

    interval: Interval = key("auto", "identity")
    """Expected spacing: `auto` (lower median of the first 8 gaps), a duration, or `null` for irregular."""
    late: Literal["drop", "dead_letter"] = key("drop", "identity")
    """What becomes of a record older than the newest of its series."""
    max_ahead: Duration = key("1d", "identity")
    """A record further past the broker's timestamp than this is a dead letter, or one bad clock would block
    its series."""
    gap_reset: Duration | None = key(None, "identity")
    """Silence after which the carry starts from zero; `null` = never."""
    max_series: int = key(100_000, "free", ge=1, le=100_000_000)
    """Series kept in memory, at least `training.max_wait`. Beyond, the least recently seen wait on the local disk and
    come back with their next record; no bit depends on it."""
    ttl: Duration | None = key(None, "identity")
    """A series not seen for this long is forgotten, and starts anew when it comes back; `null` = never. Measured by
    the newest broker timestamp (event time where there is none) of all series, so the log alone decides."""


class Model(Section):
    """The shape of the network and what it forecasts."""

    hidden_size: int = key(64, "identity", ge=1, le=4096)
    """Units of the LSTM."""
    horizons: int = key(24, "identity", ge=1, le=1000)
    """How many intervals ahead: a direct head for 1 … this many."""
    loss: Literal["huber", "mse", "mae"] = key("huber", "identity")
    """What an update minimises, in units of the series' scale."""
    season: Annotated[int, Field(ge=2, le=20_000)] | Literal["none"] = key("none", "identity")
    """Intervals per season: inputs one season back, and the seasonal naive baseline."""
    calendar: list[Literal["hour", "weekday"]] = key(["hour", "weekday"], "identity")
    """Phases of the event time (UTC) the network sees."""
    seed: int = key(17, "identity", ge=0, le=2**32 - 1)
    """Of the initial weights."""


class Optimizer(Section):
    """Adam."""

    name: Literal["adam"] = key("adam", "learning")
    """The optimizer."""
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = key("auto", "learning")
    """Learning rate; `auto` = 0.001."""


class Guard(Section):
    """When learning goes wrong."""

    patience: int = key(50, "learning", ge=1, le=1_000_000)
    """Updates skipped in a row (loss or gradient not finite) before the weights go back to the last good ones."""


class Training(Section):
    """Truncated BPTT(k1, k2) and the update queue."""

    enabled: bool = key(True, "learning")
    """Whether weights change at all."""
    k1: int = key(16, "learning", ge=1, le=10_000)
    """New steps between updates of a series."""
    k2: Annotated[int, Field(ge=1, le=20_000)] | Literal["auto"] = key("auto", "learning")
    """Steps back; `auto` = max(48, 2 × horizons). At least horizons + k1."""
    batch_series: int = key(256, "learning", ge=1, le=100_000)
    """Most windows in one update."""
    max_wait: int = key(4096, "learning", ge=1, le=100_000_000)
    """Fresh records after which a queued window is learnt from, however few there are."""
    optimizer: Optimizer = key(Optimizer(), "learning")
    clip_norm: float = key(1.0, "learning", gt=0)
    """Longest gradient."""
    guard: Guard = key(Guard(), "learning")


class Every(Section):
    """When a checkpoint is due: whichever comes first."""

    time: Duration = key("60s", "free")
    """Since the last one."""
    records: int = key(500_000, "free", ge=1, le=10**12)
    """Since the last one."""


class Keep(Section):
    """Which checkpoints stay."""

    last: int = key(5, "free", ge=2, le=1000)
    """The newest so many. At least 2: with one, a damaged newest would leave nothing."""
    daily: int = key(3, "free", ge=0, le=1000)
    """Beside them the newest of each of the last so many days (UTC) that have one."""


class Checkpoint(Section):
    """Where and when state is made durable."""

    url: StoreUrl = key("./state", "free")
    """
    Where the checkpoints are. A local directory is made if missing, relative to the working directory. A bucket must
    exist; credentials come from the environment or the files its SDK reads, and options follow a `?`:
    `endpoint_override`, `scheme` and, for S3, `region`.
    """
    every: Every = key(Every(), "free")
    keep: Keep = key(Keep(), "free")
    on_mismatch: Literal["rebase", "fail"] = key("rebase", "free")
    """On another CPU or other libraries: go on with other bits and say so, or refuse."""


class Forecasts(Section):
    """Where forecasts go."""

    topic: Topic | None = key(None, "identity")
    """Output topic. Default: the deployment's `name`."""


class DeadLetters(Section):
    """Where records go that could not be used."""

    topic: Topic | None = key(None, "identity")
    """Default: `<forecasts.topic>.dlq`."""


class Progress(Section):
    """The chain of committed steps."""

    topic: Topic | None = key(None, "identity")
    """Default: `<forecasts.topic>.progress`."""
    trim: bool = key(True, "free")
    """Delete what is older than the oldest checkpoint. `false` keeps all, for proofs over the whole life."""


class Sink(Section):
    """What is published."""

    forecasts: Forecasts = key(Forecasts(), "identity")
    dead_letters: DeadLetters = key(DeadLetters(), "identity")
    progress: Progress = key(Progress(), "identity")
    delivery: Literal["exactly_once", "idempotent"] = key("exactly_once", "identity")
    """`exactly_once`: transactions; readers use `isolation.level=read_committed`. `idempotent`: none; every forecast at
    least once, a second copy byte for byte the same; progress is kept in a journal under `checkpoint.url`."""
    commit_every: Duration = key("100ms", "free")
    """Longest time that outputs are gathered before they are committed together."""


class Runtime(Section):
    """The process."""

    device: Device = key("auto", "free")
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`. Asked for and not there: exit 78."""
    threads: int = key(1, "free", ge=1, le=256)
    """Threads inside one operation. More than one rarely pays, and other numbers give other bits."""
    deadline: Patience = key("30s", "free")
    """Longest time a call to the broker may block before the process exits with 75; at least 1s."""
    shutdown_timeout: Patience = key("10s", "free")
    """From SIGTERM to the end; at least 1s."""


class Http(Section):
    """`/metrics /healthz /readyz /status`."""

    listen: Listen = key("127.0.0.1:9108", "free")
    """Address and port; port 0 takes a free one."""
    stall_after: Duration = key("120s", "free")
    """`/healthz` fails when the loop has not turned for this long."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        return split_address(self.listen)


class Metrics(Section):
    """What the scores are computed over."""

    window: int = key(2000, "free", ge=1, le=1_000_000)
    """Settled forecasts per horizon in the prequential gauges."""


class Logging(Section):
    """stderr."""

    level: Literal["debug", "info", "warning", "error"] = key("info", "free")
    """Least severe that is printed."""
    format: Literal["auto", "console", "json"] = key("auto", "free")
    """`auto` = console on a terminal, JSON lines otherwise."""


class Config(Section):
    """One deployment."""

    version: Literal[1] = key(1, "free")
    """Of this file's format."""
    name: Name = key("forecasts", "identity")
    """Names the deployment: transactional id, consumer group for lag tools. No two may share it."""
    source: Source = required("identity")
    decode: Decode = required("identity")
    series: Series = key(Series(), "identity")
    model: Model = key(Model(), "identity")
    training: Training = key(Training(), "learning")
    checkpoint: Checkpoint = key(Checkpoint(), "free")
    sink: Sink = key(Sink(), "identity")
    runtime: Runtime = key(Runtime(), "free")
    http: Http = key(Http(), "free")
    metrics: Metrics = key(Metrics(), "free")
    logging: Logging = key(Logging(), "free")

    @model_validator(mode="after")
    def _agrees(self) -> "Config":
        if found := tuple(_conflicts(self)):
            raise Conflicts(found)
        return self

    @property
    def k2(self) -> int:
        """Steps back, resolved."""
        k2 = self.training.k2
        return max(48, 2 * self.model.horizons) if k2 == "auto" else k2

    @property
    def learning_rate(self) -> float:
        """Resolved."""
        lr = self.training.optimizer.lr
        return 1e-3 if lr == "auto" else lr

    @property
    def season(self) -> int | None:
        """Intervals per season, or ``None``."""
        return None if self.model.season == "none" else self.model.season

    @property
    def forecast_topic(self) -> str:
        """Resolved."""
        return self.sink.forecasts.topic or self.name

    @property
    def dead_letter_topic(self) -> str:
        """Resolved."""
        return self.sink.dead_letters.topic or f"{self.forecast_topic}.dlq"

    @property
    def progress_topic(self) -> str:
        """Resolved."""
        return self.sink.progress.topic or f"{self.forecast_topic}.progress"


class Conflict(NamedTuple):
    """Keys that are each allowed and do not go together: the one to blame, the fix, and all that take part."""

    path: str
    fix: str
    involves: tuple[str, ...]


class Conflicts(ValueError):
    """All of them."""

    def __init__(self, conflicts: tuple[Conflict, ...]) -> None:
        super().__init__("; ".join(f"{c.path}: {c.fix}" for c in conflicts))
        self.conflicts = conflicts


def _conflicts(config: Config) -> Iterator[Conflict]:
    """What keys must agree on."""
    yield from _source_conflicts(config.source)
    yield from _decode_conflicts(config.source, config.decode)
    yield from _topic_conflicts(config)
    yield from _delivery_conflicts(config)
    calendar = config.model.calendar
    if len(set(calendar)) != len(calendar):
        yield Conflict("model.calendar", "name each phase once", ("model.calendar",))
    if config.series.max_series < config.training.max_wait:
        least = config.training.max_wait
        fix = f"write at least training.max_wait = {least}, or a smaller one: series seen within it stay in memory"
        yield Conflict("series.max_series", fix, ("series.max_series", "training.max_wait"))
    least = config.model.horizons + config.training.k1
    if config.k2 < least:
        # The key to blame is the one that was set: k2 if it is a number, k1 if k2 followed the horizons.
        involves = ("training.k2", "training.k1", "model.horizons")
        if config.training.k2 == "auto":
            most = config.k2 - config.model.horizons
            yield Conflict("training.k1", f"write at most {most} (k2 - horizons), or a larger training.k2", involves)
        else:
            yield Conflict(
                "training.k2",
                f"write at least model.horizons + training.k1 = {least}, or the longest horizon is never learnt",
                involves,
            )


def _source_conflicts(source: Source) -> Iterator[Conflict]:
    if source.type == "kafka" and not source.topics:
        yield Conflict(
            "source.topics", "name at least one input topic: [metrics.raw]", ("source.topics", "source.type")
        )
    security, here = source.security, "source.security"
    sasl = {name: getattr(security, name) for name in ("sasl_mechanism", "username", "password_file")}
    tls = {name: getattr(security, name) for name in ("ca_file", "cert_file", "key_file")}
    for name, value in sasl.items():
        involves = (f"{here}.{name}", f"{here}.protocol")
        if security.protocol.startswith("SASL_") and value is None:
            yield Conflict(f"{here}.{name}", f"{here}.protocol is {security.protocol}: write one", involves)
        if not security.protocol.startswith("SASL_") and value is not None:
            fix = f"take it out, or write protocol: SASL_SSL; {security.protocol} authenticates nobody by it"
            yield Conflict(f"{here}.{name}", fix, involves)
    for name, value in tls.items():
        if not security.protocol.endswith("SSL") and value is not None:
            fix = f"take it out, or write protocol: SSL; {security.protocol} does not encrypt"
            yield Conflict(f"{here}.{name}", fix, (f"{here}.{name}", f"{here}.protocol"))
    if (security.cert_file is None) != (security.key_file is None):
        blame = "cert_file" if security.cert_file is None else "key_file"
        fix = "write both source.security.cert_file and key_file, or neither"
        yield Conflict(f"{here}.{blame}", fix, (f"{here}.cert_file", f"{here}.key_file"))


def _decode_conflicts(source: Source, decode: Decode) -> Iterator[Conflict]:
    if decode.format == "csv":
        if source.type == "kafka":
            fix = "write json: csv is read from files only (source.type: files)"
            yield Conflict("decode.format", fix, ("decode.format", "source.type"))
        if decode.explode is not None:
            fix = "write null: a row of a csv file holds no array"
            yield Conflict("decode.explode", fix, ("decode.explode", "decode.format"))
    if decode.csv.decimal == decode.csv.delimiter:
        fix = "write another character than decode.csv.delimiter"
        yield Conflict("decode.csv.decimal", fix, ("decode.csv.decimal", "decode.csv.delimiter"))
    yield from _tombstone_conflicts(decode)
    if decode.max_batch_bytes <= decode.max_bytes:
        fix = "write more than decode.max_bytes: a batch holds a message, its key and its headers"
        yield Conflict("decode.max_batch_bytes", fix, ("decode.max_batch_bytes", "decode.max_bytes"))
    if isinstance(decode.target, dict) and len(decode.target) > decode.max_rows:
        fix = f"write at least {len(decode.target)}: a message has one record for each of decode.target"
        yield Conflict("decode.max_rows", fix, ("decode.max_rows", "decode.target"))
    if decode.explode is None:
        times = decode.timestamp.path
        targets = decode.target
        for path, values in (
            ("decode.series_id", decode.series_id),
            ("decode.timestamp.path", [times] if isinstance(times, str) else times),
            ("decode.target", [targets] if isinstance(targets, str) else list(targets.values())),
        ):
            if any(value.startswith(("@.", "@[")) for value in values):
                fix = "start the path at $: @. means an element of decode.explode, which is null"
                yield Conflict(path, fix, (path, "decode.explode"))


def _delivery_conflicts(config: Config) -> Iterator[Conflict]:
    if config.sink.delivery == "exactly_once":
        return
    if config.sink.progress.topic is not None:
        fix = "take it out: with sink.delivery: idempotent progress is kept in a journal under checkpoint.url"
        yield Conflict("sink.progress.topic", fix, ("sink.progress.topic", "sink.delivery"))
    if "://" in config.checkpoint.url:
        fix = "write exactly_once, or a local directory as checkpoint.url: the journal must be on this machine's disk"
        yield Conflict("sink.delivery", fix, ("sink.delivery", "checkpoint.url"))


def _tombstone_conflicts(decode: Decode) -> Iterator[Conflict]:
    if decode.tombstone != "reset":
        return
    involves = ("decode.tombstone", "decode.series_id", "decode.target")
    inside = [part for part in decode.series_id if part.startswith(("$", "@.", "@["))]
    if inside:
        fix = f"write ignore or dead_letter: a tombstone has no {inside[0]} to say which series is meant"
        yield Conflict("decode.tombstone", fix, involves)
    elif isinstance(decode.target, str) and decode.target.endswith(".*"):
        fix = "write ignore or dead_letter, or name the targets: a tombstone does not say which fields there were"
        yield Conflict("decode.tombstone", fix, involves)


def _topic_conflicts(config: Config) -> Iterator[Conflict]:
    inputs, sink = config.source.topics, "sink"
    for topic, count in Counter(inputs).items():
        if count > 1:
            yield Conflict("source.topics", f"name {topic} once", ("source.topics",))
    taken = dict.fromkeys(inputs, "source.topics")
    involves = ("name", "source.topics", *(f"{sink}.{out}.topic" for out in ("forecasts", "dead_letters", "progress")))
    for path, topic in (
        ("sink.forecasts.topic", config.forecast_topic),
        ("sink.dead_letters.topic", config.dead_letter_topic),
        *([("sink.progress.topic", config.progress_topic)] if config.sink.delivery == "exactly_once" else []),
    ):
        if topic in taken:
            yield Conflict(path, f"write another topic: {topic} is {taken[topic]} already", involves)
        if len(topic) > 249:
            yield Conflict(path, f"write a shorter topic: {topic} has more than 249 characters", involves)
        taken[topic] = path
