"""What becomes of each VM of a restored backup, once the nodes have told what they have.

Running guests win: a record follows the guest. What rests is as the backup wants it. What no node
has is started by nobody but its user. Nothing here removes anything from a node, and what cannot
be decided stays as it is.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.attempts import PLACED, with_condition, without_condition
from controlplane.commands.draft import Author, Draft
from controlplane.commands.migrations import with_log_on
from controlplane.commands.operations import put_vm
from controlplane.commands.restored import RECOVERED, is_recovering, must_tell
from controlplane.commands.whereabouts import (
    Found,
    Seen,
    Undecided,
    is_at_rest,
    whereabouts,
)
from shared.errors import StateConflict
from shared.model import (
    Attempt,
    AttemptState,
    Condition,
    Node,
    NodeState,
    ObservedPower,
    Power,
    Vm,
    VmStatus,
    attempt_generation,
)
from shared.restores import NodeRecovery, Unproven

# An event names so many of a node's VMs that no record is of; the node's record has all of them.
TOLD_MAX = 20


class SettleVm(Struct, frozen=True, kw_only=True):
    """Makes a VM's record say what the nodes have told, or why that cannot be told yet.

    ``seen`` are the domains of it on all nodes in ``heard``. Raises StateConflict when a node has
    booted since, or while a migration of this epoch is open: look again.
    """

    vm_id: str
    seen: tuple[Seen, ...]
    heard: frozenset[str]
    by: Author

    def decide(self, draft: Draft) -> None:
        vm = draft.find(Vm, self.vm_id)
        if vm is None:
            return
        for each in self.seen:
            if draft.node(each.node_id).boot_id != each.boot_id:
                raise StateConflict(f"{each.node_name!r} has booted since it told of {vm.name!r}")
        if vm.status.unproven is None:
            self._beside_record(draft, vm)
            return
        place = whereabouts(self.seen, attempt_generation(vm))
        if isinstance(place, Undecided):
            self._hold(draft, vm, place.why)
        elif unheard := self._unheard(draft, vm, gone_too=not isinstance(place, Found)):
            self._hold(draft, vm, f"{unheard} may have it, and has not told")
        elif not isinstance(place, Found):
            self._nowhere(draft, vm)
        elif place.at_rest:
            self._at_rest(draft, vm, place)
        else:
            self._follow(draft, vm, place)

    def _unheard(self, draft: Draft, vm: Vm, *, gone_too: bool) -> str:
        """Return the name of a node that may have the VM, and has not told.

        One that is gone, by an operator's word, runs no guest; but its disks may be there.
        """
        assert vm.status.unproven is not None, "only then it matters"
        for node_id in (vm.status.node, *vm.status.unproven.nodes):
            node = None if node_id is None else draft.find(Node, node_id)
            if node is None or node.id in self.heard:
                continue
            if gone_too or not node.recovery.gone:
                return node.name
        return ""

    def _hold(self, draft: Draft, vm: Vm, why: str) -> None:
        """Leave the VM alone, and say why."""
        known = vm.status.unproven or Unproven()
        active = [each.node_id for each in self.seen if not is_at_rest(each)]
        own = () if vm.status.node is None else (vm.status.node,)
        nodes = tuple(dict.fromkeys((*own, *known.nodes, *active)))
        held = Unproven(nodes=nodes, why=why)
        if held == vm.status.unproven:
            return
        if why != known.why:
            draft.event("vm.unproven", vm.id, self.by, tenant=vm.tenant, why=why)
        status = _doubted(draft, replace(vm.status, unproven=held), "unproven", why)
        put_vm(draft, replace(vm, status=status))

    def _nowhere(self, draft: Draft, vm: Vm) -> None:
        """Start nothing by itself that no node has: it was deleted or moved away since the backup,
        or never ran; whoever knows which can start it.
        """
        attempt = vm.status.attempt
        if attempt is not None:
            attempt = replace(attempt, state=AttemptState.ENDED)
        status = _settled(vm, replace(vm.status, attempt=attempt, power_seen=ObservedPower.ABSENT))
        wanted = vm.spec.power is not Power.STOPPED and not vm.deleting
        if wanted or attempt is not None:
            status = _doubted(
                draft,
                status,
                "not_found",
                "no node had anything of it when the cluster was restored from a backup: it was "
                "deleted since, or is on a node that did not tell, or had not been started yet; "
                "start it if you know that it runs nowhere, or delete it",
            )
            draft.event("vm.not_found", vm.id, self.by, tenant=vm.tenant, node=status.node)
        self._put(draft, vm, status, Power.STOPPED)

    def _at_rest(self, draft: Draft, vm: Vm, place: Found) -> None:
        """What rests is as the backup wants it; but a guest that switched itself off stays off."""
        power, doubt = vm.spec.power, ""
        if power is not Power.STOPPED and place.seen.sighting.power is ObservedPower.SHUT_OFF:
            power = Power.STOPPED
        elif power is not Power.STOPPED and not place.sure:
            power = Power.STOPPED
            doubt = (
                f"{place.seen.node_name} had begun to move it away when its record was lost, and "
                "no node has it running: start it if you know that it runs nowhere"
            )
        self._take(draft, vm, place, AttemptState.ENDED, power, doubt)

    def _follow(self, draft: Draft, vm: Vm, place: Found) -> None:
        """Make the record follow the guest; the guest goes on as it is, unless it is to be resumed.

        A move of earlier may have left it paused, and so may its user: wanted running, it goes on.
        """
        power = vm.spec.power
        if place.seen.sighting.power is not ObservedPower.PAUSED:
            power = Power.RUNNING
        elif power is Power.STOPPED:
            power = Power.PAUSED
        self._take(draft, vm, place, AttemptState.RUNNING, power)

    def _take(
        self,
        draft: Draft,
        vm: Vm,
        place: Found,
        state: AttemptState,
        power: Power,
        doubt: str = "",
    ) -> None:
        seen, before = place.seen, vm.status
        attempt = Attempt(
            generation=seen.generation,
            node=seen.node_id,
            boot_id=seen.boot_id,
            state=state,
            permitted_at=draft.now,
        )
        status = _settled(
            vm,
            replace(
                before,
                node=seen.node_id,
                generation=max(before.generation, seen.generation),
                attempt=attempt,
                power_seen=seen.sighting.power,
                has_run=True,
            ),
        )
        if before.node is not None and before.node != seen.node_id:
            status = with_log_on(status, before.node, seen.node_id)
        status = with_condition(status, Condition(type=PLACED, status=True, since=draft.now))
        if doubt:
            status = _doubted(draft, status, "moved_away", doubt)
        others = [str(each) for each in place.others]
        known = before.node == seen.node_id and attempt_generation(vm) == seen.generation
        if not known or power is not vm.spec.power or others:
            draft.event(
                "vm.adopted",
                vm.id,
                self.by,
                tenant=vm.tenant,
                node=seen.node_id,
                node_name=seen.node_name,
                generation=seen.generation,
                power=seen.sighting.power.value,
                recorded_node=before.node,
                left_alone_on=others,
            )
        self._put(draft, vm, status, power)

    def _put(self, draft: Draft, vm: Vm, status: VmStatus, power: Power) -> None:
        put_vm(draft, replace(vm, status=status, spec=replace(vm.spec, power=power)))

    def _beside_record(self, draft: Draft, vm: Vm) -> None:
        """Take what a node has told late of a VM that was settled without it."""
        elsewhere = tuple(each for each in self.seen if each.node_id != vm.status.node)
        active = [each for each in elsewhere if not is_at_rest(each)]
        if not active:
            return
        if vm.status.migration is not None:
            raise StateConflict(f"{vm.name!r} is being migrated: {active[0]} is looked at later")
        attempt = vm.status.attempt
        if attempt is not None and attempt.state is not AttemptState.ENDED:
            runs = draft.node(attempt.node).name
            self._hold(draft, vm, f"it runs on {runs} by its record, and is on {active[0]}, too")
            return
        place = whereabouts(active, attempt_generation(vm))
        if isinstance(place, Found):
            self._follow(draft, vm, place)
        else:
            self._hold(draft, vm, place.why if isinstance(place, Undecided) else "")


class NoteTold(Struct, frozen=True, kw_only=True):
    """Notes that a node has told all that it has, and which VMs of it no record is of."""

    node_id: str
    unrecorded: tuple[str, ...]
    by: Author

    def decide(self, draft: Draft) -> None:
        cluster, node = draft.cluster(), draft.node(self.node_id)
        assert cluster is not None, "a node belongs to a cluster"
        new = [vm_id for vm_id in self.unrecorded if vm_id not in node.recovery.unrecorded]
        if new:
            draft.event(
                "node.unrecorded_vms",
                node.id,
                self.by,
                name=node.name,
                vms=new[:TOLD_MAX],
                count=len(new),
            )
        told = NodeRecovery(told=cluster.epoch, unrecorded=self.unrecorded)
        if told != node.recovery:
            draft.put(replace(node, recovery=told, updated_at=draft.now))


class EndRecovery(Struct, frozen=True, kw_only=True):
    """Lets the cluster start, bind and move again. Raises StateConflict while a node must tell."""

    by: Author

    def decide(self, draft: Draft) -> None:
        cluster = draft.cluster()
        if cluster is None or cluster.restored is None or not is_recovering(cluster):
            return
        for node in draft.nodes():
            if must_tell(cluster, node) and not node.recovery.gone:
                raise StateConflict(f"{node.name!r} has not told what it has")
        draft.put(replace(cluster, restored=replace(cluster.restored, recovering=False)))
        draft.event("cluster.recovered", cluster.id, self.by, epoch=cluster.epoch)


class DeclareGone(Struct, frozen=True, kw_only=True, tag="declare_gone"):
    """Takes an operator's word that nothing runs on a node any more. Returns the node's id.

    Raises NotFound, StateConflict when nobody waits for the node's own word, or it is heard.
    """

    node_id: str
    by: Author

    def decide(self, draft: Draft) -> str:
        node = draft.node(self.node_id)
        if node.recovery.gone:
            return node.id
        waits = any(vm.status.unproven is not None for vm in draft.vms_on(node.id))
        if not waits and not must_tell(draft.cluster(), node):
            raise StateConflict(
                f"nobody waits for node {node.name!r}: only after a restore of the cluster does "
                "what it has to tell hold others up"
            )
        if node.state is NodeState.READY:
            raise StateConflict(f"node {node.name!r} is heard, and is about to tell what it has")
        draft.audit("node.declare_gone", node.id, self.by)
        draft.event("node.declared_gone", node.id, self.by, name=node.name)
        recovery = replace(node.recovery, gone=True)
        draft.put(replace(node, recovery=recovery, updated_at=draft.now))
        return node.id


def _settled(vm: Vm, status: VmStatus) -> VmStatus:
    """Return a status that a node's word stands behind.

    What the backup wanted to have swept elsewhere is not: what is there may be newer. Of a VM that
    is being deleted nothing is to stay anywhere.
    """
    leftovers = status.leftovers if vm.deleting else ()
    status = without_condition(status, RECOVERED)
    return replace(
        status, unproven=None, leftovers=leftovers, crashes=0, not_before=None, fault=None
    )


def _doubted(draft: Draft, status: VmStatus, reason: str, message: str) -> VmStatus:
    """Return a status that says, until the VM is started again, what became of it."""
    doubt = Condition(type=RECOVERED, status=False, reason=reason, message=message, since=draft.now)
    return with_condition(status, doubt)
