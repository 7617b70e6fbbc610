"""A start that libvirt carries out late, around the permit of the next attempt.

The agent is killed while libvirtd holds its start up; its successor reports that attempt as over,
and the leader permits another. Whenever the first start then succeeds, one guest runs, the record
says which, and the operation ends. See the first row of docs/track-record.md.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agent.hypervisor import Hypervisor
from controlplane.services.operations import get_operation
from controlplane.services.vms import create_vm
from shared.model import OperationState
from tests.sim.agent_ports import SLOW_S
from tests.sim.cluster import ClusterSettings, SimCluster
from tests.sim.invariants import Judge, everything_settles
from tests.sim.libvirtd import Libvirtd
from tests.sim.test_cluster import ADMIN, NEW_VM
from tests.sim.virtual_loop import run_virtual

Result = TypeVar("Result")

KILLED_AFTER_S = 0.5
SETTLED_WITHIN_S = 60.0
NEVER_IN_TIME_S = 10.0
# The window is as long as a message is under way; a slow call adds up to 0.2 s before it acts.
SWEEP_BEFORE_S = 0.25
SWEEP_STEP_S = 0.001
SWEEP_STEPS = 270


def held_up_once(libvirtd: Libvirtd, hold_s: float) -> asyncio.Event:
    """Let libvirtd hold the first slow call up; the event is set when that has begun."""
    begun = asyncio.Event()
    carry_out = libvirtd.call

    async def call(
        work: Callable[[Hypervisor], Awaitable[Result]], bounds: tuple[float, float]
    ) -> Result:
        if bounds == SLOW_S and not begun.is_set():
            begun.set()
            await asyncio.sleep(hold_s)
        return await carry_out(work, bounds)

    libvirtd.call = call  # type: ignore[method-assign]
    return begun


async def tell(hold_s: float) -> float | None:
    """Tell the story; return after how long the second attempt was permitted, if it was."""
    judge = Judge()
    settings = ClusterSettings(nodes=1, held_up_share=0.0)
    cluster = SimCluster(settings, random.Random(1), observe=judge.take)
    await cluster.start()
    await cluster.until_ready()
    (node,) = cluster.nodes.values()
    begun = held_up_once(node.libvirtd, hold_s)
    operation = await create_vm(cluster.context(), ADMIN, NEW_VM)
    await begun.wait()
    permitted = asyncio.ensure_future(second_permit(cluster))
    await asyncio.sleep(KILLED_AFTER_S)
    node.crash_agent()
    node.start_agent()
    await asyncio.sleep(SETTLED_WITHIN_S)
    ended = await get_operation(cluster.context(), ADMIN, operation.id, 0)
    assert ended.state is OperationState.SUCCEEDED, f"held up for {hold_s} s: {ended.phase}"
    assert not list(everything_settles(judge.ledger, [node.found()]))
    await cluster.stop()
    if permitted.done():
        return permitted.result()
    permitted.cancel()  # the first start came in time
    return None


async def second_permit(cluster: SimCluster) -> float:
    """Return after how many seconds from now generation 2 was given out."""
    state = cluster.context().state
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not any(stored.record.status.generation == 2 for stored in state.vms.values()):
        await state.changes.wait()
    return loop.time() - began_s


def test_whenever_it_succeeds_one_guest_runs_as_the_record_says() -> None:
    permitted_s = run_virtual(tell(NEVER_IN_TIME_S))
    assert permitted_s is not None, "the first attempt was held up for long"

    for step in range(SWEEP_STEPS):
        run_virtual(tell(permitted_s - SWEEP_BEFORE_S + step * SWEEP_STEP_S))
