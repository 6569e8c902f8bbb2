"""Which cause keeps us out: each of them against a real listener, within its time."""

import socket
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from broker import Cluster, Secure

from streamlstm.config.model import Security, Source
from streamlstm.errors import ConfigError, NotAuthorised, StreamlstmError, Unavailable
from streamlstm.transport.kafka.preflight import preflight


@pytest.fixture
def listener(secure_cluster: Cluster) -> Secure:
    assert secure_cluster.secure is not None
    return secure_cluster.secure


@pytest.fixture
def secret(tmp_path: Path, listener: Secure) -> Path:
    path = tmp_path / "password"
    path.write_text(listener.password + "\n")
    return path


@pytest.fixture
def sasl_ssl(listener: Secure, secret: Path) -> dict[str, Any]:
    return {
        "protocol": "SASL_SSL",
        "sasl_mechanism": "PLAIN",
        "username": listener.user,
        "password_file": str(secret),
        "ca_file": listener.ca,
    }


@pytest.fixture
def closed_port() -> Generator[str, None, None]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound, and nobody listens
        yield address(sock)


@pytest.fixture
def silent_port() -> Generator[str, None, None]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield address(sock)


@contextmanager
def answering(reply: bytes) -> Generator[str]:
    """A server that says one thing, whatever it hears."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield address(sock)


def address(sock: socket.socket) -> str:
    host, port = sock.getsockname()
    return f"{host}:{port}"


def refused(server: str, security: dict[str, Any] | None = None, **options: float) -> StreamlstmError:
    """Why we do not get in; always with the address, always within 5 s."""
    started = time.monotonic()
    with pytest.raises(StreamlstmError) as raised:
        preflight(Source(bootstrap_servers=[server], security=Security(**(security or {}))), **options)
    assert time.monotonic() - started < 5.0
    assert server in str(raised.value)
    assert "\n" not in str(raised.value)
    return raised.value


def test_an_open_door_is_silent(cluster: Cluster) -> None:
    assert preflight(Source(bootstrap_servers=cluster.bootstrap)) == []


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_the_right_password_opens_it(listener: Secure, sasl_ssl: dict[str, Any], mechanism: str) -> None:
    security = Security(**{**sasl_ssl, "sasl_mechanism": mechanism})
    assert preflight(Source(bootstrap_servers=[listener.bootstrap], security=security)) == []


def test_a_host_that_is_not_there() -> None:
    error = refused("no-such-host.invalid:9092")
    assert isinstance(error, Unavailable)
    assert "host no-such-host.invalid not found" in str(error)


def test_nobody_listens(closed_port: str) -> None:
    error = refused(closed_port)
    assert isinstance(error, Unavailable)
    assert "nobody listens" in str(error)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_a_listener_that_never_answers(silent_port: str, protocol: str) -> None:
    error = refused(silent_port, {"protocol": protocol}, budget_s=1.0)
    assert isinstance(error, Unavailable)
    assert "does not answer" in str(error)


def test_tls_to_a_plaintext_port(secure_cluster: Cluster, sasl_ssl: dict[str, Any]) -> None:
    error = refused(secure_cluster.bootstrap[0], sasl_ssl)
    assert isinstance(error, ConfigError)
    assert "speaks no TLS" in str(error)


def test_plaintext_to_a_tls_port(listener: Secure) -> None:
    error = refused(listener.bootstrap)
    assert isinstance(error, ConfigError)
    assert "speaks TLS" in str(error)


def test_no_sasl_where_it_is_wanted(listener: Secure) -> None:
    error = refused(listener.bootstrap, {"protocol": "SSL", "ca_file": listener.ca})
    assert isinstance(error, ConfigError)
    assert "set it to SASL_SSL" in str(error)


def test_sasl_where_it_is_not_wanted(secure_cluster: Cluster, sasl_ssl: dict[str, Any]) -> None:
    error = refused(secure_cluster.bootstrap[0], {**sasl_ssl, "protocol": "SASL_PLAINTEXT", "ca_file": None})
    assert isinstance(error, ConfigError)
    assert "set it to PLAINTEXT" in str(error)


def test_the_wrong_authority(listener: Secure, sasl_ssl: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=other",
         "-keyout", str(tmp_path / "other.key"), "-out", str(other)],
        capture_output=True, check=True, timeout=30,
    )  # fmt: skip
    error = refused(listener.bootstrap, {**sasl_ssl, "ca_file": str(other)})
    assert isinstance(error, ConfigError)
    assert f"not signed by source.security.ca_file {other}" in str(error)


def test_no_authority_at_all(listener: Secure, sasl_ssl: dict[str, Any]) -> None:
    error = refused(listener.bootstrap, {**sasl_ssl, "ca_file": None})
    assert isinstance(error, ConfigError)
    assert "not signed by the system's authorities" in str(error)


def test_a_certificate_for_another_name(listener: Secure, sasl_ssl: dict[str, Any]) -> None:
    error = refused(listener.bootstrap.replace("localhost", "127.1"), sasl_ssl)
    assert isinstance(error, ConfigError)
    assert "the certificate is not for 127.1" in str(error)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_the_wrong_password(listener: Secure, sasl_ssl: dict[str, Any], secret: Path, mechanism: str) -> None:
    secret.write_text("not-the-password")
    error = refused(listener.bootstrap, {**sasl_ssl, "sasl_mechanism": mechanism})
    assert isinstance(error, NotAuthorised)
    assert f"refuses user {listener.user} by {mechanism}" in str(error)
    assert "not-the-password" not in str(error)


def test_a_user_nobody_knows(listener: Secure, sasl_ssl: dict[str, Any]) -> None:
    error = refused(listener.bootstrap, {**sasl_ssl, "sasl_mechanism": "SCRAM-SHA-512", "username": "nobody"})
    assert isinstance(error, NotAuthorised)
    assert "refuses user nobody" in str(error)


def test_a_mechanism_the_broker_has_not(listener: Secure, sasl_ssl: dict[str, Any]) -> None:
    error = refused(listener.bootstrap, {**sasl_ssl, "sasl_mechanism": "SCRAM-SHA-256"})
    assert isinstance(error, ConfigError)
    assert "the broker offers PLAIN, SCRAM-SHA-512" in str(error)


def test_what_is_no_broker_at_all() -> None:
    with answering(b"HTTP/1.0 400 Bad Request\r\n\r\n") as server:
        error = refused(server, budget_s=2.0)
    assert isinstance(error, Unavailable)
    assert "no Kafka broker" in str(error)


def test_a_bad_certificate_where_we_have_none_is_a_missing_one() -> None:
    with answering(bytes([21, 3, 3, 0, 2, 2, 42])) as server:  # a fatal alert, bad_certificate
        error = refused(server, {"protocol": "SSL"}, budget_s=2.0)
    assert isinstance(error, NotAuthorised)
    assert "the broker wants a client certificate: set cert_file and key_file" in str(error)


def test_one_server_that_answers_is_enough_and_the_others_are_told(cluster: Cluster, closed_port: str) -> None:
    (warning,) = preflight(Source(bootstrap_servers=[closed_port, *cluster.bootstrap]))
    assert closed_port in warning
    assert "nobody listens" in warning


def test_of_several_causes_the_one_that_needs_a_hand_decides(closed_port: str, listener: Secure) -> None:
    source = Source(bootstrap_servers=[closed_port, listener.bootstrap])
    with pytest.raises(ConfigError, match=rf"{closed_port}: nobody listens.*{listener.bootstrap}: .*speaks TLS"):
        preflight(source)


def test_a_password_file_that_is_not_there_is_named(sasl_ssl: dict[str, Any], listener: Secure) -> None:
    security = Security(**{**sasl_ssl, "password_file": "/nowhere/password"})
    with pytest.raises(ConfigError, match=r"source\.security\.password_file: cannot read /nowhere/password"):
        preflight(Source(bootstrap_servers=[listener.bootstrap], security=security))
