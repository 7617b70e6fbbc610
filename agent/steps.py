"""What to do next about one VM: pure, from what should be, what is and what was used up.

One step at a time; after each the domain is looked at again. The fence and the driver check once
more right before libvirt is called: this is the plan, not the guard.
"""

from __future__ import annotations

import enum

from agent.fence import VmFacts
from agent.hypervisor import DomainInfo
from shared.model import GuestRequest, ObservedPower, RequestKind
from shared.protocol import Desired, Intent
from shared.states import RUNNING_POWERS


class Step(enum.Enum):
    """SETTLED means: report what is. CONFLICT means: a domain that is not ours to touch is here."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    REBOOT = "reboot"
    RESET = "reset"
    ASK_TO_SHUT_DOWN = "ask to shut down"
    AWAIT_SHUTDOWN = "await shutdown"
    STOP = "stop"
    REVOKE = "revoke"
    ANSWER = "answer"
    REMOVE = "remove"
    SETTLED = "settled"
    CONFLICT = "conflict"


_GUEST_STEPS: dict[RequestKind, Step] = {
    RequestKind.REBOOT: Step.REBOOT,
    RequestKind.RESET: Step.RESET,
}


class ShutdownState(enum.Enum):
    NOT_ASKED = "not asked"
    ASKED = "asked"
    OVERDUE = "overdue"


def next_step(
    desired: Desired,
    domain: DomainInfo | None,
    facts: VmFacts,
    boot_id: str,
    shutdown: ShutdownState,
) -> Step:
    """Return the next step towards ``desired``; total over every combination."""
    running = domain is not None and domain.power in RUNNING_POWERS
    if domain is not None and domain.vm_id != desired.vm_id:
        return Step.CONFLICT
    if domain is not None and domain.power is ObservedPower.UNKNOWN:
        return Step.SETTLED
    if running and domain is not None and domain.generation != desired.generation:
        return _beside_another(desired, domain, facts)
    request = _pending(desired, facts)
    if desired.intent in (Intent.RUN, Intent.PAUSE):
        if running and domain is not None:
            return _while_running(desired, domain, request)
        return _while_not_running(desired, facts, boot_id, request)
    if desired.intent in (Intent.STOP, Intent.REMOVE):
        if running:
            return _towards_stop(desired, request, shutdown)
        return _after_stop(desired, facts, request)
    return Step.SETTLED


def _beside_another(desired: Desired, domain: DomainInfo, facts: VmFacts) -> Step:
    """Leave a running domain of another generation alone; never add a second start to it.

    One of an earlier generation is a start that libvirt carried out late. Once the later permit is
    revoked, durably, the leader may take that attempt up again.
    """
    earlier = domain.generation < desired.generation
    understood = desired.intent is not Intent.UNKNOWN
    if understood and earlier and facts.used_generation < desired.generation:
        return Step.REVOKE
    return Step.CONFLICT


def _pending(desired: Desired, facts: VmFacts) -> GuestRequest | None:
    request = desired.request
    if request is None or request.number <= facts.answered_request:
        return None
    return request


def _while_running(desired: Desired, domain: DomainInfo, request: GuestRequest | None) -> Step:
    if desired.intent is Intent.PAUSE and domain.power is ObservedPower.RUNNING:
        return Step.PAUSE
    if desired.intent is Intent.RUN and domain.power is ObservedPower.PAUSED:
        return Step.RESUME
    if request is None:
        return Step.SETTLED
    if request.generation != desired.generation:
        return Step.ANSWER  # meant for an earlier run of the guest: void
    return _GUEST_STEPS.get(request.kind, Step.ANSWER)


def _while_not_running(
    desired: Desired, facts: VmFacts, boot_id: str, request: GuestRequest | None
) -> Step:
    unused = facts.used_generation < desired.generation
    if desired.permitted and unused and desired.boot_id == boot_id:
        return Step.START
    return Step.SETTLED if request is None else Step.ANSWER


def _towards_stop(desired: Desired, request: GuestRequest | None, shutdown: ShutdownState) -> Step:
    gracefully = (
        desired.intent is Intent.STOP
        and request is not None
        and request.kind is RequestKind.SHUTDOWN
        and request.generation == desired.generation
    )
    if not gracefully or shutdown is ShutdownState.OVERDUE:
        return Step.STOP
    if shutdown is ShutdownState.ASKED:
        return Step.AWAIT_SHUTDOWN
    return Step.ASK_TO_SHUT_DOWN


def _after_stop(desired: Desired, facts: VmFacts, request: GuestRequest | None) -> Step:
    if facts.used_generation < desired.generation:
        return Step.REVOKE  # a permit that may still be in flight must never start it now
    if request is not None:
        return Step.ANSWER
    return Step.REMOVE if desired.intent is Intent.REMOVE else Step.SETTLED
