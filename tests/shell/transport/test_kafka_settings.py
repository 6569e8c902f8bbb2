"""What the client is told, and what nobody may tell it."""

from pathlib import Path
from typing import Any

import pytest

from streamlstm.config.model import Config, Security, Source
from streamlstm.errors import ConfigError
from streamlstm.transport.kafka.settings import (
    check_properties,
    common,
    consumer_settings,
    password,
    producer_settings,
    ssl_context,
    transaction_settings,
)


def config(**source: Any) -> Config:
    return Config.model_validate({
        "name": "shop",
        "source": {"topics": ["in"], **source},
        "decode": {"series_id": ["@key"], "timestamp": {"path": "$.t"}, "target": "$.v"},
        "runtime": {"deadline": "30s"},
    })  # fmt: skip


def test_what_correctness_hangs_on_is_set() -> None:
    consumer, producer = consumer_settings(config()), transaction_settings(config())
    assert consumer["auto_offset_reset"] == "none"
    assert consumer["isolation_level"] == "read_committed"
    assert consumer["enable_auto_commit"] is False
    assert consumer["group_id"] is None
    assert producer["transactional_id"] == "shop-0"
    assert producer["acks"] == "all"
    assert consumer["allow_auto_create_topics"] is producer["allow_auto_create_topics"] is False


def test_a_failure_comes_before_the_deadline() -> None:
    producer = transaction_settings(config())
    assert producer["request_timeout_ms"] + producer["linger_ms"] < producer["delivery_timeout_ms"] < 30_000
    assert producer["max_block_ms"] < 30_000 < producer["transaction_timeout_ms"]


def test_properties_reach_the_clients_that_know_them() -> None:
    tuned = config(properties={"fetch_max_wait_ms": 50, "compression_type": "zstd"})
    assert consumer_settings(tuned)["fetch_max_wait_ms"] == 50
    assert "compression_type" not in consumer_settings(tuned)
    assert producer_settings(tuned)["compression_type"] == "zstd"
    assert "fetch_max_wait_ms" not in producer_settings(tuned)


def test_all_that_is_wrong_with_the_properties_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_properties({"fetch_max_wait": 1, "delivery_timeout_ms": 1, "linger_ms": "soon"})
    message = str(raised.value)
    assert "fetch_max_wait: the Kafka client knows no such setting; did you mean fetch_max_wait_ms?" in message
    assert "delivery_timeout_ms: cannot be set here" in message
    assert "linger_ms: 'soon' is not a whole number" in message


def test_the_password_is_that_of_its_file_without_the_newline(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("  with spaces \r\n")
    security = Security(protocol="SASL_SSL", sasl_mechanism="PLAIN", username="u", password_file=str(file))
    assert password(security) == "  with spaces "
    assert common(Source(security=security))["sasl_plain_password"] == "  with spaces "


def test_the_host_name_is_always_checked() -> None:
    context = ssl_context(Security(protocol="SSL"))
    assert context is not None
    assert context.check_hostname


def test_without_tls_there_is_no_context() -> None:
    assert ssl_context(Security()) is None


def test_a_ca_file_that_holds_no_certificate_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    with pytest.raises(ConfigError, match=r"source\.security\.ca_file: .*ca\.pem holds no PEM certificate"):
        ssl_context(Security(protocol="SSL", ca_file=str(file)))
