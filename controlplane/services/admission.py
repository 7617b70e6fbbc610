"""Use cases of letting nodes in: join tokens, enrolment, approval, renewal, revocation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from msgspec.structs import asdict

from controlplane import tokens
from controlplane.commands.admission import (
    APPROVED,
    ApproveNode,
    Enrol,
    MakeJoinToken,
    RenewCertificate,
    RevokeNode,
    WithdrawJoinToken,
    refusal_of,
)
from controlplane.issuer import Issues
from controlplane.services.context import Context, Permission, Principal
from controlplane.services.pages import cut, records, walk
from controlplane.services.requests import Enrolment, NewJoinToken, PageQuery, RevokeOrder
from controlplane.services.scope import authorize, shown
from controlplane.services.views import (
    AdmissionList,
    AdmissionView,
    EnrolmentView,
    JoinTokenList,
    JoinTokenView,
    NewJoinTokenView,
)
from controlplane.services.vms import author
from shared.admission import Admission, Issued, JoinToken, Renewal
from shared.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from shared.join_token import JoinTokenText, parse_join_token
from shared.model import Record

R = TypeVar("R", bound=Record)


async def make_join_token(
    context: Context, principal: Principal, order: NewJoinToken
) -> NewJoinTokenView:
    """Make a token and return it, this one time. Raises Forbidden, Unavailable, Conflict."""
    authorize(principal, Permission.NODES_WRITE)
    issuer = _issuer(context)
    secret = tokens.new_secret()
    text = JoinTokenText(context.new_id("join"), secret, issuer.ca_sha256)
    await context.submit(
        MakeJoinToken(
            id=text.id,
            sha256=tokens.digest(secret),
            nodes=order.nodes,
            needs_approval=order.needs_approval,
            lifetime_s=order.lifetime_s,
            by=author(principal),
        )
    )
    stored = context.state.join_tokens.get(text.id)
    if stored is None:
        raise NotFound(f"join token {text.id} was withdrawn meanwhile")
    return NewJoinTokenView(**asdict(_token_view(stored.record)), token=str(text))


async def list_join_tokens(
    context: Context, principal: Principal, query: PageQuery
) -> JoinTokenList:
    """Return a page of the tokens that are not over, and those of the last day, oldest first.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable.
    """
    authorize(principal, Permission.NODES_READ)
    page, next_cursor, revision = _page(context, JoinToken, query)
    items = tuple(map(_token_view, page))
    return JoinTokenList(items=items, next_cursor=next_cursor, revision=revision)


async def withdraw_join_token(
    context: Context, principal: Principal, token_id: str
) -> JoinTokenView:
    """Have nobody join with a token any more. Raises Forbidden, NotFound."""
    authorize(principal, Permission.NODES_WRITE)
    stored = context.state.join_tokens.get(token_id)
    if stored is None:
        raise NotFound(f"there is no join token {shown(token_id)}")
    await context.submit(WithdrawJoinToken(id=token_id, by=author(principal)))
    return _token_view(stored.record)


async def enrol(context: Context, enrolment: Enrolment) -> EnrolmentView:
    """Let a node in for a token, and return its certificates once it is approved.

    Raises Unauthenticated, Forbidden, Conflict, ValidationFailed, Unavailable.
    """
    issuer = _issuer(context)
    token = parse_join_token(enrolment.token)
    stored = context.state.join_tokens.get(token.id)
    # Only what has a token's secret is worth the leader's time: others are refused right here.
    if stored is None or not tokens.matches(token.secret, stored.record.sha256):
        raise Unauthenticated("there is no such join token: make another")
    draw = issuer.draw(enrolment.keys())
    outcome = await context.submit(
        Enrol(
            token_id=token.id,
            name=enrolment.name,
            address=enrolment.address,
            key_sha256=draw.key_sha256,
            serial=draw.serial_text,
            expires_at=draw.expires_at,
        )
    )
    if outcome != APPROVED:
        return EnrolmentView(approved=False, certificates=None)
    return EnrolmentView(approved=True, certificates=issuer.issue(enrolment.name, draw))


async def renew(context: Context, name: str, serial: str, renewal: Renewal) -> Issued:
    """Give a node new certificates for the one that it shows.

    Raises Unauthenticated, ValidationFailed, Unavailable; Forbidden for a node nobody knows.
    """
    issuer = _issuer(context)
    draw = issuer.draw(renewal)
    known = context.state.admissions.get(name)
    if (why := refusal_of(None if known is None else known.record, serial)) is not None:
        raise Unauthenticated(why)
    address = _address(context, name)
    await context.submit(
        RenewCertificate(
            name=name,
            address=address,
            shown=serial,
            serial=draw.serial_text,
            expires_at=draw.expires_at,
        )
    )
    return issuer.issue(name, draw)


async def list_admissions(
    context: Context, principal: Principal, query: PageQuery
) -> AdmissionList:
    """Return a page of the nodes that have asked to join, by name.

    Raises Forbidden, ValidationFailed, CursorExpired, Unavailable.
    """
    authorize(principal, Permission.NODES_READ)
    page, next_cursor, revision = _page(context, Admission, query)
    items = tuple(map(admission_view, page))
    return AdmissionList(items=items, next_cursor=next_cursor, revision=revision)


async def approve(context: Context, principal: Principal, name: str) -> AdmissionView:
    """Let a node in that waits for it. Raises Forbidden, NotFound, StateConflict."""
    authorize(principal, Permission.NODES_WRITE)
    _known(context, name)
    await context.submit(ApproveNode(name=name, by=author(principal)))
    return _known(context, name)


async def revoke(
    context: Context, principal: Principal, name: str, order: RevokeOrder
) -> AdmissionView:
    """Have nothing speak for a node any more. Raises Forbidden, NotFound, StateConflict."""
    authorize(principal, Permission.NODES_WRITE)
    if context.state.node_id_by_name(name) is None:
        _known(context, name)
    await context.submit(RevokeNode(name=name, reason=order.reason, by=author(principal)))
    return _known(context, name)


async def read_ca(context: Context) -> bytes:
    """Return whom a node is to trust, for who knows its fingerprint. Raises Unavailable."""
    return _issuer(context).ca


def _page(context: Context, kind: type[R], query: PageQuery) -> tuple[Sequence[R], str | None, str]:
    """Return the records of a page, the cursor of the next, and the list's revision."""
    here = walk(context.state, query.cursor, kind.__name__)
    then = records(context.state, kind, here.at)
    found = [stored.record for stored in map(then.get, then.ids()) if stored is not None]
    page, next_cursor = cut(here, found, query.limit, _id)
    return page, next_cursor, str(here.at)


def _id(record: Record) -> str:
    return record.id


def _issuer(context: Context) -> Issues:
    if context.issuer is None:
        raise Unavailable(
            "this replica holds no CA for nodes: set [enrolment] in its configuration, with the "
            "files that novacron init makes (agents-ca, qemu-ca), and restart it"
        )
    return context.issuer


def _address(context: Context, name: str) -> str:
    """Return under which address a node was let in, or joined."""
    known = context.state.admissions.get(name)
    if known is not None:
        return known.record.address
    node_id = context.state.node_id_by_name(name)
    if node_id is None:
        raise Forbidden(f"no node {shown(name)} has ever joined: it is let in by a join token")
    return context.state.nodes[node_id].record.address


def _known(context: Context, name: str) -> AdmissionView:
    stored = context.state.admissions.get(name)
    if stored is None:
        raise NotFound(f"no node {shown(name)} has asked to join")
    return admission_view(stored.record)


def admission_view(admission: Admission) -> AdmissionView:
    return AdmissionView(
        id=admission.id,
        name=admission.id,
        address=admission.address,
        approved=admission.approved,
        created_at=admission.created_at,
        expires_at=admission.expires_at,
        revoked_at=admission.revoked_at,
        reason=admission.reason,
        join_token=admission.token,
    )


def _token_view(token: JoinToken) -> JoinTokenView:
    return JoinTokenView(
        id=token.id,
        nodes=token.nodes,
        needs_approval=token.needs_approval,
        created_at=token.created_at,
        created_by=token.created_by,
        expires_at=token.expires_at,
        used_by=token.used_by,
    )
