"""What users ask of VMs: create, the power verbs, delete.

Each command changes what is desired and opens the operation that a client follows; making it so is
the reconcilers' and agents' work.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from controlplane.commands.operations import (
    CREATE,
    DELETE,
    open_operation,
    open_operation_id,
    put_vm,
    record_done,
    vm_gone_from_node,
)
from controlplane.commands.upgrade import check_spec
from shared.errors import NameTaken, StateConflict
from shared.ids import domain_uuid
from shared.model import GuestRequest, Power, RequestKind, Vm, VmSpec, attempt_generation
from shared.states import VmAction, check_action

_REQUESTS: dict[VmAction, RequestKind] = {
    VmAction.SHUTDOWN: RequestKind.SHUTDOWN,
    VmAction.REBOOT: RequestKind.REBOOT,
    VmAction.RESET: RequestKind.RESET,
}
_POWERS: dict[VmAction, Power] = {
    VmAction.START: Power.RUNNING,
    VmAction.RESUME: Power.RUNNING,
    VmAction.PAUSE: Power.PAUSED,
    VmAction.STOP: Power.STOPPED,
    VmAction.SHUTDOWN: Power.STOPPED,
}


class CreateVm(Struct, frozen=True, kw_only=True, tag="create_vm"):
    """Returns the id of the operation. Raises NameTaken, UpgradeUnfinished."""

    name: str
    tenant: str
    labels: dict[str, str]
    spec: VmSpec
    by: Author

    def decide(self, draft: Draft) -> str:
        taken = draft.vm_by_name(self.tenant, self.name)
        if taken is not None:
            raise NameTaken(f"the name {self.name!r} is taken by {taken.id}")
        check_spec(draft, self.spec)
        vm_id = draft.new_id("vm")
        vm = Vm(
            id=vm_id,
            name=self.name,
            tenant=self.tenant,
            labels=self.labels,
            created_at=draft.now,
            updated_at=draft.now,
            spec=self.spec,
            domain_name=vm_id,
            domain_uuid=domain_uuid(vm_id),
        )
        # One that is to stay stopped has nothing to wait for.
        stopped = self.spec.power is Power.STOPPED
        operation_id = (record_done if stopped else open_operation)(draft, CREATE, vm, self.by)
        draft.audit("vm.create", vm_id, self.by, self.tenant)
        draft.event("vm.created", vm_id, self.by, tenant=self.tenant, name=self.name)
        put_vm(draft, vm)
        return operation_id


class ActOnVm(Struct, frozen=True, kw_only=True, tag="act_on_vm"):
    """Returns the id of the operation. Raises NotFound, StateConflict.

    Whoever asks again for what is under way gets the same operation: what is open on one VM must
    always fit into the transaction that ends it.
    """

    vm_id: str
    action: VmAction
    by: Author
    deadline_s: float = 60.0

    def decide(self, draft: Draft) -> str:
        vm = draft.vm(self.vm_id)
        check_action(self.action, vm)
        request = self._request(vm)
        status = vm.status
        if self.action is VmAction.START:
            status = replace(status, crashes=0, not_before=None, fault=None)
        changed = replace(
            vm,
            spec=replace(vm.spec, power=_POWERS.get(self.action, vm.spec.power)),
            request=request,
            request_number=vm.request_number + (1 if request is not None else 0),
            status=status,
        )
        operation_id = self._operation(draft, vm, request)
        draft.audit(f"vm.{self.action}", vm.id, self.by, vm.tenant)
        draft.event(f"vm.{self.action}_requested", vm.id, self.by, tenant=vm.tenant)
        put_vm(draft, changed)
        return operation_id

    def _operation(self, draft: Draft, vm: Vm, request: GuestRequest | None) -> str:
        kind = f"vm.{self.action}"
        if request is not None:
            return open_operation(draft, kind, vm, self.by, request.number)
        return open_operation_id(draft, kind, vm) or open_operation(draft, kind, vm, self.by)

    def _request(self, vm: Vm) -> GuestRequest | None:
        kind = _REQUESTS.get(self.action)
        if kind is None:
            return None
        pending = vm.request is not None and vm.status.answered_request < vm.request.number
        if pending and vm.request is not None and vm.request.generation == attempt_generation(vm):
            raise StateConflict(f"a {vm.request.kind.value} of {vm.name!r} is under way")
        return GuestRequest(
            number=vm.request_number + 1,
            kind=kind,
            generation=attempt_generation(vm),
            deadline_s=self.deadline_s,
        )


class DeleteVm(Struct, frozen=True, kw_only=True, tag="delete_vm"):
    """Returns the id of the operation. Raises NotFound, StateConflict.

    A VM that was never bound to a node goes at once; any other when its node has nothing of it.
    """

    vm_id: str
    by: Author

    def decide(self, draft: Draft) -> str:
        vm = draft.vm(self.vm_id)
        check_action(VmAction.DELETE, vm)
        operation_id = open_operation(draft, DELETE, vm, self.by)
        draft.audit("vm.delete", vm.id, self.by, vm.tenant)
        draft.event("vm.delete_requested", vm.id, self.by, tenant=vm.tenant)
        deleting = replace(vm, deleting=True)
        if vm.status.node is None:
            vm_gone_from_node(draft, deleting, self.by)
        else:
            put_vm(draft, deleting)
        return operation_id
