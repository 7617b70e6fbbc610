"""`novacron-agent join`: lets this node into a cell, with a token that an operator made.

The token says which CA the cell has, by its fingerprint: the CA is read from any replica without
trusting it, and everything else goes over a connection that this CA vouches for. The key is made
here and never leaves the node. It is kept from before the token is shown, so that a join that was
cut off is simply run again.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import re
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from agent.config import AgentConfig
from agent.identity_files import KEY_MODE, IdentityFiles, write
from shared.admission import Issued
from shared.errors import (
    FieldError,
    NovacronError,
    Unauthenticated,
    Unavailable,
    ValidationFailed,
)
from shared.join_token import JoinTokenText, parse_join_token
from shared.model import Problem
from shared.problems import error_of

# A replica that is there answers at once; a write waits up to 6 s for a leader.
REQUEST_LIMIT_S = 15.0
# Between attempts while no replica can be reached, and while an operator has not approved.
PAUSE_S = 2.0
WAIT_S = 600.0
ANSWER_BYTES_MAX = 1024 * 1024
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.S)

if TYPE_CHECKING:
    from agent.certificate_request import KeyAndRequest

T = TypeVar("T")


class _Answer(Struct, frozen=True):
    approved: bool
    certificates: Issued | None = None


class _Problem(Struct, frozen=True):
    """An answer that is no acceptance; lenient, since a proxy's may come instead."""

    code: str = "unavailable"
    detail: str = ""
    retryable: bool = False
    errors: tuple[FieldError, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        action="append",
        required=True,
        metavar="URL",
        help="a replica's API, https://NAME:8443; several may be given",
    )
    parser.add_argument(
        "--token-file",
        required=True,
        metavar="FILE",
        help="where the join token is (- for standard input)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="SECONDS",
        help="how long to try (%(default)s)",
    )


def join(config: AgentConfig, arguments: argparse.Namespace) -> None:
    """Join and write what vouches for this node. Raises NovacronError for what cannot be mended."""
    # Only here: the daemon knows this command, and has no use for what it loads.
    from agent.certificate_request import make_request

    files = IdentityFiles(config)
    files.check_own()
    token_text = _read_token(arguments.token_file)
    token = parse_join_token(token_text)
    endpoints = tuple(arguments.endpoint)
    deadline_s = time.monotonic() + arguments.wait
    try:
        agent = _kept_request(config)
    except OSError as error:
        raise _unwritable(error) from error
    try:
        qemu = make_request(config.node_name, files.qemu_key())
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}; it has to be the agent's own"
        raise ValidationFailed(
            (FieldError("/hypervisor/qemu_tls_dir", "unreadable", detail),)
        ) from error
    context = _trusted(_until(deadline_s, endpoints, lambda e: _read_ca(e, token)))
    body = msgspec.json.encode(
        {
            "token": token_text,
            "name": config.node_name,
            "address": config.address,
            "agent_request": agent.request,
            "qemu_request": qemu.request,
        }
    )
    issued = _until_approved(deadline_s, endpoints, context, body)
    try:
        files.replace(agent.key, qemu.key, issued)
        _kept_key(config).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    sys.stdout.write(
        f"{config.node_name} has joined; its certificate is good until "
        f"{issued.expires_at:%Y-%m-%d %H:%M} UTC and renewed by its agent. If that runs already: "
        "systemctl reload novacron-agent\n"
    )


def _read_token(source: str) -> str:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        fault = FieldError("/token-file", "unreadable", f"{source}: {error}")
        raise ValidationFailed((fault,)) from error
    return text.strip()


def _kept_key(config: AgentConfig) -> Path:
    return config.tls.key.with_name("joining.key")


def _kept_request(config: AgentConfig) -> KeyAndRequest:
    """Return a request for this node's new key, which is on its disk before it is used."""
    from agent.certificate_request import make_request

    path = _kept_key(config)
    if path.exists():
        return make_request(config.node_name, path.read_text(encoding="ascii"))
    made = make_request(config.node_name)
    write(path, made.key, KEY_MODE)
    return made


def _read_ca(endpoint: str, token: JoinTokenText) -> str:
    """Return the CA certificate that the token names. Raises Unauthenticated for any other."""
    # Nothing is taken on trust here: what comes is compared with the token's fingerprint.
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    text = _request(endpoint, blind, "GET", "/api/v1/ca").decode("ascii", "replace")
    for pem in _CERTIFICATE.findall(text):
        der = ssl.PEM_cert_to_DER_cert(pem)
        if hashlib.sha256(der).hexdigest() == token.ca_sha256:
            return str(pem)
    raise Unauthenticated(
        f"{endpoint} is not the control plane that the join token is of: its CA is another one"
    )


def _trusted(ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca)
    return context


def _until_approved(
    deadline_s: float, endpoints: tuple[str, ...], context: ssl.SSLContext, body: bytes
) -> Issued:
    is_told = False
    while True:
        data = _until(
            deadline_s,
            endpoints,
            lambda e: _request(e, context, "POST", "/api/v1/enrolments", body),
        )
        try:
            answer = msgspec.json.decode(data, type=_Answer)
        except msgspec.DecodeError as error:
            raise Unavailable(f"the control plane answered something else: {error}") from error
        if answer.certificates is not None:
            return answer.certificates
        if not is_told:
            sys.stderr.write("waiting for `novacron node approve`\n")
            is_told = True
        _pause(deadline_s, Unavailable("nobody has approved this node yet: run this again later"))


def _until(deadline_s: float, endpoints: tuple[str, ...], attempt: Callable[[str], T]) -> T:
    """Return the first endpoint's answer; raises what all of them refuse.

    One replica may be behind the others, or show a certificate that they have replaced.
    """
    while True:
        failures: list[NovacronError] = []
        for endpoint in endpoints:
            try:
                return attempt(endpoint)
            except NovacronError as error:
                failures.append(error)
        if not any(failure.retryable for failure in failures):
            raise failures[-1]
        _pause(deadline_s, failures[-1])


def _pause(deadline_s: float, otherwise: NovacronError) -> None:
    if time.monotonic() + PAUSE_S > deadline_s:
        raise otherwise
    time.sleep(PAUSE_S)


def _request(
    endpoint: str, context: ssl.SSLContext, method: str, path: str, body: bytes = b""
) -> bytes:
    """Return the body of an answer. Raises Unavailable, Unauthenticated, what a problem says."""
    url = urlsplit(endpoint)
    if url.scheme != "https" or not url.hostname:
        fault = FieldError("/endpoint", "bad_format", f"{endpoint} is not https://NAME:PORT")
        raise ValidationFailed((fault,))
    connection = http.client.HTTPSConnection(
        url.hostname, url.port or 443, timeout=REQUEST_LIMIT_S, context=context
    )
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read(ANSWER_BYTES_MAX)
    except ssl.SSLCertVerificationError as error:
        raise Unauthenticated(f"{endpoint} is not trusted: {error.verify_message}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{endpoint} cannot be reached: {error}") from error
    finally:
        connection.close()
    if response.status < 300:
        return data
    raise _error(endpoint, response.status, data)


def _error(endpoint: str, status: int, data: bytes) -> NovacronError:
    try:
        told = msgspec.json.decode(data, type=_Problem)
    except msgspec.DecodeError:
        return Unavailable(f"{endpoint} answered with status {status}")
    return error_of(
        Problem(
            type="",
            title="",
            status=status,
            code=told.code,
            detail=f"{endpoint}: {told.detail}",
            retryable=told.retryable,
            errors=told.errors,
        )
    )


def _unwritable(error: OSError) -> NovacronError:
    fault = FieldError("/tls", "unwritable", f"{error.filename}: {error.strerror}")
    return ValidationFailed((fault,))
