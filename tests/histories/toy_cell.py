"""A cell that keeps every promise, in one dictionary: for histories that are known to be right.

Operations take effect one after the other, each at a moment of its own; its request and its answer
lie before and after that moment, so that operations overlap. A replica may be behind.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from tests.histories.answers import DELETED_SINCE, MOVED_ON, NAME_TAKEN, NOT_FOUND
from tests.histories.record import (
    Attempt,
    Freshness,
    Head,
    History,
    Kind,
    Outcome,
    Page,
    Seen,
)

# Moments are so far apart.
TICK_NS = 100


class ToyVm(Struct, frozen=True):
    id: str
    born: str
    value: str
    since: int


class Wish(Struct, frozen=True, kw_only=True):
    """What a client asks for, and how it goes.

    ``early`` and ``late``: how long before and after its moment it is sent and answered.
    ``lost``: there is no answer; with ``in_vain`` nothing was done either. ``behind``: by how many
    revisions the replica is, if it may be.
    """

    client: int
    kind: Kind
    name: str = ""
    value: str = ""
    if_match: str = ""
    key: str = ""
    freshness: Freshness = Freshness.ANY
    early: int = 10
    late: int = 10
    lost: bool = False
    in_vain: bool = False
    behind: int = 0


class ToyCell:
    def __init__(self, *names: str) -> None:
        self._names = names
        self._moment = 0
        self._operation = 0
        self._born = 0
        self._vms: dict[str, ToyVm] = {}
        self._done: dict[str, Attempt] = {}
        # What there was at each revision, the first being 1.
        self._past: list[dict[str, ToyVm]] = [{}, {}]
        self.attempts: list[Attempt] = []

    def history(self) -> History:
        clients = len({each.client for each in self.attempts})
        head = Head(seed=0, clients=clients, names=self._names, replicas=("r1",))
        return History(head=head, attempts=tuple(self.attempts))

    def etag(self, name: str) -> str:
        """Return the present ETag of a VM; of a name that nobody has, one that nothing has."""
        return _etag(self._vms[name].since) if name in self._vms else '"1.0"'

    def do(self, wish: Wish) -> Attempt:
        """Do what is wished, and return what is seen of it."""
        self._moment += TICK_NS
        self._operation += 1
        invoked_ns = self._moment - wish.early
        asked = Attempt(
            operation=self._operation,
            client=wish.client,
            kind=wish.kind,
            name=wish.name,
            value=wish.value,
            if_match=wish.if_match,
            key=wish.key,
            freshness=wish.freshness,
            min_revision=self._min_revision(wish, invoked_ns),
            replica="r1",
            invoked_ns=invoked_ns,
            returned_ns=self._moment + wish.late,
            outcome=Outcome.UNKNOWN,
        )
        answered = asked if wish.in_vain else self._answered(asked, wish.behind)
        self.attempts.append(asked if wish.lost else answered)
        return self.attempts[-1]

    def again(self, client: int, attempt: Attempt, early: int = 10, late: int = 10) -> Attempt:
        """Send a request with a key once more."""
        return self.do(
            Wish(
                client=client,
                kind=attempt.kind,
                name=attempt.name,
                value=attempt.value,
                if_match=attempt.if_match,
                key=attempt.key,
                early=early,
                late=late,
            )
        )

    def _min_revision(self, wish: Wish, invoked_ns: int) -> str:
        seen = [
            each.revision
            for each in self.attempts
            if each.revision and each.returned_ns < invoked_ns
            if wish.freshness is Freshness.LATEST or each.client == wish.client
        ]
        if wish.freshness is Freshness.ANY or not seen:
            return ""
        return max(seen, key=_number)

    def _answered(self, asked: Attempt, behind: int) -> Attempt:
        if asked.key in self._done:
            return self._replayed(asked)
        if asked.kind in (Kind.GET, Kind.LIST):
            return self._read(asked, behind)
        answered = self._written(asked)
        if asked.key and answered.outcome is Outcome.OK:
            self._done[asked.key] = answered
        return answered

    def _read(self, asked: Attempt, behind: int) -> Attempt:
        lowest = _number(asked.min_revision) if asked.min_revision else 1
        at = max(lowest, len(self._past) - 1 - behind)
        then = self._past[at]
        if asked.kind is Kind.LIST:
            seen = tuple(_seen(name, vm) for name, vm in sorted(then.items()))
            page = Page(replica="r1", revision=_revision(at), seen=seen)
            return _with(asked, Outcome.OK, at, pages=(page,))
        if asked.name not in then:
            return _with(asked, Outcome.DENIED, at, code=NOT_FOUND)
        return _with(asked, Outcome.OK, at, seen=_seen(asked.name, then[asked.name]))

    def _written(self, asked: Attempt) -> Attempt:
        vm = self._vms.get(asked.name)
        now = len(self._past) - 1
        if asked.kind is Kind.CREATE:
            if vm is not None:
                return _with(asked, Outcome.DENIED, now, code=NAME_TAKEN)
            self._born += 1
            made = ToyVm(f"vm-{self._born}", asked.value, asked.value, now + 1)
            self._commit(asked.name, made)
            return _with(asked, Outcome.OK, now + 1, target=made.id, operation_id=_operation(asked))
        if vm is None:
            return _with(asked, Outcome.DENIED, now, code=NOT_FOUND)
        if asked.if_match and asked.if_match != _etag(vm.since):
            return _with(asked, Outcome.DENIED, now, code=MOVED_ON)
        if asked.kind is Kind.CONFIRM:
            return _with(asked, Outcome.OK, now, seen=_seen(asked.name, vm))
        if asked.kind is Kind.DELETE:
            self._commit(asked.name, None)
            return _with(asked, Outcome.OK, now + 1, target=vm.id, operation_id=_operation(asked))
        changed = ToyVm(vm.id, vm.born, asked.value, now + 1)
        self._commit(asked.name, changed)
        return _with(asked, Outcome.OK, now + 1, seen=_seen(asked.name, changed))

    def _replayed(self, asked: Attempt) -> Attempt:
        done, now = self._done[asked.key], len(self._past) - 1
        if done.seen is None:
            return _with(
                asked,
                Outcome.OK,
                now,
                target=done.target,
                operation_id=done.operation_id,
                replayed=True,
            )
        vm = self._vms.get(asked.name)
        if vm is None or vm.id != done.seen.id:
            return _with(asked, Outcome.OK, now, code=DELETED_SINCE)
        return _with(asked, Outcome.OK, now, seen=_seen(asked.name, vm), replayed=True)

    def _commit(self, name: str, vm: ToyVm | None) -> None:
        if vm is None:
            del self._vms[name]
        else:
            self._vms[name] = vm
        self._past.append(dict(self._vms))


def _with(
    asked: Attempt,
    outcome: Outcome,
    at: int,
    *,
    code: str = "",
    seen: Seen | None = None,
    pages: tuple[Page, ...] = (),
    operation_id: str = "",
    target: str = "",
    replayed: bool = False,
) -> Attempt:
    return replace(
        asked,
        outcome=outcome,
        code=code,
        revision=_revision(at),
        seen=seen,
        pages=pages,
        operation_id=operation_id,
        target=target,
        replayed=replayed,
    )


def _seen(name: str, vm: ToyVm) -> Seen:
    return Seen(name=name, id=vm.id, born=vm.born, value=vm.value, etag=_etag(vm.since))


def _etag(since: int) -> str:
    return f'"1.{since}"'


def _revision(number: int) -> str:
    return f"1.{number}.0"


def _number(revision: str) -> int:
    return int(revision.split(".")[1])


def _operation(asked: Attempt) -> str:
    return f"op-{asked.operation}"
