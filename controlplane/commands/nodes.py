"""What happens to nodes: they join, report, fall silent, are cordoned."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.admission import refusal_of, shut_out
from controlplane.commands.draft import Author, Draft
from controlplane.commands.restored import must_tell
from shared.admission import Admission
from shared.errors import StateConflict, Unauthenticated
from shared.model import Inventory, Node, NodeState
from shared.moves import DrainJournal
from shared.restores import NodeRecovery

# Of the VMs that keep a node from being removed, so many are named.
NAMED_MAX = 10


class JoinNode(Struct, frozen=True, kw_only=True):
    """Takes what an agent says of its node in its hello. Returns the node's id.

    The caller has checked that the certificate speaks for this name; that the one with this
    ``serial`` still does is checked here. A node that is new gets its record here; it becomes ready
    only when it has accepted the term. Raises Unauthenticated.
    """

    name: str
    address: str
    boot_id: str
    labels: dict[str, str]
    inventory: Inventory
    foreign_domains: tuple[str, ...]
    serial: str = ""
    by: Author

    def decide(self, draft: Draft) -> str:
        if (why := refusal_of(draft.find(Admission, self.name), self.serial)) is not None:
            raise Unauthenticated(why)
        known = draft.node_by_name(self.name)
        node = known or Node(
            id=draft.new_id("node"),
            name=self.name,
            created_at=draft.now,
            updated_at=draft.now,
            state_since=draft.now,
        )
        joined = replace(
            node,
            address=self.address,
            boot_id=self.boot_id,
            labels=self.labels,
            inventory=self.inventory,
            foreign_domains=self.foreign_domains,
        )
        if node.recovery.gone:
            # It is not: what it has to tell may be news, also if it has told before.
            joined = replace(joined, recovery=NodeRecovery(unrecorded=node.recovery.unrecorded))
            draft.event("node.came_back", node.id, self.by, name=self.name)
        if known is None:
            draft.event("node.joined", node.id, self.by, name=self.name)
        elif known.boot_id != self.boot_id:
            draft.event("node.booted", node.id, self.by, name=self.name, boot_id=self.boot_id)
        if joined != known:
            draft.put(replace(joined, updated_at=draft.now))
        return node.id


class ReportInventory(Struct, frozen=True, kw_only=True):
    node_id: str
    inventory: Inventory
    foreign_domains: tuple[str, ...]

    def decide(self, draft: Draft) -> None:
        node = draft.node(self.node_id)
        changed = replace(node, inventory=self.inventory, foreign_domains=self.foreign_domains)
        if changed != node:
            draft.put(replace(changed, updated_at=draft.now))


class SetNodeState(Struct, frozen=True, kw_only=True):
    """Says whether a node is heard; silence is a fact about us and it, never a death."""

    node_id: str
    state: NodeState
    by: Author

    def decide(self, draft: Draft) -> None:
        node = draft.node(self.node_id)
        if node.state is self.state:
            return
        draft.event(f"node.{self.state.value}", node.id, self.by, name=node.name)
        draft.put(replace(node, state=self.state, state_since=draft.now, updated_at=draft.now))


class SetCordon(Struct, frozen=True, kw_only=True, tag="set_cordon"):
    """Cordons or uncordons a node. Returns its id.

    Raises NotFound, StateConflict when it already is so.
    """

    node_id: str
    cordoned: bool
    reason: str
    by: Author

    def decide(self, draft: Draft) -> str:
        node = draft.node(self.node_id)
        verb = "cordoned" if self.cordoned else "uncordoned"
        if node.cordoned is self.cordoned:
            state = "cordoned" if node.cordoned else "not cordoned"
            raise StateConflict(f"node {node.name!r} is {state} already")
        for operation in draft.operations_on(node.id):
            if not self.cordoned and isinstance(operation.saga, DrainJournal):
                raise StateConflict(
                    f"{operation.id} drains node {node.name!r}: wait for that, or cancel it "
                    f"(novacron op cancel {operation.id})"
                )
        draft.audit(f"node.{verb}", node.id, self.by)
        put_cordon(draft, node, self.by, cordoned=self.cordoned, reason=self.reason)
        return node.id


class RemoveNode(Struct, frozen=True, kw_only=True, tag="remove_node"):
    """Forgets a node that has nothing any more, and shuts it out. Returns its id.

    Raises NotFound; StateConflict while anything of a VM is there, or may be.
    """

    node_id: str
    by: Author

    def decide(self, draft: Draft) -> str:
        node = draft.node(self.node_id)
        left = sorted(vm.name for vm in draft.vms_on(node.id))
        if left:
            shown = ", ".join(left[:NAMED_MAX]) + (", …" if len(left) > NAMED_MAX else "")
            raise StateConflict(
                f"node {node.name!r} has {len(left)} VMs ({shown}): drain it first "
                f"(novacron node drain {node.name})"
            )
        if operations := draft.operations_on(node.id):
            raise StateConflict(f"{operations[0].id} is under way on node {node.name!r}")
        if must_tell(draft.cluster(), node) and not node.recovery.gone:
            raise StateConflict(
                f"node {node.name!r} has not told yet what it has, after the restore: wait, or "
                f"give it up (novacron node declare-gone {node.name})"
            )
        draft.event("node.removed", node.id, self.by, name=node.name)
        draft.audit("node.removed", node.id, self.by)
        # First: what ends its session finds it by its name.
        shut_out(draft, node.name, "removed")
        draft.delete(Node, node.id)
        return node.id


def put_cordon(draft: Draft, node: Node, by: Author, *, cordoned: bool, reason: str) -> None:
    """Write a node's cordon, and the event about it."""
    verb = "cordoned" if cordoned else "uncordoned"
    draft.event(f"node.{verb}", node.id, by, name=node.name, reason=reason)
    draft.put(
        replace(
            node,
            cordoned=cordoned,
            cordon_reason=reason if cordoned else "",
            updated_at=draft.now,
        )
    )
