"""Certificates that run out in mid-run: the service ends with 77, says whose, and goes on once they are renewed."""

import shutil
import ssl
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from broker import Cluster
from deployment import Deployment, coordinates, fill
from network import Network
from service import Service

from streamlstm.config.model import Security, Source
from streamlstm.errors import NotAuthorised
from streamlstm.transport.kafka.preflight import preflight

NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""OpenSSL's ``X509_V_FLAG_NO_CHECK_TIME``, which Python has no name for: a broker at a time when all was in date."""


class Certificates:
    """An authority, and what it has signed for this address: ``good`` and ``expired``."""

    def __init__(self, directory: Path) -> None:
        self.ca, self.key = directory / "ca.pem", directory / "key.pem"
        self.good, self.expired = directory / "good.pem", directory / "expired.pem"
        new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes"]
        self._run(*new, "-x509", "-subj", "/CN=authority", "-keyout", directory / "ca.key", "-out", self.ca)
        self._run(*new, "-subj", "/CN=us", "-keyout", self.key, "-out", directory / "request")
        (directory / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        sign = ["openssl", "x509", "-req", "-in", directory / "request", "-extfile", directory / "names"]
        sign += ["-CA", self.ca, "-CAkey", directory / "ca.key", "-CAcreateserial"]
        self._run(*sign, "-days", "2", "-out", self.good)
        self._run(*sign, "-days", "-1", "-out", self.expired)

    def _run(self, *command: object) -> None:
        subprocess.run(list(map(str, command)), check=True, capture_output=True)

    def broker(self, *, asks: bool) -> ssl.SSLContext:
        """The broker's side, which may ask for the client's certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.ca))
        context.load_cert_chain(self.good, self.key)
        context.verify_mode = ssl.CERT_REQUIRED if asks else ssl.CERT_NONE
        return context

    def client(self, certificate: Path | None = None) -> dict[str, Any]:
        ours = {"cert_file": str(certificate), "key_file": str(self.key)} if certificate else {}
        return {"protocol": "SSL", "ca_file": str(self.ca), **ours}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Entrance:
    """The broker behind TLS, a deployment's service before it."""

    def __init__(self, deployment: Deployment, directory: Path, context: ssl.SSLContext, security: object) -> None:
        self.deployment, self.context = deployment, context
        self.network = Network(deployment.cluster.bootstrap, tls=context)
        self.service = Service(
            deployment,
            directory,
            source={"bootstrap_servers": self.network.bootstrap, "topics": [deployment.input], "security": security},
            runtime={"deadline": "6s"},
        )
        self.records = 0

    def append(self) -> None:
        fill(self.deployment, 200, first=self.records)
        self.records += 200

    def lives_on(self) -> None:
        self.service.start()
        self.service.wait_ready()
        self.append()
        self.service.wait_committed(self.records, 120)

    def is_shut(self, told: str) -> None:
        """No connection stays, and the next ones meet the broker as it is now."""
        self.append()
        self.network.cut()
        self.network.mend()
        assert self.service.wait(120) == 77, self.service.said()
        assert told in self.service.complaint()
        self.service.start()
        assert self.service.wait(120) == 77, "a supervisor that starts it all the same changes nothing"
        assert told in self.service.complaint()

    def each_once(self) -> None:
        assert self.service.stop() == 0
        published = coordinates(self.deployment)
        assert len(published) == len(set(published)) == self.records


@pytest.fixture
def enter(deployment: Deployment, tmp_path: Path) -> Generator[Callable[..., Entrance], None, None]:
    made: list[Entrance] = []

    def make(context: ssl.SSLContext, security: object) -> Entrance:
        made.append(Entrance(deployment, tmp_path, context, security))
        return made[-1]

    yield make
    for entrance in made:
        entrance.service.close()
        entrance.network.close()


def test_a_brokers_certificate_that_runs_out_ends_in_77_and_once_renewed_nothing_is_missing(
    enter: Callable[..., Entrance], certificates: Certificates
) -> None:
    entrance = enter(certificates.broker(asks=False), certificates.client())
    entrance.lives_on()
    entrance.context.load_cert_chain(certificates.expired, certificates.key)
    entrance.is_shut("the certificate of 127.0.0.1 is out of date")
    entrance.context.load_cert_chain(certificates.good, certificates.key)
    entrance.lives_on()
    entrance.each_once()


@pytest.mark.soak
def test_our_certificate_that_runs_out_ends_in_77_and_once_renewed_nothing_is_missing(
    enter: Callable[..., Entrance], certificates: Certificates, tmp_path: Path
) -> None:
    ours = Path(shutil.copy(certificates.expired, tmp_path / "ours.pem"))
    context = certificates.broker(asks=True)
    context.verify_flags |= NO_CHECK_TIME
    entrance = enter(context, certificates.client(ours))
    entrance.lives_on()
    context.verify_flags &= ~NO_CHECK_TIME
    entrance.is_shut(f"the broker refuses the certificate {ours}: it has expired")
    shutil.copy(certificates.good, ours)
    entrance.lives_on()
    entrance.each_once()


@pytest.mark.parametrize(
    ("version", "ours", "told"),
    [
        (ssl.TLSVersion.TLSv1_2, "expired", r"refuses the certificate .*expired\.pem: it has expired"),
        (ssl.TLSVersion.TLSv1_3, "expired", r"refuses the certificate .*expired\.pem: it has expired"),
        (ssl.TLSVersion.TLSv1_3, None, "the broker wants a client certificate"),
    ],
)
def test_a_certificate_that_is_refused_is_named_with_the_reason(
    cluster: Cluster, certificates: Certificates, version: ssl.TLSVersion, ours: str | None, told: str
) -> None:
    context = certificates.broker(asks=True)
    context.maximum_version = version
    network = Network(cluster.bootstrap, tls=context)
    try:
        security = Security(**certificates.client(ours and getattr(certificates, ours)))
        with pytest.raises(NotAuthorised, match=told) as caught:
            preflight(Source(bootstrap_servers=network.bootstrap, security=security))
    finally:
        network.close()
    assert caught.value.exit_code == 77
