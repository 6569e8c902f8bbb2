"""
Can we get in, and if not, why not: within 5 s, in one line, with the address.

For six different causes kafka-python says ``KafkaTimeoutError: Unable to bootstrap``, after 30 s. So before any client
is made this goes the same way by hand: resolve, connect, TLS, ask, authenticate.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kafka.net.sasl import get_sasl_mechanism

from streamlstm.config.model import Security, Source, split_address
from streamlstm.errors import ConfigError, NotAuthorised, StreamlstmError, Unavailable
from streamlstm.transport.kafka.settings import check_properties, password, ssl_context
from streamlstm.transport.kafka.wire import Connection, HungUp, NotKafka

BUDGET_S = 5.0
_TO_REPORT_S = 0.3
_UNSUPPORTED_MECHANISM, _ILLEGAL_SASL_STATE = 33, 34
_EXPIRED, _NOT_YET_VALID, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64
_OUR_CERTIFICATE = {
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it was revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it is not acceptable, for a reason the broker does not tell",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it is damaged",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is of a kind the broker does not take",
    "TLSV1_ALERT_UNKNOWN_CA": "the broker does not know who signed it",
}
"""What a broker says of a client's certificate, as OpenSSL calls it."""

_CONNECTION_ENDED = (HungUp, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class HungUpOn(NotAuthorised):
    """Nobody said that we are refused: the connection ended at a place where it does when we are."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One server, how to speak to it, and until when (monotonic)."""

    server: str
    security: Security
    context: ssl.SSLContext | None
    password: str | None
    until_s: float

    def left_s(self) -> float:
        return max(0.05, self.until_s - time.monotonic())


def preflight(source: Source, *, budget_s: float = BUDGET_S) -> list[str]:
    """
    Try every bootstrap server at once, and return what an operator should know. One that lets us in is enough.

    Otherwise raises, within ``budget_s``, what is most certainly in need of a hand: credentials
    (:class:`~streamlstm.errors.NotAuthorised`), settings (:class:`~streamlstm.errors.ConfigError`), or that nobody is
    there (:class:`~streamlstm.errors.Unavailable`), naming every address with its own cause.
    """
    check_properties(source.properties)
    security = source.security
    context, secret = ssl_context(security), password(security)
    end_s = time.monotonic() + budget_s
    until_s = end_s - min(_TO_REPORT_S, budget_s / 4)
    outcomes: dict[str, StreamlstmError | None] = {}
    threads = [
        threading.Thread(
            target=_record,
            args=(outcomes, _Attempt(server, security, context, secret, until_s)),
            name=f"preflight {server}",
            daemon=True,
        )
        for server in source.bootstrap_servers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        # A name server that does not answer cannot be interrupted, only left behind.
        thread.join(max(0.0, end_s - time.monotonic()))
    late = Unavailable(f"the name server did not answer within {budget_s:g} s")
    failures = {server: outcomes.get(server, late) for server in source.bootstrap_servers}
    causes = {server: error for server, error in failures.items() if error is not None}
    if len(causes) == len(failures):
        raise _worst(causes)
    return [f"bootstrap server {server}: {error}" for server, error in causes.items()] + _exposed(source)


def _record(outcomes: dict[str, StreamlstmError | None], attempt: _Attempt) -> None:
    try:
        _enter(attempt)
        outcomes[attempt.server] = None
    except StreamlstmError as error:
        outcomes[attempt.server] = error
    except TimeoutError:
        outcomes[attempt.server] = Unavailable("it accepts connections, but does not answer: is it a Kafka broker?")
    except (NotKafka, UnicodeError) as error:
        outcomes[attempt.server] = Unavailable(f"what answers there is no Kafka broker: {error}")
    except (OSError, *_CONNECTION_ENDED) as error:
        outcomes[attempt.server] = Unavailable(f"the connection was lost: {error or type(error).__name__}")


def _worst(causes: dict[str, StreamlstmError]) -> StreamlstmError:
    """One exception for all servers, of the kind that a person can mend soonest."""
    kinds = set(map(type, causes.values()))
    for kind in (NotAuthorised, HungUpOn, ConfigError, Unavailable):
        if kind in kinds:
            return kind("cannot use Kafka: " + "; ".join(f"{server}: {error}" for server, error in causes.items()))
    raise AssertionError(f"an unforeseen kind of failure: {causes}")


def _exposed(source: Source) -> list[str]:
    """Warn about what travels in clear text, unless it stays on this machine."""
    far = [server for server in source.bootstrap_servers if not _is_loopback(split_address(server)[0])]
    if not far or source.security.protocol in ("SSL", "SASL_SSL"):
        return []
    what = "records and the password" if source.security.protocol == "SASL_PLAINTEXT" else "records"
    return [f"{what} travel unencrypted to {', '.join(far)}: set source.security.protocol to SSL or SASL_SSL"]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _enter(attempt: _Attempt) -> None:
    """The whole way in, in this order: resolve, connect, TLS, ask, authenticate, look where it sends us."""
    host, port = split_address(attempt.server)
    sock = _connect(attempt, host, port)
    with _secure(attempt, sock, host) as secured:
        secured.settimeout(attempt.left_s())
        connection = Connection(secured)
        try:
            versions = connection.versions()
        except (NotKafka, *_CONNECTION_ENDED) as error:
            raise _mute(attempt, host, port, error) from error
        except ssl.SSLError as error:
            # With TLS 1.3 the handshake is over for us before the broker has looked at our certificate.
            if refused := _refused_certificate(attempt.security, error):
                raise refused from error
            raise
        if attempt.security.protocol.startswith("SASL_"):
            _authenticate(attempt, connection)
        try:
            advertised = connection.metadata(versions)
        except _CONNECTION_ENDED as error:
            protocol = attempt.security.protocol
            raise ConfigError(
                f"the listener wants SASL authentication, and source.security.protocol is {protocol}: "
                f"set it to SASL_{protocol}"
            ) from error
    _reach_any(attempt, [(a.host, a.port) for a in advertised])


def _connect(attempt: _Attempt, host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise Unavailable(f"host {host} not found") from error
    reasons: list[str] = []
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        # Shared out, so that an address that swallows packets leaves time for the next.
        sock.settimeout(attempt.left_s() / (len(addresses) - len(reasons)))
        try:
            sock.connect(address)
        except ConnectionRefusedError:
            reasons.append(f"nobody listens on port {port} (connection refused)")
        except TimeoutError:
            reasons.append(f"{address[0]} does not answer on port {port}: is it up, is a firewall between?")
        except OSError as error:
            reasons.append(f"{address[0]} cannot be reached: {error.strerror or error}")
        else:
            return sock
        sock.close()
    raise Unavailable("; ".join(dict.fromkeys(reasons)))


def _secure(attempt: _Attempt, sock: socket.socket, host: str) -> socket.socket:
    if attempt.context is None:
        return sock
    sock.settimeout(attempt.left_s())
    try:
        return attempt.context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise _distrust(attempt.security, host, error) from error
    except TimeoutError:
        sock.close()
        raise
    except (ssl.SSLError, *_CONNECTION_ENDED) as error:
        sock.close()
        _, port = split_address(attempt.server)
        if _speaks_plaintext(attempt, host, port):
            protocol = attempt.security.protocol
            raise ConfigError(
                f"the listener speaks no TLS, and source.security.protocol is {protocol}: use the port of the TLS "
                f"listener, or set it to {protocol.replace('SSL', 'PLAINTEXT')}"
            ) from error
        if refused := _refused_certificate(attempt.security, error):
            raise refused from error
        raise ConfigError(f"the TLS handshake failed: {error}") from error


def _refused_certificate(security: Security, error: Exception) -> NotAuthorised | None:
    """What is wrong with our certificate, if it is that."""
    reason = (error.reason if isinstance(error, ssl.SSLError) else None) or ""
    # Java says of a certificate that did not come that it is bad.
    if "CERTIFICATE_REQUIRED" in reason or (reason in _OUR_CERTIFICATE and not security.cert_file):
        return NotAuthorised("the broker wants a client certificate: set cert_file and key_file")
    if reason in _OUR_CERTIFICATE:
        return NotAuthorised(f"the broker refuses the certificate {security.cert_file}: {_OUR_CERTIFICATE[reason]}")
    return None


def _distrust(security: Security, host: str, error: ssl.SSLCertVerificationError) -> NotAuthorised | ConfigError:
    reason = error.verify_message
    if error.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        return ConfigError(f"the certificate is not for {host}: use the name it was issued for ({reason})")
    if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return NotAuthorised(f"the certificate of {host} is out of date, or this machine's clock is wrong ({reason})")
    authority = f"source.security.ca_file {security.ca_file}" if security.ca_file else "the system's authorities"
    return ConfigError(f"the certificate of {host} is not signed by {authority}: set the right ca_file ({reason})")


def _mute(attempt: _Attempt, host: str, port: int, error: Exception) -> StreamlstmError:
    """Connected, asked, and got no Kafka answer: the likeliest cause is a listener that wants TLS."""
    if attempt.context is None and _speaks_tls(attempt, host, port):
        protocol = attempt.security.protocol
        return ConfigError(
            f"the listener speaks TLS, and source.security.protocol is {protocol}: "
            f"set it to {'SASL_SSL' if protocol.startswith('SASL_') else 'SSL or SASL_SSL'}"
        )
    if attempt.context is not None:
        ours = attempt.security.cert_file
        wants = f"not like the certificate {ours}" if ours else "want a client certificate (cert_file)"
        return HungUpOn(f"the broker closed the connection after TLS: it may {wants}")
    return Unavailable(f"what answers there is no Kafka broker: {error or 'it closed the connection'}")


def _speaks_tls(attempt: _Attempt, host: str, port: int) -> bool:
    """Whether a TLS handshake succeeds, whatever the certificate says. Nothing is sent through it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return _probe(attempt, host, port, lambda sock: context.wrap_socket(sock, server_hostname=host).close())


def _speaks_plaintext(attempt: _Attempt, host: str, port: int) -> bool:
    return _probe(attempt, host, port, lambda sock: Connection(sock).versions())


def _probe(attempt: _Attempt, host: str, port: int, speak: Callable[[socket.socket], object]) -> bool:
    try:
        with socket.create_connection((host, port), attempt.left_s()) as sock:
            sock.settimeout(attempt.left_s())
            speak(sock)
    except (OSError, NotKafka, HungUp):
        return False
    return True


def _authenticate(attempt: _Attempt, connection: Connection) -> None:
    """SASL, with kafka-python's own mechanisms, so that what passes here passes there."""
    security = attempt.security
    handshake = connection.handshake(security.sasl_mechanism or "")
    if handshake.error == _ILLEGAL_SASL_STATE:
        raise ConfigError(
            f"the listener wants no SASL, and source.security.protocol is {security.protocol}: "
            f"set it to {security.protocol.removeprefix('SASL_')}"
        )
    if handshake.error == _UNSUPPORTED_MECHANISM or security.sasl_mechanism not in handshake.mechanisms:
        offered = ", ".join(handshake.mechanisms) or "none"
        raise ConfigError(f"source.security.sasl_mechanism: {security.sasl_mechanism}; the broker offers {offered}")
    mechanism: Any = get_sasl_mechanism(security.sasl_mechanism)(
        sasl_mechanism=security.sasl_mechanism,
        sasl_plain_username=security.username,
        sasl_plain_password=attempt.password,
    )
    refused = f"the broker refuses user {security.username} by {security.sasl_mechanism}: wrong name or password"
    while not mechanism.is_done():
        try:
            answer = connection.authenticate(mechanism.auth_bytes())
        except _CONNECTION_ENDED as error:
            raise HungUpOn(refused) from error
        if answer.error:
            raise NotAuthorised(f"{refused} ({answer.message})")
        try:
            mechanism.receive(answer.token)
        except Exception as error:
            raise NotAuthorised(f"the broker does not know the password of {security.username} itself") from error


def _reach_any(attempt: _Attempt, advertised: Sequence[tuple[str, int]]) -> None:
    """The clients go on to where the brokers say they are, which need not be where we found them."""
    reasons: list[str] = []
    for host, port in advertised:
        try:
            _connect(attempt, host, port).close()
        except Unavailable as error:
            reasons.append(f"{host}:{port}: {error}")
        else:
            return
    if reasons:
        raise Unavailable(
            f"it answers, but sends us to an address that does not: {'; '.join(reasons)}; "
            "check advertised.listeners of the broker"
        )
