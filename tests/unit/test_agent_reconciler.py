"""The agent's reconciler over the simulated hypervisor: what is done, and what is told."""

from __future__ import annotations

import asyncio

from agent.hypervisor import DomainDefinition, volume_name
from agent.reconciler import RESUME_PERIOD_S
from shared.errors import HypervisorError
from shared.model import DiskSpec, GuestRequest, ObservedPower, RequestKind, Term
from shared.protocol import Desired, Intent
from tests.unit.agent_world import A_WHILE_S, VM, node, virtual
from tests.unit.core_world import desired, spec


def test_a_permit_starts_a_domain_once() -> None:
    async def main() -> None:
        async with node() as it:
            report = await it.wants(spec=spec(disks=(DiskSpec(name="root", size_gib=1),)))
            assert (report.power, report.permit_used) == (ObservedPower.RUNNING, True)
            assert (report.generation, report.revision) == (1, 10)
            assert it.state.pools["default"] == {volume_name(VM, "root"): 1}

            it.driver.guest_crashes(VM)
            report = await it.later()
            assert (report.power, report.permit_used) == (ObservedPower.CRASHED, True)
            report = await it.wants(revision=11)
            assert report.power is ObservedPower.CRASHED
            assert it.hooks.acts.count("start") == 1

    virtual(main())


def test_a_disk_of_a_vm_that_has_run_is_never_made_anew() -> None:
    """The file system of its pool is not mounted, say: an empty disk would look like its own."""

    async def main() -> None:
        async with node() as it:
            disks = (DiskSpec(name="root", size_gib=1), DiskSpec(name="data", size_gib=2))
            await it.wants(spec=spec(disks=disks))
            it.driver.guest_crashes(VM)
            await it.later()
            kept, it.state.pools["default"] = it.state.pools["default"], {}

            again = {"spec": spec(disks=disks), "has_run": True}
            report = await it.wants(generation=2, revision=11, **again)
            assert (report.power, report.permit_used) == (ObservedPower.FAILED, True)
            assert report.fault is not None
            assert report.fault.code == "disk_missing"
            for named in ("'root'", "'default'", "on n1", volume_name(VM, "root")):
                assert named in report.fault.detail
            assert it.state.pools["default"] == {}

            it.state.pools["default"] = kept
            report = await it.wants(generation=3, revision=12, **again)
            assert (report.power, report.fault) == (ObservedPower.RUNNING, None)

    virtual(main())


def test_a_permit_that_was_used_is_not_used_again_after_a_restart_of_the_agent() -> None:
    async def main() -> None:
        async with node() as it:
            it.hooks.hold_before["start"] = asyncio.Event()
            it.agent.take(desired())
            await asyncio.sleep(1)
            await it.start_agent()  # it died between "used" and the start
            report = await it.wants()
            assert (report.power, report.permit_used) == (ObservedPower.STOPPED, True)
            assert "start" not in it.hooks.acts

    virtual(main())


def test_a_permit_of_another_boot_is_void() -> None:
    async def main() -> None:
        async with node() as it:
            await it.start_agent("boot-2")
            report = await it.wants()
            assert (report.power, report.permit_used) == (ObservedPower.ABSENT, False)
            assert it.hooks.acts == []

    virtual(main())


def test_a_stop_revokes_a_permit_that_may_still_come() -> None:
    async def main() -> None:
        async with node() as it:
            report = await it.wants(revision=20, intent=Intent.STOP, permitted=False)
            assert (report.power, report.permit_used) == (ObservedPower.ABSENT, True)
            it.agent.take(desired(revision=10))
            await it.later()
            await it.start_agent()
            it.agent.take(desired(revision=10))
            await asyncio.sleep(A_WHILE_S)
            assert it.power() is None

    virtual(main())


def test_an_older_term_is_refused() -> None:
    async def main() -> None:
        async with node() as it:
            await it.fence.accept_term(Term(1, 5))
            it.agent.take(desired(term=Term(1, 4)))
            await asyncio.sleep(A_WHILE_S)
            assert it.power() is None
            assert it.reports == []

    virtual(main())


def test_a_running_domain_of_another_generation_is_not_touched() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            acts = list(it.hooks.acts)
            for intent in (Intent.RUN, Intent.PAUSE, Intent.STOP, Intent.REMOVE):
                report = await it.wants(
                    revision=20, generation=2, intent=intent, permitted=intent is Intent.RUN
                )
                assert it.power() is ObservedPower.RUNNING
                assert (report.generation, report.power) == (1, ObservedPower.RUNNING)
                assert report.fault is not None
                assert report.fault.code == "generation_mismatch"
                await it.start_agent()
            assert acts == ["define", "start"]
            assert it.hooks.acts == []

    virtual(main())


def test_a_foreign_domain_of_that_name_is_not_touched() -> None:
    async def main() -> None:
        async with node() as it:
            it.state.add_foreign(VM, "somebody-elses")
            await it.wants(generation=0, intent=Intent.REMOVE, permitted=False)
            assert it.power() is ObservedPower.RUNNING
            assert it.hooks.acts == []

    virtual(main())


def test_a_start_that_is_refused_is_told_with_its_fault() -> None:
    async def main() -> None:
        async with node() as it:
            nowhere = spec(disks=(DiskSpec(name="root", size_gib=1, pool="nowhere"),))
            report = await it.wants(spec=nowhere)
            assert (report.power, report.permit_used) == (ObservedPower.FAILED, True)
            assert report.fault is not None

            report = await it.wants(generation=2, revision=11)
            assert (report.power, report.fault) == (ObservedPower.RUNNING, None)

    virtual(main())


def test_a_start_whose_answer_was_lost_is_looked_at_before_anything_is_told() -> None:
    async def main() -> None:
        async with node() as it:
            it.hooks.lose_answers_of = "start"
            report = await it.wants()
            assert {each.power for each in it.reports} == {ObservedPower.RUNNING}
            assert report.fault is None

    virtual(main())


def test_while_libvirt_is_away_nothing_is_told() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            it.reports.clear()
            it.state.libvirtd_dies()
            it.agent.take(desired(revision=11))
            await asyncio.sleep(60)
            assert it.reports == []
            it.state.libvirtd_returns()
            assert (await it.later()).power is ObservedPower.RUNNING

    virtual(main())


def test_an_end_that_no_event_told_is_found() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            it.state.observe(lambda name: None)
            it.state.guest_powers_off(VM)
            await asyncio.sleep(35)
            assert it.reports[-1].power is ObservedPower.SHUT_OFF

    virtual(main())


def test_a_hello_says_nothing_of_what_is_started_while_it_is_read() -> None:
    """ "Not running, permit used", read just before a start, would end an attempt that runs."""

    async def main() -> None:
        async with node() as it:
            it.hooks.hold_before["start"] = asyncio.Event()
            it.hooks.hold_after["domains"] = asyncio.Event()
            it.agent.take(desired())
            await asyncio.sleep(1)
            reading = asyncio.ensure_future(it.agent.found())
            await asyncio.sleep(1)
            it.hooks.hold_before.pop("start").set()
            await asyncio.sleep(A_WHILE_S)
            assert it.power() is ObservedPower.RUNNING
            it.hooks.hold_after.pop("domains").set()
            found, _ = await reading
            assert found == ()

            found, _ = await it.agent.found()
            assert [each.power for each in found] == [ObservedPower.RUNNING]

    virtual(main())


def test_found_tells_ours_and_foreign_ones_apart() -> None:
    async def main() -> None:
        async with node() as it:
            it.state.add_foreign("pet", "somebody-elses")
            await it.wants()
            found, foreign = await it.agent.found()
            assert [each.vm_id for each in found] == [VM]
            assert foreign == ("pet",)

    virtual(main())


def test_a_removal_leaves_nothing_and_is_told_once_more_when_asked_again() -> None:
    async def main() -> None:
        async with node() as it:
            disks = spec(disks=(DiskSpec(name="root", size_gib=1),))
            await it.wants(spec=disks)
            for revision in (11, 12):
                report = await it.wants(
                    spec=disks, revision=revision, intent=Intent.REMOVE, permitted=False
                )
                assert report.removed
                assert report.generation == 1
            assert it.state.domains == {}
            assert it.state.pools["default"] == {}
            assert it.agent.known() == ()

    virtual(main())


def test_a_vm_that_the_leader_does_not_bind_here_is_left_alone() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            acts = list(it.hooks.acts)
            await it.agent.drop_all_but(())
            it.driver.guest_powers_off(VM)
            await asyncio.sleep(60)
            assert it.hooks.acts == acts
            assert VM in it.state.domains
            assert it.agent.known() == ()

    virtual(main())


def request(kind: RequestKind, number: int = 1) -> GuestRequest:
    return GuestRequest(number=number, kind=kind, generation=1, deadline_s=20)


def test_a_reset_is_done_once_whatever_is_told_twice() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            for revision in (11, 12):
                report = await it.wants(revision=revision, request=request(RequestKind.RESET))
                assert report.answered_request == 1
            await it.start_agent()
            await it.wants(revision=13, request=request(RequestKind.RESET))
            assert it.hooks.acts == []
            await it.wants(revision=14, request=request(RequestKind.RESET, number=2))
            assert it.hooks.acts == ["reset"]

    virtual(main())


def test_a_guest_that_does_not_shut_down_is_stopped_after_its_deadline() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            it.state.domains[VM].press_power_button = _deaf  # type: ignore[method-assign]
            report = await it.wants(
                revision=11,
                intent=Intent.STOP,
                permitted=False,
                request=request(RequestKind.SHUTDOWN),
            )
            assert (report.power, report.answered_request) == (ObservedPower.RUNNING, 0)
            await asyncio.sleep(20)
            report = await it.later()
            assert (report.power, report.answered_request) == (ObservedPower.STOPPED, 1)
            assert it.hooks.acts.count("shutdown") == 1

    virtual(main())


def _deaf(outcome: str) -> None:
    """Ignore the power button, as a guest without ACPI does."""


def test_a_guest_that_stops_again_and_again_is_told_of_and_resumed_now_and_then() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            resume = it.driver.resume

            async def stops_again(name: str, generation: int) -> None:
                await resume(name, generation)
                it.state.domains[VM].pause()

            it.driver.resume = stops_again  # type: ignore[method-assign]
            it.state.domains[VM].pause()
            report = await it.later()
            assert report.power is ObservedPower.PAUSED
            assert report.fault is not None
            assert "stops again" in report.fault.detail
            await asyncio.sleep(3 * RESUME_PERIOD_S)
            assert 3 <= it.hooks.acts.count("resume") <= 6
            it.driver.resume = resume  # type: ignore[method-assign]
            await asyncio.sleep(2 * RESUME_PERIOD_S)
            report = await it.later()
            assert (report.power, report.fault) == (ObservedPower.RUNNING, None)

    virtual(main())


def test_a_guest_that_was_paused_by_its_user_is_resumed_at_once() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            for revision in range(20, 24, 2):
                await it.wants(revision=revision, intent=Intent.PAUSE)
                report = await it.wants(revision=revision + 1)
                assert report.power is ObservedPower.RUNNING

    virtual(main())


def test_a_stop_that_is_refused_is_told_of() -> None:
    async def main() -> None:
        async with node() as it:
            await it.wants()
            stop = it.driver.stop

            async def refused(name: str, generation: int) -> None:
                raise HypervisorError("its process does not end")

            it.driver.stop = refused  # type: ignore[method-assign]
            report = await it.wants(revision=20, intent=Intent.STOP)
            assert report.power is ObservedPower.RUNNING
            assert report.fault is not None
            assert "does not end" in report.fault.detail
            it.driver.stop = stop  # type: ignore[method-assign]
            await asyncio.sleep(A_WHILE_S)
            assert (await it.later()).power is ObservedPower.STOPPED

    virtual(main())


def test_a_newer_wish_is_followed_while_an_older_one_is_worked_on() -> None:
    async def main() -> None:
        async with node() as it:
            it.hooks.hold_after["define"] = asyncio.Event()
            it.agent.take(desired())
            await asyncio.sleep(1)
            it.agent.take(desired(revision=11, intent=Intent.STOP, permitted=False))
            it.agent.take(desired(revision=10))
            it.hooks.hold_after.pop("define").set()
            report = await it.later()
            assert (report.power, report.revision) == (ObservedPower.STOPPED, 11)

    virtual(main())


def test_definitions_carry_the_generation() -> None:
    async def main() -> None:
        async with node() as it:
            seen: list[DomainDefinition] = []
            define = it.driver.define

            async def noted(definition: DomainDefinition) -> None:
                seen.append(definition)
                await define(definition)

            it.driver.define = noted  # type: ignore[method-assign]
            await it.wants(generation=7)
            assert [(each.vm_id, each.generation) for each in seen] == [(VM, 7)]

    virtual(main())


def test_a_desired_state_of_a_newer_release_is_not_guessed_at() -> None:
    async def main() -> None:
        async with node() as it:
            told: Desired = desired(intent=Intent.UNKNOWN)
            it.agent.take(told)
            report = await it.later()
            assert report.power is ObservedPower.ABSENT
            assert it.hooks.acts == []

    virtual(main())
