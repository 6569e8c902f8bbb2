"""
From the configuration to the client's settings: pure, but for the secrets' files.

Three kinds of setting: those that correctness hangs on, which are ours alone; security, which has its own section;
and tuning, which ``source.properties`` may set, by name and type checked against what the client knows.
"""

import logging
import ssl
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from streamlstm.config.model import Config, Security, Source
from streamlstm.errors import ConfigError

TUNABLE = frozenset({
    "batch_size",
    "client_dns_lookup",
    "client_id",
    "client_rack",
    "compression_type",
    "connections_max_idle_ms",
    "fetch_max_bytes",
    "fetch_max_wait_ms",
    "fetch_min_bytes",
    "linger_ms",
    "max_partition_fetch_bytes",
    "max_request_size",
    "metadata_max_age_ms",
    "receive_buffer_bytes",
    "receive_message_max_bytes",
    "reconnect_backoff_max_ms",
    "reconnect_backoff_ms",
    "request_timeout_ms",
    "retry_backoff_ms",
    "send_buffer_bytes",
})  # fmt: skip
"""What ``source.properties`` may set. Everything else is decided here."""

BOOTSTRAP_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 10.0
SHARD = 0
"""Shard 0 of 1 owns every partition."""


def quieten() -> None:
    """
    Let kafka-python speak through :mod:`logging`, at WARNING and above only.

    Below that it logs keys, values and, when a client starts, passwords. Its errors still reach the log.
    """
    logging.getLogger("kafka").setLevel(logging.WARNING)


def ssl_context(security: Security) -> ssl.SSLContext | None:
    """
    The TLS context of the ``security`` section, or ``None`` without TLS. The host name is always checked.

    Raises :class:`~streamlstm.errors.ConfigError` naming the key and file that cannot be used.
    """
    if security.protocol not in ("SSL", "SASL_SSL"):
        return None
    _readable("ca_file", security.ca_file)
    _readable("cert_file", security.cert_file)
    _readable("key_file", security.key_file)
    try:
        context = ssl.create_default_context(cafile=security.ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"source.security.ca_file: {security.ca_file} holds no PEM certificate: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if security.cert_file:
        try:
            # A callable instead of a prompt: a daemon has nobody to ask.
            context.load_cert_chain(security.cert_file, security.key_file, password=lambda: b"")
        except ssl.SSLError as error:
            raise ConfigError(
                f"source.security.cert_file: {security.cert_file} and key_file {security.key_file} are not a PEM "
                f"certificate and its unencrypted key: {error}"
            ) from error
    return context


def password(security: Security) -> str | None:
    """
    The SASL password out of its file, without the trailing newline.

    Raises :class:`~streamlstm.errors.ConfigError` for a file that cannot be read, is not UTF-8, or is empty.
    """
    if security.password_file is None:
        return None
    _readable("password_file", security.password_file)
    raw = Path(security.password_file).read_bytes()
    try:
        secret = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        # Not as the cause: it carries what the file holds.
        raise ConfigError(f"source.security.password_file: {security.password_file} is not UTF-8 text") from None
    if not secret:
        raise ConfigError(f"source.security.password_file: {security.password_file} is empty")
    return secret


def _readable(key: str, path: str | None) -> None:
    if path is None:
        return
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"source.security.{key}: cannot read {path}: {error.strerror}") from error


def check_properties(properties: Mapping[str, Any]) -> None:
    """Refuse names the client does not know, names that are ours, and values of another type: all at once."""
    known = set(KafkaConsumer.DEFAULT_CONFIG) | set(KafkaProducer.DEFAULT_CONFIG)
    defaults = {**KafkaConsumer.DEFAULT_CONFIG, **KafkaProducer.DEFAULT_CONFIG}
    problems: list[str] = []
    for name, value in properties.items():
        if name in TUNABLE:
            default: object = defaults[name]
            if isinstance(default, int) and (isinstance(value, bool) or not isinstance(value, int)):
                problems.append(f"source.properties.{name}: {value!r} is not a whole number")
        elif name in known:
            problems.append(f"source.properties.{name}: cannot be set here; it is decided by streamlstm")
        else:
            close = get_close_matches(name.replace(".", "_"), sorted(TUNABLE), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"source.properties.{name}: the Kafka client knows no such setting{hint}")
    if problems:
        raise ConfigError("\n".join(problems))


def common(source: Source) -> dict[str, Any]:
    """What every client gets: where, how secure, and how patient."""
    check_properties(source.properties)
    security = source.security
    return {
        "bootstrap_servers": list(source.bootstrap_servers),
        "bootstrap_timeout_ms": int(1000 * BOOTSTRAP_TIMEOUT_S),
        "request_timeout_ms": int(1000 * REQUEST_TIMEOUT_S),
        "reconnect_backoff_max_ms": 2000,  # a broker that is back is found again within this
        "security_protocol": security.protocol,
        "ssl_context": ssl_context(security),
        "sasl_mechanism": security.sasl_mechanism,
        "sasl_plain_username": security.username,
        "sasl_plain_password": password(security),
    }


def consumer_settings(config: Config) -> dict[str, Any]:
    """
    Of every consumer: positions are ours, a missing offset is an error, uncommitted records are not seen.

    Without ``auto_offset_reset='none'`` truncation and deleted records are skipped in silence.
    """
    return {
        **common(config.source),
        "client_id": config.name,
        "metrics_enabled": False,
        "fetch_max_bytes": 16 << 20,
        "metadata_max_age_ms": 30_000,  # new partitions and re-created topics are noticed within this
        **_tuned(config.source, KafkaConsumer.DEFAULT_CONFIG),
        "group_id": None,
        "auto_offset_reset": "none",
        "enable_auto_commit": False,
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "check_crcs": True,
    }


def producer_settings(config: Config) -> dict[str, Any]:
    """
    Of an idempotent producer, as it is for forecasts without transactions.

    Its own time-outs end before ``runtime.deadline``, so that a failure is an exception with a reason; the deadline
    is for the calls that have none.
    """
    patience_ms = int(800 * config.runtime.deadline)
    return {
        **common(config.source),
        "client_id": config.name,
        "metrics_enabled": False,
        "compression_type": "lz4",
        "batch_size": 256 << 10,
        "linger_ms": 20,  # flush() cuts it short; until then, no batches of one record
        "max_request_size": 64 << 20,  # the topic's max.message.bytes decides, and says so
        "retry_backoff_ms": 15,  # beginning at once after a commit meets CONCURRENT_TRANSACTIONS and sleeps this long
        **_tuned(config.source, KafkaProducer.DEFAULT_CONFIG),
        "request_timeout_ms": min(int(1000 * REQUEST_TIMEOUT_S), patience_ms // 2),
        "delivery_timeout_ms": patience_ms,
        "max_block_ms": patience_ms,
        "bootstrap_timeout_ms": patience_ms,
        "enable_idempotence": True,
        "acks": "all",
        "allow_auto_create_topics": False,
    }


def transaction_settings(config: Config) -> dict[str, Any]:
    """Of the transactional producer."""
    return {
        **producer_settings(config),
        "transactional_id": f"{config.name}-{SHARD}",
        # A little longer than we would wait: an abandoned transaction blocks its readers until then.
        "transaction_timeout_ms": int(1000 * config.runtime.deadline) + 10_000,
    }


def loader_settings(source: Source) -> dict[str, Any]:
    """Of the producer that loads a file: idempotent, without transactions."""
    return {
        **common(source),
        "metrics_enabled": False,
        "compression_type": "lz4",
        "batch_size": 256 << 10,
        "linger_ms": 20,
        "max_request_size": 64 << 20,
        "delivery_timeout_ms": 30_000,
        **_tuned(source, KafkaProducer.DEFAULT_CONFIG),
        "max_block_ms": 10_000,
        "enable_idempotence": True,
        "acks": "all",
        "allow_auto_create_topics": False,
    }


def admin_settings(source: Source) -> dict[str, Any]:
    """Of the admin client."""
    return {**common(source), **_tuned(source, KafkaAdminClient.DEFAULT_CONFIG)}


def _tuned(source: Source, defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in source.properties.items() if name in defaults}
