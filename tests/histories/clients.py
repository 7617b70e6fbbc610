"""The clients: each does one thing after the other on VMs that are never started, and logs it all.

They ask replicas at random, and another one only after an answer which says that nothing was done.
Now and then they are too hasty to wait for an answer, or patient enough to outwait a fault. Every
value that they write is new.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Mapping
from urllib.parse import urlencode

from msgspec import Struct
from msgspec.structs import replace

from tests.histories.answers import NEVER_SENT, outcome_of
from tests.histories.https import Answer, NeverSent, NoAnswer, Wire
from tests.histories.moments import moment_of
from tests.histories.record import (
    WRITES,
    Attempt,
    Freshness,
    HistoryLog,
    Kind,
    Outcome,
    Page,
    Seen,
)

BASE = "/api/v1/vms"
METHODS = {
    Kind.CREATE: "POST",
    Kind.CHANGE: "PATCH",
    Kind.CONFIRM: "PATCH",
    Kind.DELETE: "DELETE",
    Kind.GET: "GET",
    Kind.LIST: "GET",
}
# How often each is done, of a hundred.
SHARES = {
    Kind.CREATE: 22,
    Kind.CHANGE: 37,
    Kind.CONFIRM: 7,
    Kind.DELETE: 10,
    Kind.GET: 19,
    Kind.LIST: 5,
}
# Of changes and deletions, how many are for one version; of those, for the newest that was seen.
CONDITIONAL = 0.55
NEWEST = 0.85
# Of writes, how many have a key; of these, how many that were not answered are sent again.
KEYED = 0.3
REPEATED = 0.7
# Of all operations, how many send an old request with its key once more.
AGAIN = 0.03
# Of writes, how many wait no longer than such a write usually takes; of all, how many are patient.
HASTY = 0.45
PATIENT = 0.08
# How many are done to the name that is everybody's at the moment, and how long a moment is: so that
# changes of one VM meet in one commit.
HOT = 0.5
MOMENT_NS = 300_000_000
# How many of those that are denied look at once what is there instead.
CURIOUS = 0.6
# Reads that ask for no revision show little. Writes that ask for none are what a replica that is
# behind, or that leads no more, might answer from its old memory.
FRESHNESS_OF_READS = {Freshness.ANY: 2, Freshness.SESSION: 4, Freshness.LATEST: 4}
FRESHNESS_OF_WRITES = {Freshness.ANY: 4, Freshness.SESSION: 3, Freshness.LATEST: 3}
WALK_SHARE = 0.5
WALK_LIMIT = 7
PAGES_MAX = 30

LIMIT_S = 1.5
# A suspended replica stays so for less.
PATIENT_LIMIT_S = 12.0
ATTEMPTS_MAX = 200
PAUSE_S = 0.03
RETRY_PAUSE_S = 0.06
REMEMBERED = 12


class Board:
    """What the clients share: numbers for their operations, and the newest revision of all."""

    def __init__(self, run: str, names: tuple[str, ...]) -> None:
        self.run = run
        self.names = names
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._operations = 0
        self._newest = ""

    @property
    def operations(self) -> int:
        return self._operations

    def hot_name(self) -> str:
        return self.names[time.monotonic_ns() // MOMENT_NS % len(self.names)]

    def next_operation(self) -> int:
        with self._lock:
            self._operations += 1
            return self._operations

    def note(self, revision: str) -> None:
        with self._lock:
            self._newest = newer(self._newest, revision)

    def newest(self) -> str:
        with self._lock:
            return self._newest


class Plan(Struct, frozen=True, kw_only=True):
    """What one operation is to be; its attempts differ in who is asked, and when."""

    kind: Kind
    name: str = ""
    value: str = ""
    if_match: str = ""
    key: str = ""
    freshness: Freshness = Freshness.ANY
    page_limit: int = 0


class Client:
    """One client; ``run`` is the body of its thread."""

    def __init__(
        self, number: int, board: Board, wire: Wire, log: HistoryLog, rng: random.Random
    ) -> None:
        self._number = number
        self._board = board
        self._wire = wire
        self._log = log
        self._rng = rng
        self._revision = ""
        self._etags: dict[str, deque[str]] = {
            name: deque(maxlen=REMEMBERED) for name in board.names
        }
        self._keyed: deque[Plan] = deque(maxlen=REMEMBERED)
        self._usual_s = 0.05

    def run(self) -> None:
        """Do one thing after the other until the board says to stop."""
        while not self._board.stop.is_set():
            plan = self._next_plan()
            if self.do(plan) is Outcome.DENIED and self._rng.random() < CURIOUS:
                self.do(self._planned(Kind.GET, plan.name))
            self._board.stop.wait(self._rng.expovariate(1 / PAUSE_S))
        self._wire.close()

    def do(self, plan: Plan, only: str = "") -> Outcome:
        """Do one operation, at one replica only if that is named; returns what it came to."""
        operation = self._board.next_operation()
        may_be_done = False
        for _ in range(ATTEMPTS_MAX):
            replica = only or self._rng.choice(self._wire.replicas())
            attempt = self._attempt(operation, plan, replica)
            self._log.add(attempt)
            self._learn(attempt)
            may_be_done = may_be_done or attempt.outcome is Outcome.UNKNOWN
            if attempt.outcome is Outcome.UNKNOWN and plan.key and self._rng.random() < REPEATED:
                continue
            if attempt.outcome is not Outcome.NOT_DONE or self._board.stop.is_set():
                break
            if not may_be_done:
                # With other words, so that it shows if the first ones were taken all the same.
                plan = self._renewed(plan)
            self._board.stop.wait(self._rng.uniform(0, 2 * RETRY_PAUSE_S))
        if plan.key:
            self._keyed.append(plan)
        return attempt.outcome

    def _next_plan(self) -> Plan:
        rng = self._rng
        if self._keyed and rng.random() < AGAIN:
            return rng.choice(self._keyed)
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if kind is Kind.LIST:
            limit = WALK_LIMIT if rng.random() < WALK_SHARE else 0
            return replace(self._planned(kind), page_limit=limit)
        name = self._board.hot_name() if rng.random() < HOT else rng.choice(self._board.names)
        may = kind in (Kind.CHANGE, Kind.DELETE) and rng.random() < CONDITIONAL
        conditional = may or kind is Kind.CONFIRM
        etags = self._etags[name]
        if conditional and not etags:
            return self._planned(Kind.GET, name)
        keyed = kind in WRITES and kind is not Kind.CONFIRM and rng.random() < KEYED
        return replace(
            self._planned(kind, name),
            value=self._new_value() if kind in (Kind.CREATE, Kind.CHANGE) else "",
            if_match=self._etag(etags) if conditional else "",
            key=self._new_key() if keyed else "",
        )

    def _planned(self, kind: Kind, name: str = "") -> Plan:
        shares = FRESHNESS_OF_WRITES if kind in WRITES else FRESHNESS_OF_READS
        freshness = self._rng.choices(list(shares), list(shares.values()))[0]
        return Plan(kind=kind, name=name, freshness=freshness)

    def _renewed(self, plan: Plan) -> Plan:
        return replace(
            plan,
            value=self._new_value() if plan.value else "",
            key=self._new_key() if plan.key else "",
        )

    def _new_key(self) -> str:
        return f"{self._board.run}.{self._number}.{self._rng.getrandbits(64):016x}"

    def _etag(self, etags: deque[str]) -> str:
        return etags[-1] if self._rng.random() < NEWEST else self._rng.choice(etags)

    def _new_value(self) -> str:
        return f"{self._number}-{self._rng.getrandbits(40):010x}"

    def _attempt(self, operation: int, plan: Plan, replica: str) -> Attempt:
        invoked_ns = time.monotonic_ns()
        # After the time was taken: what had been answered by then is asked for.
        revision = self._asked_revision(plan.freshness)
        asked = Attempt(
            operation=operation,
            client=self._number,
            kind=plan.kind,
            name=plan.name,
            value=plan.value,
            if_match=plan.if_match,
            key=plan.key,
            freshness=plan.freshness if revision else Freshness.ANY,
            min_revision=revision,
            replica=replica,
            invoked_ns=invoked_ns,
            returned_ns=invoked_ns,
            outcome=Outcome.UNKNOWN,
        )
        try:
            if plan.kind is Kind.LIST:
                answered = self._walked(asked, plan.page_limit)
            else:
                answered = _told(asked, self._ask(asked, replica, self._target(plan)))
        except NeverSent:
            answered = replace(asked, outcome=Outcome.NOT_DONE, code=NEVER_SENT)
        except NoAnswer:
            answered = asked
        return replace(answered, returned_ns=time.monotonic_ns())

    def _asked_revision(self, freshness: Freshness) -> str:
        if freshness is Freshness.ANY:
            return ""
        return self._board.newest() if freshness is Freshness.LATEST else self._revision

    def _target(self, plan: Plan) -> str:
        return BASE if plan.kind is Kind.CREATE else f"{BASE}/{plan.name}"

    def _ask(self, asked: Attempt, replica: str, target: str) -> Answer:
        headers = {}
        if asked.min_revision:
            headers["X-Novacron-Min-Revision"] = asked.min_revision
        if asked.if_match:
            headers["If-Match"] = asked.if_match
        if asked.key:
            headers["Idempotency-Key"] = asked.key
        method, body = METHODS[asked.kind], self._body(asked)
        began_s = time.monotonic()
        answer = self._wire.ask(replica, method, target, headers, body, self._limit_s(asked))
        if asked.kind in WRITES:
            self._usual_s += 0.1 * (min(time.monotonic() - began_s, LIMIT_S) - self._usual_s)
        revision = answer.headers.get("x-novacron-revision", "")
        if revision:
            self._revision = newer(self._revision, revision)
            self._board.note(revision)
        return answer

    def _body(self, asked: Attempt) -> object:
        if asked.kind is Kind.CREATE:
            labels = {"run": self._board.run, "born": asked.value, "value": asked.value}
            boot = {"kernel": "tiny-kernel"}
            spec = {"vcpus": 1, "memory_mib": 64, "power": "stopped", "boot": boot}
            return {"name": asked.name, "labels": labels, "spec": spec}
        if asked.kind is Kind.CHANGE:
            return {"labels": {"value": asked.value}}
        if asked.kind is Kind.CONFIRM:
            return {"labels": {"run": self._board.run}}
        return None

    def _limit_s(self, asked: Attempt) -> float:
        if asked.kind in WRITES and self._rng.random() < HASTY:
            return max(0.001, self._usual_s * self._rng.random())
        return PATIENT_LIMIT_S if self._rng.random() < PATIENT else LIMIT_S

    def _walked(self, asked: Attempt, page_limit: int) -> Attempt:
        """Ask for a list, in pages of so many if that is said, each at whoever comes first."""
        query = {"label": f"run={self._board.run}", "limit": str(page_limit or 500)}
        pages: list[Page] = []
        replica = asked.replica
        for _ in range(PAGES_MAX):
            answer = self._ask(asked, replica, f"{BASE}?{urlencode(query)}")
            told = _told(asked, answer)
            if told.outcome is not Outcome.OK:
                return told
            pages.append(_page(replica, answer))
            cursor = answer.text("next_cursor")
            if not cursor:
                return replace(told, pages=tuple(pages))
            query["cursor"] = cursor
            replica = self._rng.choice(self._wire.replicas())
        raise AssertionError(f"a list of {len(self._board.names)} names goes on for ever")

    def _learn(self, attempt: Attempt) -> None:
        shown = [attempt.seen] if attempt.seen else []
        for seen in (*shown, *(each for page in attempt.pages for each in page.seen)):
            etags = self._etags.get(seen.name)
            if etags is not None and (not etags or etags[-1] != seen.etag):
                etags.append(seen.etag)


def tls_context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def newer(one: str, other: str) -> str:
    """Return the newer one of two revisions, of which one or both may be empty."""
    return max(one, other, key=lambda each: moment_of(each) if each else (0, 0))


def _told(asked: Attempt, answer: Answer) -> Attempt:
    """Return an attempt with what an answer says; of a list all but its items."""
    code = answer.text("code") if answer.status >= 400 else ""
    told = replace(
        asked,
        outcome=outcome_of(asked.kind, answer.status, code),
        status=answer.status,
        code=code,
        revision=answer.headers.get("x-novacron-revision", ""),
        replayed=answer.headers.get("idempotency-replayed") == "true",
    )
    if told.outcome is not Outcome.OK or told.code or asked.kind is Kind.LIST:
        return told
    if asked.kind in (Kind.CREATE, Kind.DELETE):
        return replace(told, operation_id=answer.text("id"), target=answer.text("target"))
    return replace(told, seen=_seen(answer.body, answer.headers.get("etag", "")))


def _page(replica: str, answer: Answer) -> Page:
    # In a list there are no ETags; an ETag is an object's revision in quotes.
    seen = tuple(_seen(item, f'"{item["revision"]}"') for item in answer.body["items"])
    return Page(replica=replica, revision=answer.text("revision"), seen=seen)


def _seen(vm: Mapping[str, object], etag: str) -> Seen:
    labels = vm["labels"]
    assert isinstance(labels, dict), "a VM has labels"
    return Seen(
        name=str(vm["name"]),
        id=str(vm["id"]),
        born=labels.get("born", ""),
        value=labels.get("value", ""),
        etag=etag,
    )
