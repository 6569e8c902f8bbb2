"""The whole way, in and out, over TLS and SASL."""

from collections.abc import Callable
from pathlib import Path

import pytest
from broker import Cluster
from deployment import Deployment, outputs

from streamlstm.transport.kafka.preflight import preflight
from streamlstm.transport.kafka.topics import check_topics


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_records_come_in_and_forecasts_go_out_over_sasl_ssl(
    deploy: Callable[..., Deployment], secure_cluster: Cluster, tmp_path: Path, mechanism: str
) -> None:
    listener = secure_cluster.secure
    assert listener is not None
    secret = tmp_path / "password"
    secret.write_text(listener.password + "\n")
    deployment = deploy(
        secure_cluster,
        bootstrap_servers=[listener.bootstrap],
        security={
            "protocol": "SASL_SSL",
            "sasl_mechanism": mechanism,
            "username": listener.user,
            "password_file": str(secret),
            "ca_file": listener.ca,
        },
    ).with_topics()
    deployment.fill(0, [b"in"])
    assert preflight(deployment.config.source) == []
    check_topics(deployment.config)
    source, publisher = deployment.source(), deployment.publisher()
    source.seek(source.resolve_start("earliest"))
    messages = source.poll(10, 10.0)
    assert messages is not None
    assert messages.value == [b"in"]
    publisher.begin_session()
    publisher.commit(outputs(b"step 1", [b"out"]))
    assert [e.value for e in deployment.progress().read()] == [b"step 1"]
    assert deployment.committed(deployment.config.forecast_topic) == [b"out"]
