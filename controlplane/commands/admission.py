"""Who lets nodes in, and what becomes of their certificates."""

from __future__ import annotations

from datetime import datetime, timedelta
from fnmatch import fnmatchcase

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from shared.admission import Admission, JoinToken
from shared.errors import Conflict, Forbidden, NotFound, StateConflict, Unauthenticated

# Tokens that are good at one time; each is for one node.
TOKENS_MAX = 1_000
# Of those that are over, so many go with each that is made: a transaction has room for 128 writes.
SWEPT_AT_ONCE = 20
# A node that waits for its approval asks again with its token; so long after the token's end, too.
KEPT_AFTER_END = timedelta(days=1)


class MakeJoinToken(Struct, frozen=True, kw_only=True, tag="make_join_token"):
    """Stores a token. Returns its id. Raises Conflict when there are too many."""

    id: str
    sha256: str
    nodes: tuple[str, ...]
    needs_approval: bool
    lifetime_s: float
    by: Author

    def decide(self, draft: Draft) -> str:
        tokens = list(draft.all_of(JoinToken))
        over = [each.id for each in tokens if each.expires_at + KEPT_AFTER_END < draft.now]
        for token_id in sorted(over)[:SWEPT_AT_ONCE]:
            draft.delete(JoinToken, token_id)
        good = sum(not each.used_by and each.expires_at > draft.now for each in tokens)
        if good >= TOKENS_MAX:
            raise Conflict(f"{TOKENS_MAX} join tokens wait for a node already: withdraw some")
        draft.put(
            JoinToken(
                id=self.id,
                sha256=self.sha256,
                nodes=self.nodes,
                needs_approval=self.needs_approval,
                created_at=draft.now,
                created_by=self.by.principal,
                expires_at=draft.now + timedelta(seconds=self.lifetime_s),
            )
        )
        draft.audit("join_token.created", self.id, self.by)
        return self.id


class WithdrawJoinToken(Struct, frozen=True, kw_only=True, tag="withdraw_join_token"):
    """Has nobody join with a token from now on. Returns its id. Raises NotFound."""

    id: str
    by: Author

    def decide(self, draft: Draft) -> str:
        if draft.find(JoinToken, self.id) is None:
            raise NotFound(f"there is no join token {self.id}")
        draft.delete(JoinToken, self.id)
        draft.audit("join_token.withdrawn", self.id, self.by)
        return self.id


class Enrol(Struct, frozen=True, kw_only=True, tag="enrol"):
    """Lets a node in for a token, whose secret was proven, or has it wait for approval.

    ``serial`` is of the certificate that is handed out when this returns APPROVED; WAITING hands
    none out. A node that is there already is displaced by nobody: it is revoked first. Raises
    Unauthenticated for a token that is over or another's, Forbidden for a name that it is not for,
    Conflict for a name or an address that another machine has.
    """

    token_id: str
    name: str
    address: str
    key_sha256: str
    serial: str
    expires_at: datetime

    def decide(self, draft: Draft) -> str:
        token = draft.find(JoinToken, self.token_id)
        if token is None:
            raise Unauthenticated("there is no such join token: make another")
        known = draft.find(Admission, self.name)
        if not token.used_by:
            known = self._use(draft, token, known)
        elif (token.used_by, token.used_key) != (self.name, self.key_sha256):
            raise Unauthenticated(f"the join token was used for node {token.used_by!r}")
        elif known is None or known.token != token.id or known.revoked_at is not None:
            raise Unauthenticated("the join token was used: make another")
        elif known.address != self.address:
            raise Conflict(f"node {self.name!r} has asked to join as {known.address} before")
        elif known.serials and token.expires_at < draft.now:
            raise Unauthenticated(_over(token))
        if not known.approved:
            return WAITING
        draft.put(replace(known, serials=(self.serial,), expires_at=self.expires_at))
        return APPROVED

    def _use(self, draft: Draft, token: JoinToken, known: Admission | None) -> Admission:
        if token.expires_at < draft.now:
            raise Unauthenticated(_over(token))
        if token.nodes and not any(fnmatchcase(self.name, each) for each in token.nodes):
            raise Forbidden(f"the join token is for {', '.join(token.nodes)}, not {self.name!r}")
        self._refuse_to_displace(draft, known)
        draft.put(replace(token, used_by=self.name, used_key=self.key_sha256))
        admission = Admission(
            id=self.name,
            address=self.address,
            approved=not token.needs_approval,
            key_sha256=self.key_sha256,
            token=token.id,
            created_at=draft.now,
        )
        draft.put(admission)
        by = Author(f"join:{token.id}")
        kind = "node.waits_for_approval" if token.needs_approval else "node.admitted"
        draft.event(kind, self.name, by, name=self.name, address=self.address)
        draft.audit(kind, self.name, by)
        return admission

    def _refuse_to_displace(self, draft: Draft, known: Admission | None) -> None:
        """Raise Conflict for what another machine has, or may have.

        One that came this far before, and lost what it was given, has the same key. A node that
        nobody has heard of has no guests that would be started a second time.
        """
        is_shut_out = known is not None and known.revoked_at is not None
        is_same = known is not None and known.key_sha256 == self.key_sha256
        if draft.node_by_name(self.name) is not None and not (is_shut_out or is_same):
            raise Conflict(
                f"there is a node {self.name!r}: if this machine takes its place, make sure that "
                f"the other is off, and revoke it first (novacron node revoke {self.name})"
            )
        revoked = {each.id for each in draft.all_of(Admission) if each.revoked_at is not None}
        taken = {each.id: each.address for each in draft.all_of(Admission)}
        taken |= {node.name: node.address for node in draft.nodes()}
        for name, address in sorted(taken.items()):
            if address.lower() != self.address.lower() or name in revoked | {self.name}:
                continue
            raise Conflict(
                f"node {name!r} has the address {self.address}: revoke it first "
                f"(novacron node revoke {name}) if this machine takes its place"
            )


APPROVED = "approved"
WAITING = "waiting"


class ApproveNode(Struct, frozen=True, kw_only=True, tag="approve_node"):
    """Lets a node in that waits for it. Returns its name. Raises NotFound, StateConflict."""

    name: str
    by: Author

    def decide(self, draft: Draft) -> str:
        known = draft.find(Admission, self.name)
        if known is None:
            raise NotFound(f"no node {self.name!r} has asked to join")
        if known.revoked_at is not None:
            raise StateConflict(f"node {self.name!r} is revoked: it joins with a new token")
        if known.approved:
            raise StateConflict(f"node {self.name!r} is admitted already")
        draft.put(replace(known, approved=True))
        draft.event("node.admitted", self.name, self.by, name=self.name, address=known.address)
        draft.audit("node.admitted", self.name, self.by)
        return self.name


class RevokeNode(Struct, frozen=True, kw_only=True, tag="revoke_node"):
    """Has nothing speak for a node any more, until it joins anew. Returns its name.

    Nothing is done to its VMs: they run on, and nobody hears of them. Raises NotFound,
    StateConflict.
    """

    name: str
    reason: str
    by: Author

    def decide(self, draft: Draft) -> str:
        known = draft.find(Admission, self.name)
        if known is None and draft.node_by_name(self.name) is None:
            raise NotFound(f"there is no node {self.name!r}")
        if known is not None and known.revoked_at is not None:
            raise StateConflict(f"node {self.name!r} is revoked already")
        shut_out(draft, self.name, self.reason)
        draft.event("node.revoked", self.name, self.by, name=self.name, reason=self.reason)
        draft.audit("node.revoked", self.name, self.by)
        return self.name


def shut_out(draft: Draft, name: str, reason: str) -> None:
    """Have no certificate speak for a node until it joins anew."""
    known, node = draft.find(Admission, name), draft.node_by_name(name)
    if known is None:
        # It came with a certificate of ``novacron init``, of which no record is kept.
        address = "" if node is None else node.address
        known = Admission(id=name, address=address, approved=False, created_at=draft.now)
    draft.put(
        replace(
            known,
            approved=False,
            serials=(),
            expires_at=None,
            revoked_at=draft.now,
            reason=reason,
        )
    )


class RenewCertificate(Struct, frozen=True, kw_only=True, tag="renew_certificate"):
    """Notes that a node is given a new certificate, for the one that it shows. Returns its name.

    Raises Unauthenticated when what it shows does not speak for it.
    """

    name: str
    address: str
    shown: str
    serial: str
    expires_at: datetime

    def decide(self, draft: Draft) -> str:
        known = draft.find(Admission, self.name)
        if (why := refusal_of(known, self.shown)) is not None:
            raise Unauthenticated(why)
        admission = known or Admission(
            id=self.name, address=self.address, approved=True, created_at=draft.now
        )
        draft.put(replace(admission, serials=(self.shown, self.serial), expires_at=self.expires_at))
        return self.name


def refusal_of(admission: Admission | None, serial: str) -> str | None:
    """Return why the holder of a certificate may not speak for its node; None when it may.

    A node without an admission has a certificate of ``novacron init``.
    """
    if admission is None or serial in admission.serials:
        return None
    if admission.revoked_at is not None:
        return (
            f"node {admission.id!r} was revoked at {admission.revoked_at:%Y-%m-%d %H:%M:%S} UTC: "
            "it comes back with a new join token (novacron node join-token)"
        )
    return (
        f"this is not the newest certificate of node {admission.id!r}: has another machine joined "
        "by its name? It comes back with a new join token (novacron node join-token)"
    )


def _over(token: JoinToken) -> str:
    return f"the join token ended at {token.expires_at:%Y-%m-%d %H:%M:%S} UTC: make another"
