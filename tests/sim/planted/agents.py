"""Bugs planted in agents, but for what they do in migrations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from agent import reconciler as agent_reconciler
from agent.fence import Fence
from agent.session import Session
from agent.steps import Step, next_step
from shared.protocol import Desired, Intent


def fence_forgets_generations() -> AbstractContextManager[Any]:
    """A permit is not used up, so that it starts the VM again."""

    async def forget(self: Fence, vm_id: str, generation: int) -> None:
        return None

    return patch.object(Fence, "use_generation", forget)


def stop_removes() -> AbstractContextManager[Any]:
    """An agent that stopped a VM leaves nothing of it."""

    def thorough(desired: Desired, *facts: Any) -> Step:
        step = next_step(desired, *facts)
        stopped = desired.intent is Intent.STOP and step is Step.SETTLED
        return Step.REMOVE if stopped else step

    return patch.object(agent_reconciler, "next_step", thorough)


def strays_are_stopped() -> AbstractContextManager[Any]:
    """An agent ends every guest that it was not told of, whoever may have started it."""
    start = agent_reconciler.VmReconciler.drop_all_but

    async def tidy(self: Any, vm_ids: tuple[str, ...]) -> None:
        await start(self, vm_ids)
        for domain in await self._hypervisor.domains():
            await self._hypervisor.stop(domain.name, domain.generation)

    return patch.object(agent_reconciler.VmReconciler, "drop_all_but", tidy)


def answers_are_forgotten() -> AbstractContextManager[Any]:
    """An agent does not know which request it has answered, and does what is asked again."""

    async def forget(self: Fence, vm_id: str, number: int) -> None:
        return None

    return patch.object(Fence, "answer_request", forget)


def cut_off_agents_pause_guests() -> AbstractContextManager[Any]:
    """An agent that has lost its leader has its guests stand still."""
    attempt = Session._attempt

    async def timid(self: Session, address: str) -> str | None:
        try:
            return await attempt(self, address)
        finally:
            if self._served:
                for domain in await self._hypervisor.domains():
                    await self._hypervisor.pause(domain.name, domain.generation)

    return patch.object(Session, "_attempt", timid)


def gone_vms_are_remembered() -> AbstractContextManager[Any]:
    """An agent never forgets a VM that it has removed."""

    async def remember(self: Fence, vm_id: str) -> None:
        return None

    return patch.object(Fence, "forget", remember)
