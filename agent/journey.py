"""One transfer under way, as its source's agent follows it: progress, downtime steps, limits.

Following changes nothing about where the guest is: it may be cancelled, and taken up again by the
next agent, while libvirt goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from agent.convergence import Convergence
from agent.hypervisor import Hypervisor, Transfer
from shared.errors import HypervisorUnavailable, NovacronError
from shared.model import Problem
from shared.moves import EndState
from shared.problems import problem, problem_of
from shared.protocol import Desired, MigrationOrder, MigrationProgress

log = logging.getLogger(__name__)

# QEMU answers for its figures in 5 to 100 ms, now and then in seconds: oftener would disturb it.
LOOK_PERIOD_S = 0.5

Progress = Callable[[MigrationProgress], None]
Travel = Callable[[], Awaitable[None]]


class Journey:
    """``fault`` is what libvirt said against it; whether the guest moved, it does not say.

    ``unwanted``: it is to end as soon as it can be ended.
    """

    task: asyncio.Future[None]

    def __init__(self) -> None:
        self.fault: Problem | None = None
        self.unwanted = False

    @property
    def under_way(self) -> bool:
        return not self.task.done()


async def follow(
    journey: Journey,
    hypervisor: Hypervisor,
    desired: Desired,
    order: MigrationOrder,
    travel: Travel | None,
    progress: Progress,
) -> None:
    """Follow a transfer to its end: of ``travel``, or of the job that an earlier agent began."""
    guide = asyncio.ensure_future(_guide(journey, hypervisor, desired, order, progress))
    try:
        if travel is None:
            await _until_no_job(hypervisor, desired.domain_name)
        else:
            await travel()
    except NovacronError as error:
        log.warning("%s: the transfer ended: %s", desired.name, error)
        journey.fault = journey.fault or problem_of(error)
    finally:
        guide.cancel()


async def _until_no_job(hypervisor: Hypervisor, name: str) -> None:
    while True:
        await asyncio.sleep(LOOK_PERIOD_S)
        with contextlib.suppress(HypervisorUnavailable):
            end = await hypervisor.migration_end(name)
            if end is None or end.state is not EndState.MOVING:
                return


async def _guide(
    journey: Journey,
    hypervisor: Hypervisor,
    desired: Desired,
    order: MigrationOrder,
    progress: Progress,
) -> None:
    """Tell how far it is, allow more downtime in steps, and end what does not come to an end."""
    loop = asyncio.get_running_loop()
    name, generation = desired.domain_name, order.source_generation
    convergence = Convergence(
        max_downtime_ms=desired.spec.migration.max_downtime_ms,
        timeout_s=order.timeout_s,
        began_s=loop.time(),
    )
    allowed_ms = 0
    while True:
        await asyncio.sleep(LOOK_PERIOD_S)
        try:
            transfer = await hypervisor.transfer(name)
            if transfer is None:
                continue
            progress(_told(order, transfer))
            surrender = convergence.take(transfer, loop.time())
            if surrender is not None and not journey.unwanted:
                detail = f"the transfer {surrender.value}; the guest stays where it was"
                journey.fault = problem(f"migration_{surrender.name.lower()}", detail)
                journey.unwanted = True
            if journey.unwanted:
                await hypervisor.abort_migration(name, generation)
            elif convergence.downtime_ms != allowed_ms:
                allowed_ms = convergence.downtime_ms
                await hypervisor.set_max_downtime(name, generation, allowed_ms)
        except NovacronError as error:
            # It may have ended between two calls, or libvirtd is away: the job is what counts.
            log.info("%s: %s", name, error)


def _told(order: MigrationOrder, transfer: Transfer) -> MigrationProgress:
    total = transfer.bytes_total
    there = 1 - min(1.0, transfer.bytes_remaining / total) if total else 0.0
    return MigrationProgress(
        operation=order.operation,
        percent=round(100.0 * there, 1),
        eta_s=transfer.bytes_remaining / transfer.bytes_per_s if transfer.bytes_per_s else None,
        bytes_done=transfer.bytes_done,
        bytes_total=transfer.bytes_total,
    )
