"""
The configuration as pydantic sections: every key with its type, default, meaning and class.

A key's class says what may become of a change to it:

- *identity*: decode, series, model shape. A change is refused, or starts afresh with ``--fresh``.
- *learning*: rates, k1, k2. Taken over from a clean stop only, and recorded in progress.
- *free*: polls, commits, checkpoints, HTTP, logging. Not part of the hash.

Frozen: a configuration is a value.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

KeyClass = Literal["identity", "learning", "free"]

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 1000, "MB": 10**6, "GB": 10**9}


def _parse_duration(value: object) -> object:
    """Seconds from ``200ms 10s 5m 1h 7d``; anything else is refused, plain numbers too."""
    if isinstance(value, str) and (m := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip())):
        return float(m[1]) * _SECONDS[m[2]]
    raise ValueError("a duration is a number with a unit: 200ms, 10s, 5m, 1h or 7d")


def _parse_size(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (m := re.fullmatch(r"(\d+)\s*(B|[KMG]iB|[kMG]B)", value.strip())):
        return int(m[1]) * _BYTES[m[2]]
    raise ValueError("a size is a number of bytes or has a unit: 64KiB, 1MiB")


def _parse_interval(value: object) -> object:
    return value if value is None or value == "auto" else _parse_duration(value)


def _known_start(value: str) -> str:
    if value in ("earliest", "latest") or value.startswith("timestamp:"):
        return value
    raise ValueError("earliest, latest or timestamp:2026-01-01T00:00:00Z")


Duration = Annotated[float, BeforeValidator(_parse_duration), Field(gt=0)]
Size = Annotated[int, BeforeValidator(_parse_size), Field(gt=0)]
Interval = Annotated[float | Literal["auto"] | None, BeforeValidator(_parse_interval)]


def key(default: Any, klass: KeyClass, **constraints: Any) -> Any:  # noqa: ANN401, because it stands for any field
    """A field with its class, which the reference prints and the hash obeys."""
    return Field(default, json_schema_extra={"class": klass}, **constraints)


def required(klass: KeyClass, **constraints: Any) -> Any:  # noqa: ANN401, because it stands for any field
    """A field without a default."""
    return Field(json_schema_extra={"class": klass}, **constraints)


class Section(BaseModel):
    """Unknown keys are refused; the docstring under a field is its entry in the reference."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, strict=False
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

    @model_validator(mode="after")
    def _complete(self) -> "Security":
        if self.protocol.startswith("SASL") and not (self.sasl_mechanism and self.username and self.password_file):
            raise ValueError(f"{self.protocol} needs sasl_mechanism, username and password_file")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file belong together")
        return self


class Source(Section):
    """Where records come from."""

    type: Literal["kafka", "files"] = key("kafka", "identity")
    """`kafka` for the service; `files` marks a configuration made for `replay`."""
    bootstrap_servers: list[str] = key(["localhost:9092"], "free", min_length=1)
    """Brokers to ask first, `host:port`."""
    topics: list[str] = key([], "identity")
    """Input topics, in the order their partitions take turns."""
    start: Annotated[str, AfterValidator(_known_start)] = key("earliest", "identity")
    """Where a first run begins: `earliest`, `latest` or `timestamp:2026-01-01T00:00:00Z`. Later runs go on
    where the last one stopped."""
    poll: Poll = key(Poll(), "free")
    security: Security = key(Security(), "free")
    properties: dict[str, str | int | float | bool] = key({}, "free")
    """Further settings of the Kafka client, names checked. What correctness hangs on cannot be set."""

    @model_validator(mode="after")
    def _has_topics(self) -> "Source":
        if self.type == "kafka" and not self.topics:
            raise ValueError("topics: name at least one input topic")
        if len(set(self.topics)) != len(self.topics):
            raise ValueError("topics: a topic is named twice")
        return self


class Timestamp(Section):
    """Where the event time stands."""

    path: str | list[str] = key("$.timestamp", "identity")
    """Field path; several are joined by a space."""
    unit: str = key("auto", "identity")
    """`auto`, `s`, `ms`, `us`, `ns`, `iso8601` or a strptime pattern. `auto` takes numbers by magnitude
    (<1e11 s, <1e14 ms, <1e17 µs, else ns) and text as ISO 8601; a time without a zone is UTC."""
    fallback: Literal["broker", "none"] = key("broker", "identity")
    """What a record without a time gets: the broker's timestamp, or a dead letter."""


class Csv(Section):
    """How CSV files are written."""

    delimiter: str = key(",", "identity", min_length=1, max_length=1)
    """Between fields."""
    decimal: str = key(".", "identity", min_length=1, max_length=1)
    """Between the whole and the fraction of a number."""


class Decode(Section):
    """From bytes to records."""

    format: Literal["json", "csv"] = key("json", "identity")
    """`json` (a message, or a line of an NDJSON file) or `csv` (files only)."""
    explode: str | None = key(None, "identity")
    """Path of an array of observations inside one message; the other paths may then start at `$` (the
    message) or `@.` (the observation)."""
    series_id: list[str] = required("identity", min_length=1)
    """Paths joined with `|`; also `@key @field @topic @partition @header.NAME`."""
    timestamp: Timestamp = key(Timestamp(), "identity")
    csv: Csv = key(Csv(), "identity")
    target: str | dict[str, str] = required("identity")
    """What is forecast: a path, a map `{name: path}`, or `$.*` (every number but the time): several are
    several series, told apart by `@field`, which is appended to `series_id` when it is not there."""
    on_error: Literal["dead_letter", "skip", "fail"] = key("dead_letter", "free")
    """What becomes of a record that cannot be understood. `skip` counts it, `fail` exits 65."""
    max_bytes: Size = key("1MiB", "identity")
    """Longest message that is decoded; a longer one is a dead letter."""


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
    max_series: int = key(100_000, "identity", ge=1)
    """Records of series beyond this many are skipped and counted."""


class Model(Section):
    """The shape of the network and what it forecasts."""

    hidden_size: int = key(64, "identity", ge=1, le=4096)
    """Units of the LSTM."""
    horizons: int = key(24, "identity", ge=1, le=1000)
    """How many intervals ahead: a direct head for 1 … this many."""
    loss: Literal["huber", "mse", "mae"] = key("huber", "identity")
    """What an update minimises, in units of the series' scale."""
    season: int | Literal["none"] = key("none", "identity")
    """Intervals per season: inputs one season back, and the seasonal naive baseline."""
    calendar: list[Literal["hour", "weekday"]] = key(["hour", "weekday"], "identity")
    """Phases of the event time (UTC) the network sees."""
    seed: int = key(17, "identity", ge=0)
    """Of the initial weights."""

    @model_validator(mode="after")
    def _season_is_long_enough(self) -> "Model":
        if isinstance(self.season, int) and not 2 <= self.season <= 20_000:
            raise ValueError("season: none, or 2 to 20000 intervals")
        return self


class Optimizer(Section):
    """Adam."""

    name: Literal["adam"] = key("adam", "learning")
    """The optimizer."""
    lr: float | Literal["auto"] = key("auto", "learning")
    """Learning rate; `auto` = 0.001."""

    @model_validator(mode="after")
    def _positive(self) -> "Optimizer":
        if self.lr != "auto" and not self.lr > 0:
            raise ValueError("lr: auto, or a number above zero")
        return self


class Guard(Section):
    """When learning goes wrong."""

    patience: int = key(50, "learning", ge=1)
    """Updates skipped in a row (loss or gradient not finite) before the weights go back to the last good ones."""


class Training(Section):
    """Truncated BPTT(k1, k2) and the update queue."""

    enabled: bool = key(True, "learning")
    """Whether weights change at all."""
    k1: int = key(16, "learning", ge=1, le=10_000)
    """New steps between updates of a series."""
    k2: int | Literal["auto"] = key("auto", "learning")
    """Steps back; `auto` = max(48, 2 × horizons). At least horizons + k1."""
    batch_series: int = key(256, "learning", ge=1, le=100_000)
    """Most windows in one update."""
    max_wait: int = key(4096, "learning", ge=1)
    """Fresh records after which a queued window is learnt from, however few there are."""
    optimizer: Optimizer = key(Optimizer(), "learning")
    clip_norm: float = key(1.0, "learning", gt=0)
    """Longest gradient."""
    guard: Guard = key(Guard(), "learning")


class Every(Section):
    """When a checkpoint is due: whichever comes first."""

    time: Duration = key("60s", "free")
    """Since the last one."""
    records: int = key(500_000, "free", ge=1)
    """Since the last one."""


class Keep(Section):
    """Which checkpoints stay."""

    last: int = key(5, "free", ge=2)
    """The newest so many. At least 2: with one, a damaged newest would leave nothing."""


class Checkpoint(Section):
    """Where and when state is made durable."""

    url: str = key("./state", "free")
    """Directory of the checkpoints, made if missing; relative to the working directory."""
    every: Every = key(Every(), "free")
    keep: Keep = key(Keep(), "free")
    on_mismatch: Literal["rebase", "fail"] = key("rebase", "free")
    """On another CPU or other libraries: go on with other bits and say so, or refuse."""


class Forecasts(Section):
    """Where forecasts go."""

    topic: str | None = key(None, "identity")
    """Output topic; required by `run`."""


class DeadLetters(Section):
    """Where records go that could not be used."""

    topic: str | None = key(None, "identity")
    """Default: `<forecasts.topic>.dlq`."""


class Progress(Section):
    """The chain of committed steps."""

    topic: str | None = key(None, "identity")
    """Default: `<forecasts.topic>.progress`."""
    trim: bool = key(True, "free")
    """Delete what is older than the oldest checkpoint. `false` keeps all, for proofs over the whole life."""


class Sink(Section):
    """What is published."""

    forecasts: Forecasts = key(Forecasts(), "identity")
    dead_letters: DeadLetters = key(DeadLetters(), "identity")
    progress: Progress = key(Progress(), "identity")
    commit_every: Duration = key("100ms", "free")
    """Longest time a transaction stays open."""


class Runtime(Section):
    """The process."""

    device: str = key("auto", "free", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`. Asked for and not there: exit 78."""
    threads: int = key(1, "free", ge=1, le=256)
    """Threads inside one operation. More than one rarely pays, and other numbers give other bits."""
    deadline: Duration = key("30s", "free")
    """Longest time a call to the broker may block before the process exits with 75."""
    shutdown_timeout: Duration = key("10s", "free")
    """From SIGTERM to the end."""


class Http(Section):
    """`/metrics /healthz /readyz /status`."""

    listen: str = key("127.0.0.1:9108", "free", pattern=r"^.+:\d+$")
    """Address and port; port 0 takes a free one."""
    stall_after: Duration = key("120s", "free")
    """`/healthz` fails when the loop has not turned for this long."""


class Metrics(Section):
    """What the scores are computed over."""

    window: int = key(2000, "free", ge=1)
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
    name: str = key("forecasts", "identity", pattern=r"^[A-Za-z0-9._-]{1,100}$")
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
    def _window_reaches_the_horizons(self) -> "Config":
        if self.k2 < self.model.horizons + self.training.k1:
            least = self.model.horizons + self.training.k1
            raise ValueError(
                f"training.k2: {self.k2} is shorter than model.horizons + training.k1 = {least}: "
                "the longest horizon would never be learnt"
            )
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
    def dead_letter_topic(self) -> str | None:
        """Resolved."""
        out = self.sink.forecasts.topic
        return self.sink.dead_letters.topic or (f"{out}.dlq" if out else None)

    @property
    def progress_topic(self) -> str | None:
        """Resolved."""
        out = self.sink.forecasts.topic
        return self.sink.progress.topic or (f"{out}.progress" if out else None)
