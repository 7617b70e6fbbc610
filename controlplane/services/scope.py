"""Who may do what, and which object a path means: asked first by every use case.

An object of another tenant does not exist for the asker: it is never "forbidden", which would tell
that it is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.services.context import Context, Permission, Principal
from controlplane.state import Stored
from shared.errors import Forbidden, NotFound
from shared.model import Node, Vm

# A path may hold kilobytes; an answer repeats only as much as helps to recognize it.
_SHOWN_MAX = 80
# No object's id: neither names nor ids have other characters than plain ones.
_NOTHING = "-"
# Four times as many as can be named at once; each is a part of one SQL query.
_FOLLOWED_MAX = 64


def authorize(principal: Principal, permission: Permission) -> None:
    """Raise Forbidden unless the principal holds the permission."""
    if permission not in principal.permissions:
        raise Forbidden(f"{principal.name} lacks the permission {permission.value}")


def find_vm(context: Context, principal: Principal, reference: str) -> Stored[Vm]:
    """Return the VM with this id or name in the principal's scope. Raises NotFound."""
    tenant = principal.scope.tenant
    stored = context.state.vms.get(reference)
    if stored is None:
        vm_id = context.state.vm_id_by_name(tenant, reference)
        stored = None if vm_id is None else context.state.vms.get(vm_id)
    if stored is None or stored.record.tenant != tenant:
        raise NotFound(f"there is no VM {shown(reference)}")
    return stored


def find_node(context: Context, reference: str) -> Stored[Node]:
    """Return the node with this id or name; nodes belong to the cell. Raises NotFound."""
    stored = context.state.nodes.get(reference)
    if stored is None:
        node_id = context.state.node_id_by_name(reference)
        stored = None if node_id is None else context.state.nodes.get(node_id)
    if stored is None:
        raise NotFound(f"there is no node {shown(reference)}")
    return stored


def object_ids(
    context: Context, principal: Principal, references: Sequence[str]
) -> tuple[str, ...]:
    """Return the ids of objects named by id or name; what is gone has its id only.

    Each is short and plain, whatever was sent: cursors hold them.
    """
    state, tenant = context.state, principal.scope.tenant
    return tuple(
        state.vm_id_by_name(tenant, each)
        or state.node_id_by_name(each)
        or (each if each.isascii() else _NOTHING)
        for each in references
    )


class FollowedObjects:
    """The objects that somebody who follows has named: a name stays what it has once meant.

    Its deletion is so told as well, and whatever takes the name after it.
    """

    def __init__(self, context: Context, principal: Principal, references: Sequence[str]) -> None:
        self._context = context
        self._principal = principal
        self._references = references
        self._ids: dict[str, None] = {}

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all that the names have meant since; empty when none were given."""
        now = object_ids(self._context, self._principal, self._references)
        if not self._ids.keys() >= set(now):
            newest = (*(each for each in self._ids if each not in now), *now)
            self._ids = dict.fromkeys(newest[-_FOLLOWED_MAX:])
        return tuple(self._ids)


def shown(text: str) -> str:
    """Return what a user sent, quoted and cut to a length that fits a sentence."""
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…")
