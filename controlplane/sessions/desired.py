"""What an agent is told of one VM, derived from the VM's record. Pure."""

from __future__ import annotations

from controlplane.state import Stored
from shared.model import AttemptState, Node, Power, Term, Vm, attempt_generation
from shared.protocol import Desired, Intent

_INTENTS: dict[Power, Intent] = {
    Power.RUNNING: Intent.RUN,
    Power.PAUSED: Intent.PAUSE,
    Power.STOPPED: Intent.STOP,
}


def desired_of(stored: Stored[Vm], node: Node, term: Term) -> Desired:
    """Return the message for a VM that is bound to ``node``."""
    vm = stored.record
    intent = Intent.REMOVE if vm.deleting else _INTENTS.get(vm.spec.power, Intent.UNKNOWN)
    attempt = vm.status.attempt
    permitted = (
        intent in (Intent.RUN, Intent.PAUSE)
        and attempt is not None
        and attempt.state is AttemptState.PERMITTED
        and attempt.node == node.id
        and attempt.boot_id == node.boot_id
    )
    pending = vm.request is not None and vm.request.number > vm.status.answered_request
    return Desired(
        term=term,
        vm_id=vm.id,
        revision=stored.revision,
        generation=attempt_generation(vm),
        permitted=permitted,
        boot_id=node.boot_id,
        intent=intent,
        name=vm.name,
        tenant=vm.tenant,
        domain_name=vm.domain_name,
        domain_uuid=vm.domain_uuid,
        spec=vm.spec,
        request=vm.request if pending else None,
    )
