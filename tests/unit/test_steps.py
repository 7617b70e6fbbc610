"""The agent's next step: total over every combination, and safe in each."""

from __future__ import annotations

from itertools import product

import pytest

from agent.fence import VmFacts
from agent.hypervisor import DomainInfo
from agent.steps import ShutdownState, Step, next_step
from shared.model import GuestRequest, ObservedPower, RequestKind
from shared.protocol import Desired, Intent
from shared.states import RUNNING_POWERS
from tests.unit.core_world import desired

GENERATION = 5
BOOT = "boot-1"
ON_A_GUEST = {
    Step.PAUSE,
    Step.RESUME,
    Step.REBOOT,
    Step.RESET,
    Step.ASK_TO_SHUT_DOWN,
    Step.AWAIT_SHUTDOWN,
    Step.STOP,
}
Case = tuple[Desired, DomainInfo | None, VmFacts, ShutdownState]


def domain(power: ObservedPower, generation: int = GENERATION, vm_id: str = "vm-1") -> DomainInfo:
    return DomainInfo(name="vm-1", uuid="u", vm_id=vm_id, generation=generation, power=power)


def wanted(intent: Intent = Intent.RUN, **changes: object) -> Desired:
    return desired(**{"intent": intent, "generation": GENERATION, "boot_id": BOOT, **changes})


def facts(used: int = GENERATION, answered: int = 0) -> VmFacts:
    return VmFacts(vm_id="vm-1", used_generation=used, answered_request=answered)


def request(kind: RequestKind, generation: int = GENERATION) -> GuestRequest:
    return GuestRequest(number=1, kind=kind, generation=generation)


REQUESTS = [
    None,
    *(request(kind, generation) for kind, generation in product(RequestKind, (4, GENERATION))),
]
DOMAINS = [
    None,
    *(domain(power, generation) for power, generation in product(ObservedPower, (4, 5, 6))),
    domain(ObservedPower.RUNNING, vm_id="vm-other"),
    domain(ObservedPower.STOPPED, vm_id="vm-other"),
]


def every_case() -> list[Case]:
    return [
        (
            wanted(intent, permitted=permitted, boot_id=boot_id, request=asked),
            found,
            facts(used, answered),
            shutdown,
        )
        for intent, permitted, boot_id, asked, found, used, answered, shutdown in product(
            Intent,
            (False, True),
            (BOOT, "boot-0"),
            REQUESTS,
            DOMAINS,
            (4, 5, 6),
            (0, 1),
            ShutdownState,
        )
    ]


def test_the_safety_of_every_combination() -> None:
    for want, found, known, shutdown in every_case():
        step = next_step(want, found, known, BOOT, shutdown)
        running = found is not None and found.power in RUNNING_POWERS
        told = (want, found, known, shutdown, step)
        if step is Step.START:
            assert want.permitted, told
            assert want.boot_id == BOOT, told
            assert known.used_generation < want.generation, told
            assert want.intent in (Intent.RUN, Intent.PAUSE), told
            assert not running, told
        if step in ON_A_GUEST:
            assert running, told
            assert found is not None
            assert found.generation == want.generation, told
            assert found.vm_id == want.vm_id, told
        if step is Step.REMOVE:
            assert known.used_generation >= want.generation, told
            assert want.intent is Intent.REMOVE, told
            assert not running, told
        if step is Step.REVOKE:
            assert known.used_generation < want.generation, told
        if step is Step.ANSWER:
            assert want.request is not None, told
            assert want.request.number > known.answered_request, told
        if found is not None and found.vm_id != want.vm_id:
            assert step is Step.CONFLICT, told
        if want.intent is Intent.UNKNOWN:
            assert step in (Step.SETTLED, Step.CONFLICT), told
        if found is not None and found.power is ObservedPower.UNKNOWN:
            assert step in (Step.SETTLED, Step.CONFLICT), told


def settled_after(want: Desired, found: DomainInfo | None, known: VmFacts) -> list[Step]:
    """Take steps as a node would, until nothing is left to do."""
    steps: list[Step] = []
    shutdown = ShutdownState.NOT_ASKED
    while True:
        step = next_step(want, found, known, BOOT, shutdown)
        steps.append(step)
        number = 0 if want.request is None else want.request.number
        if step in (Step.SETTLED, Step.CONFLICT, Step.AWAIT_SHUTDOWN, Step.REMOVE):
            return steps
        if step is Step.START:
            found, known = domain(ObservedPower.RUNNING), facts(GENERATION, known.answered_request)
        elif step is Step.PAUSE:
            found = domain(ObservedPower.PAUSED)
        elif step is Step.RESUME:
            found = domain(ObservedPower.RUNNING)
        elif step is Step.STOP:
            found = domain(ObservedPower.STOPPED)
        elif step is Step.ASK_TO_SHUT_DOWN:
            shutdown = ShutdownState.ASKED
        elif step is Step.REVOKE:
            known = facts(GENERATION, known.answered_request)
        else:
            known = facts(known.used_generation, number)


def test_every_combination_settles_soon() -> None:
    longest = max(len(settled_after(want, found, known)) for want, found, known, _ in every_case())

    assert longest <= 4


@pytest.mark.parametrize(
    ("want", "found", "used", "steps"),
    [
        (wanted(), None, 4, [Step.START, Step.SETTLED]),
        (wanted(), None, 5, [Step.SETTLED]),
        (wanted(permitted=False), None, 4, [Step.SETTLED]),
        (wanted(boot_id="boot-0"), None, 4, [Step.SETTLED]),
        (wanted(Intent.PAUSE), None, 4, [Step.START, Step.PAUSE, Step.SETTLED]),
        (wanted(), domain(ObservedPower.PAUSED), 5, [Step.RESUME, Step.SETTLED]),
        (wanted(), domain(ObservedPower.RUNNING, 4), 4, [Step.REVOKE, Step.CONFLICT]),
        (wanted(), domain(ObservedPower.RUNNING, 6), 4, [Step.CONFLICT]),
        (wanted(Intent.STOP), domain(ObservedPower.RUNNING), 5, [Step.STOP, Step.SETTLED]),
        (wanted(Intent.STOP), None, 4, [Step.REVOKE, Step.SETTLED]),
        (wanted(Intent.STOP), domain(ObservedPower.RUNNING, 4), 4, [Step.REVOKE, Step.CONFLICT]),
        (wanted(Intent.REMOVE), None, 4, [Step.REVOKE, Step.REMOVE]),
        (wanted(Intent.REMOVE), domain(ObservedPower.RUNNING), 5, [Step.STOP, Step.REMOVE]),
        (wanted(Intent.REMOVE), domain(ObservedPower.SHUT_OFF, 4), 5, [Step.REMOVE]),
    ],
)
def test_the_way_to_what_is_wanted(
    want: Desired, found: DomainInfo | None, used: int, steps: list[Step]
) -> None:
    assert settled_after(want, found, facts(used)) == steps


def test_a_request_is_answered_once_and_void_for_another_run() -> None:
    runs = domain(ObservedPower.RUNNING)
    reboot = wanted(request=request(RequestKind.REBOOT))
    not_asked = ShutdownState.NOT_ASKED

    assert next_step(reboot, runs, facts(), BOOT, not_asked) is Step.REBOOT
    assert next_step(reboot, runs, facts(answered=1), BOOT, not_asked) is Step.SETTLED
    late = wanted(request=request(RequestKind.RESET, generation=4))
    assert next_step(late, runs, facts(), BOOT, not_asked) is Step.ANSWER
    assert next_step(reboot, None, facts(), BOOT, not_asked) is Step.ANSWER


def test_a_guest_that_does_not_follow_is_stopped() -> None:
    want = wanted(Intent.STOP, request=request(RequestKind.SHUTDOWN))
    runs = domain(ObservedPower.RUNNING)
    steps = [next_step(want, runs, facts(), BOOT, each) for each in ShutdownState]

    assert steps == [Step.ASK_TO_SHUT_DOWN, Step.AWAIT_SHUTDOWN, Step.STOP]
    assert settled_after(want, None, facts()) == [Step.ANSWER, Step.SETTLED]
