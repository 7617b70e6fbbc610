"""The HTTPS client: one request at a time, JSON in and out, the cell's CA pinned.

On the standard library alone, because start-up time is part of a command line's manners. A write
has an idempotency key and keeps it when it is sent again. Where nobody can say whether the first
one was made it is sent again only to a control plane that keeps keys. It goes out on a fresh
connection: one that is reused may have been closed by the other side.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import secrets
import ssl
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct

from controlplane.cli.context import Context, Endpoint, parse_endpoint
from controlplane.cli.errors import (
    ApiProblem,
    CliError,
    Interrupted,
    NotLoggedIn,
    UnexpectedAnswer,
    Unreachable,
    Untrusted,
)
from controlplane.cli.terminal import Terminal
from controlplane.cli.views import ClusterView, Listing, Page, ProblemView
from shared.errors import Unauthenticated
from shared.retry import Backoff
from shared.tls import SCHEME, Role, parse_identity
from shared.version import release_of

BASE = "/api/v1"
JSON = "application/json"
CONNECT_TIMEOUT_S = 5.0
# Longer than the API takes for anything but a long poll, whose time is added.
ANSWER_TIMEOUT_S = 30.0
# Enough to bridge one election (5 s) before a person sees an error.
ATTEMPTS = 6
BACKOFF = Backoff(first_s=0.4, cap_s=4.0)
# The first release that keeps idempotency keys.
KEYS_SINCE = (0, 2)
# A page of 500 objects is below 2 MiB; this stops a server that never ends.
ANSWER_BYTES_MAX = 64 * 1024 * 1024
EVENT_STREAM = "text/event-stream"
BYTES = "application/octet-stream"
PIECE_BYTES = 256 * 1024
# The API gives a sign of life every 15 s.
STREAM_SILENCE_S = 45.0
# An event is below 10 kB.
LINE_BYTES_MAX = 1024 * 1024
PAGE_LIMIT = 500
# 500 pages are 250,000 objects, more than twice what a cell is built for.
PAGES_MAX = 500
# A list that cannot be read to its end in so many tries changes faster than it can be read.
WALKS_MAX = 3

T = TypeVar("T")
Query = tuple[tuple[str, str | int], ...]


class Answer(Struct, frozen=True):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def decode(self, kind: type[T]) -> T:
        return decode(self.body, kind)


def decode(body: bytes | msgspec.Raw, kind: type[T]) -> T:
    """Decode what the API sent as a view; raises UnexpectedAnswer."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise UnexpectedAnswer(
            f"the answer is not what this version of novacron reads: {error}",
            "compare `novacron version` with `novacron cluster status`",
        ) from error


def path_of(collection: str, *names: str) -> str:
    """Return an API path with each name quoted, so that no name reaches another route."""
    return "/".join((f"{BASE}/{collection}", *(quote(name, safe="") for name in names)))


class Client:
    """Talks to the replicas of one context, to whichever answers."""

    def __init__(self, context: Context, terminal: Terminal, rng: random.Random) -> None:
        self._endpoints = [parse_endpoint(url) for url in context.endpoints]
        self._token = context.token
        self._terminal = terminal
        self._rng = rng
        self._tls = _tls_context(context.ca)
        self._connection: http.client.HTTPSConnection | None = None
        self._revision = ""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, path: str, query: Query = (), extra_timeout_s: float = 0.0) -> Answer:
        """Fetch; tries again for a while when nobody answers, or when the answer says to.

        Raises ApiProblem, Unreachable, UnexpectedAnswer.
        """
        target = _with_query(path, query)
        return self._repeated(
            lambda: self._exchange("GET", target, None, {}, extra_timeout_s), _worth_repeating
        )

    def get_once(self, path: str) -> Answer:
        """Fetch what somebody has waited for long enough: never tries again.

        Raises ApiProblem, Unreachable, UnexpectedAnswer.
        """
        return self._exchange("GET", path, None, {}, 0.0)

    def get_as(self, kind: type[T], path: str, query: Query = ()) -> T:
        return self.get(path, query).decode(kind)

    def pages(self, path: str, query: Query = ()) -> Iterator[Page[msgspec.Raw]]:
        """Fetch a list page by page, all of one revision."""
        cursor: str | None = None
        for _ in range(PAGES_MAX):
            more: Query = () if cursor is None else (("cursor", cursor),)
            page = self.get_as(Page[msgspec.Raw], path, (*query, ("limit", PAGE_LIMIT), *more))
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return
        raise UnexpectedAnswer(f"{path} goes on after {PAGES_MAX} pages")

    def collect(self, path: str, query: Query = (), at_most: int | None = None) -> Listing:
        """Fetch a whole list, or its first items; they stay as they were sent.

        A walk that took longer than the control plane remembers its beginning starts again.
        """
        for _ in range(WALKS_MAX - 1):
            try:
                return self._collect(path, query, at_most)
            except ApiProblem as error:
                if error.problem.code != "cursor_expired":
                    raise
        return self._collect(path, query, at_most)

    def _collect(self, path: str, query: Query, at_most: int | None) -> Listing:
        items: list[msgspec.Raw] = []
        revision = ""
        for page in self.pages(path, query):
            items += page.items
            revision = revision or page.revision
            if at_most is not None and len(items) >= at_most:
                break
        return Listing(tuple(items[:at_most]), revision)

    @contextlib.contextmanager
    def stream(self, path: str, query: Query, last_event_id: str) -> Iterator[Iterator[bytes]]:
        """Open an event stream and hand out its lines as they come, without their ends.

        Raises ApiProblem, Unreachable (also when it breaks or falls silent), UnexpectedAnswer.
        """
        headers = {"Accept": EVENT_STREAM}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        with self._opened(_with_query(path, query), EVENT_STREAM, headers) as response:
            yield _while_it_lasts(_lines(response), self._endpoints[0].host)

    @contextlib.contextmanager
    def download(self, path: str) -> Iterator[Iterator[bytes]]:
        """Open an answer of any size and hand out its pieces as they come. Raises as ``stream``."""
        with self._opened(path, BYTES, {"Accept": f"{BYTES}, */*;q=0.5"}) as response:
            pieces = iter(lambda: response.read(PIECE_BYTES), b"")
            yield _while_it_lasts(pieces, self._endpoints[0].host)

    @contextlib.contextmanager
    def _opened(
        self, target: str, kind: str, more_headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a GET on a connection of its own, and hand out the answer while it comes."""
        self.close()
        connection = self._connected()
        assert connection.sock is not None, "a connected connection has a socket"
        connection.sock.settimeout(STREAM_SILENCE_S)
        try:
            try:
                connection.request("GET", target, None, self._headers(None) | more_headers)
                response = connection.getresponse()
                _check_streamed(target, response, kind)
            except (OSError, http.client.HTTPException) as error:
                raise _lost("GET", connection.host, error) from error
            yield response
        finally:
            self.close()

    def post(
        self, path: str, body: object = None, query: Query = (), extra_timeout_s: float = 0.0
    ) -> Answer:
        encoded = msgspec.json.encode({} if body is None else body)
        return self.write("POST", _with_query(path, query), encoded, extra_timeout_s)

    def delete(self, path: str, query: Query = ()) -> Answer:
        return self.write("DELETE", _with_query(path, query), None)

    def patch(self, path: str, body: object) -> Answer:
        return self.write("PATCH", path, msgspec.json.encode(body))

    def write(
        self, method: str, path: str, body: bytes | None, extra_timeout_s: float = 0.0
    ) -> Answer:
        """Send a change; again, under its one key, where that cannot make it twice.

        Raises ApiProblem, Unreachable, UnexpectedAnswer.
        """
        key = {"Idempotency-Key": secrets.token_hex(16)}

        def send() -> Answer:
            self.close()
            return self._exchange(method, path, body, key, extra_timeout_s)

        return self._repeated(send, self._may_send_again)

    def _repeated(self, send: Callable[[], Answer], worth_it: Callable[[CliError], bool]) -> Answer:
        delays = BACKOFF.delays(self._rng)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return send()
            except (Unreachable, ApiProblem) as error:
                if attempt == ATTEMPTS or not worth_it(error):
                    raise
                if attempt == 1:
                    self._terminal.tell(f"{error}; trying again")
            self._terminal.sleep(next(delays))
        raise AssertionError("the last attempt returns or raises")

    def _may_send_again(self, error: CliError) -> bool:
        """Tell whether a write that failed so is worth sending again, and safe to."""
        if not _worth_repeating(error):
            return False
        return not _is_ambiguous(error) or self._keys_are_kept()

    def _keys_are_kept(self) -> bool:
        """Tell whether the control plane is new enough; when it does not say, it is not."""
        try:
            version = self.get_as(ClusterView, f"{BASE}/cluster").version
        except CliError:
            return False
        return release_of(version) >= KEYS_SINCE

    def _exchange(
        self,
        method: str,
        target: str,
        body: bytes | None,
        more_headers: dict[str, str],
        extra_timeout_s: float,
    ) -> Answer:
        connection = self._connected()
        assert connection.sock is not None, "a connected connection has a socket"
        connection.sock.settimeout(ANSWER_TIMEOUT_S + extra_timeout_s)
        try:
            connection.request(method, target, body, self._headers(body) | more_headers)
            response = connection.getresponse()
            data = response.read(ANSWER_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _lost(method, connection.host, error) from error
        if len(data) > ANSWER_BYTES_MAX:
            self.close()
            raise UnexpectedAnswer(f"the answer is larger than {ANSWER_BYTES_MAX} bytes")
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, data)
        self._revision = headers.get("x-novacron-revision", self._revision)
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise ApiProblem(_problem(answer, response.reason))
        return answer

    def _headers(self, body: bytes | None) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self._token}", "Accept": f"{JSON}, */*;q=0.5"}
        if body is not None:
            headers["Content-Type"] = JSON
        if self._revision:
            headers["X-Novacron-Min-Revision"] = self._revision
        return headers

    def _connected(self) -> http.client.HTTPSConnection:
        """Return an open connection to the first endpoint that accepts one.

        Trying the next is safe for every method: nothing has been sent yet.
        """
        if self._connection is not None and self._connection.sock is not None:
            return self._connection
        faults = []
        untrusted = 0
        for endpoint in tuple(self._endpoints):
            try:
                self._connection = self._connect(endpoint)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                faults.append(f"{endpoint.url}: {_reason(error)}")
                untrusted += isinstance(error, ssl.SSLCertVerificationError)
                continue
            # The one that answered is asked first from now on.
            self._endpoints.remove(endpoint)
            self._endpoints.insert(0, endpoint)
            return self._connection
        told = f"cannot reach the API: {'; '.join(faults)}"
        if untrusted == len(faults):
            raise Untrusted(told, "check the address, and log in with the CA of this cell")
        raise Unreachable(told, "check the address, and that a replica runs there")

    def _connect(self, endpoint: Endpoint) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(
            endpoint.host, endpoint.port, timeout=CONNECT_TIMEOUT_S, context=self._tls
        )
        try:
            connection.connect()
            _check_speaks_for_replica(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def _check_streamed(target: str, response: http.client.HTTPResponse, kind: str) -> None:
    """Raise ApiProblem, UnexpectedAnswer unless what comes is what was asked for."""
    found = response.headers.get("content-type", "")
    if response.status >= HTTPStatus.BAD_REQUEST:
        answer = Answer(response.status, {"content-type": found}, response.read(LINE_BYTES_MAX))
        raise ApiProblem(_problem(answer, response.reason))
    if not found.startswith(kind):
        path = target.partition("?")[0]
        raise UnexpectedAnswer(f"{path} does not answer with a stream of {kind} but {found!r}")


def _while_it_lasts(pieces: Iterator[bytes], host: str) -> Iterator[bytes]:
    """Yield what comes, and say so when it breaks off; what its reader does is not its business."""
    try:
        yield from pieces
    except (OSError, http.client.HTTPException) as error:
        raise _lost("GET", host, error) from error


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while line := response.readline(LINE_BYTES_MAX + 1):
        if len(line) > LINE_BYTES_MAX:
            raise UnexpectedAnswer(f"a line of the stream is longer than {LINE_BYTES_MAX} bytes")
        yield line.rstrip(b"\r\n")


def _tls_context(ca_pem: str) -> ssl.SSLContext:
    if not ca_pem:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise NotLoggedIn(
            f"the CA certificate is not valid PEM: {error}", "log in again with --ca FILE"
        ) from error
    return context


def _check_speaks_for_replica(connection: http.client.HTTPSConnection) -> None:
    """Refuse a node's certificate: it is of the same CA, and names the loopback too.

    A certificate without an identity of NovaCron passes; a proxy may stand in front.
    """
    assert isinstance(connection.sock, ssl.SSLSocket), "HTTPS connects with TLS"
    names: Mapping[str, object] = connection.sock.getpeercert() or {}
    alternatives = names.get("subjectAltName", ())
    assert isinstance(alternatives, tuple), "as ssl documents it"
    for kind, value in alternatives:
        if kind != "URI" or not value.startswith(f"{SCHEME}://"):
            continue
        try:
            identity = parse_identity(value)
        except Unauthenticated as error:
            raise ssl.SSLCertVerificationError(str(error)) from error
        if identity.role is not Role.REPLICA:
            raise ssl.SSLCertVerificationError(
                f"the certificate there is of {identity}, not of a replica"
            )


def _problem(answer: Answer, reason: str) -> ProblemView:
    """Return the answer's problem; one is made up for a proxy that sends something else."""
    if "problem+json" in answer.headers.get("content-type", ""):
        try:
            problem = msgspec.json.decode(answer.body, type=ProblemView)
        except msgspec.DecodeError:
            problem = ProblemView()
        if problem.status == answer.status:
            return problem
    text = answer.body[:200].decode("utf-8", "replace").strip()
    return ProblemView(title=reason or "the request failed", status=answer.status, detail=text)


def _worth_repeating(error: CliError) -> bool:
    if isinstance(error, ApiProblem):
        return error.problem.retryable or error.problem.status in {502, 503, 504}
    return not isinstance(error, Untrusted)


def _lost(method: str, host: str, error: Exception) -> Unreachable:
    message = f"the connection to {host} broke: {_reason(error)}"
    if method == "GET":
        return Unreachable(message)
    return Interrupted(
        f"{message}; the change may or may not have been made",
        "look whether it happened before you repeat it",
    )


def _is_ambiguous(error: CliError) -> bool:
    """Tell whether a write that failed so may have been made all the same."""
    if isinstance(error, ApiProblem):
        # A proxy in front says 502 or 504 also for what it passed on.
        return error.problem.code in {"outcome_unknown", ""}
    return isinstance(error, Interrupted)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {getattr(error, 'verify_message', error)}"
    if isinstance(error, TimeoutError):
        return "timed out"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _with_query(path: str, query: Query) -> str:
    return f"{path}?{urlencode(query)}" if query else path
