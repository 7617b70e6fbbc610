"""What nodes tell of migrations, and what the hub passes on; agents are played by the test."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.commands.migrations import (
    HearOfLeftover,
    MigrationLimits,
    RequestMigration,
    admit,
    claim_destination,
    close_claim,
    switch,
    to_stage,
)
from controlplane.commands.sagas import Effect, FinishStep, Note, unchanged
from controlplane.sagas.migrate import MIGRATION
from shared.model import ObservedPower
from shared.moves import EndState, Leftover, MigrationStage
from shared.protocol import (
    Desired,
    DestinationLayout,
    MigrationOrder,
    MigrationReport,
    MigrationRole,
    MigrationTarget,
    VmReport,
)
from tests.unit.core_world import USER, no_check
from tests.unit.pipes import PipeEnd
from tests.unit.test_hub import A_WHILE_S, Site, a_report, greeted, site, virtual

TOKEN = "a-token-that-opens-the-relay"
TARGET = MigrationTarget(
    node_name="n2",
    address="192.0.2.2",
    relay="192.0.2.2:8445",
    token=TOKEN,
    tls=True,
    layout=DestinationLayout(
        kernel_path="k", initrd_path=None, disk_paths=(), bridges=(), console_log_path="c"
    ),
)


class Move:
    """A VM that runs on n1 and moves to n2; both agents have been greeted."""

    def __init__(self, it: Site, vm_id: str, operation_id: str) -> None:
        self.site = it
        self.vm_id = vm_id
        self.operation_id = operation_id

    async def finish(self, step: str, effect: Effect = unchanged) -> None:
        await self.site.submit(FinishStep(operation_id=self.operation_id, step=step, effect=effect))

    async def stage(self, stage: MigrationStage) -> None:
        await self.site.submit(
            Note(operation_id=self.operation_id, step="transfer", effect=to_stage(stage))
        )

    async def to_finalize(self) -> None:
        await self.finish("transfer")
        await self.finish("switch", switch(ObservedPower.RUNNING))

    @property
    def leftovers(self) -> tuple[Leftover, ...]:
        return self.site.state.vms[self.vm_id].record.status.leftovers

    def told(self, node: str) -> MigrationReport | None:
        node_id = self.site.state.node_id_by_name(node)
        assert node_id is not None
        return self.site.hub.migration_report(self.vm_id, node_id)


async def a_move(it: Site) -> Move:
    """Bring a migration to its step ``transfer``."""
    vm_id = await it.permitted_vm()
    request = RequestMigration(
        vm_id=vm_id,
        destination=None,
        steps=MIGRATION.names,
        no_return=MIGRATION.no_return,
        by=USER,
    )
    move = Move(it, vm_id, await it.submit(request))
    other = it.state.node_id_by_name("n2")
    assert other is not None
    await move.finish("admit", admit(other, MigrationLimits()))
    await move.finish("precheck")
    await move.finish("claim", claim_destination(no_check, ()))
    await move.finish("prepare", to_stage(MigrationStage.TRANSFER))
    return move


async def ready(it: Site) -> tuple[PipeEnd, PipeEnd, Move]:
    source, destination = await greeted(it, "n1"), await greeted(it, "n2")
    running = asyncio.ensure_future(_seen_running(it, source))
    move = await a_move(it)
    await running
    return source, destination, move


async def _seen_running(it: Site, source: PipeEnd) -> None:
    desired = await source.expect(Desired)
    await source.send(a_report(desired.vm_id, ObservedPower.RUNNING))


def told_of(
    vm_id: str,
    role: MigrationRole,
    stage: MigrationStage = MigrationStage.TRANSFER,
    claim_generation: int = 2,
    generation: int = 2,
    settled: bool = False,
    target: MigrationTarget | None = None,
) -> VmReport:
    return VmReport(
        vm_id=vm_id,
        generation=generation,
        power=ObservedPower.ABSENT,
        permit_used=True,
        migration=MigrationReport(
            generation=claim_generation,
            role=role,
            stage=stage,
            end=EndState.ABSENT,
            settled=settled,
            target=target,
        ),
    )


def orders(stream: PipeEnd) -> list[MigrationOrder]:
    """Return the orders that an agent was sent."""
    messages = [each for each in stream.peer.sent if isinstance(each, Desired)]
    return [each.migration for each in messages if each.migration is not None]


_Role, _Stage = MigrationRole, MigrationStage


def test_a_target_goes_from_the_destinations_report_to_the_sources_order_only() -> None:
    async def main() -> None:
        async with site() as it:
            source, destination, move = await ready(it)
            await asyncio.sleep(A_WHILE_S)
            assert [each.target for each in orders(source)][-1] is None
            await destination.send(told_of(move.vm_id, _Role.DESTINATION, target=TARGET))
            await asyncio.sleep(A_WHILE_S)
            await move.stage(MigrationStage.TRANSFER)  # both are looked at again
            await asyncio.sleep(A_WHILE_S)

            assert orders(source)[-1].target == TARGET
            assert all(each.target is None for each in orders(destination))
            await move.stage(MigrationStage.ABORT)
            await asyncio.sleep(A_WHILE_S)
            assert orders(source)[-1].stage is MigrationStage.ABORT
            assert orders(source)[-1].target is None
            revisions = it.writer.model.events_from(2)
            stored = [event.kv.value for events in revisions for event in events]
            assert stored
            assert not any(TOKEN.encode() in value for value in stored)

    virtual(main())


@pytest.mark.parametrize("who", ["n1", "n2"])
def test_a_target_counts_from_the_claims_destination_and_for_its_generation(who: str) -> None:
    """Not from the source itself, and not what an earlier claim had made ready."""

    async def main() -> None:
        async with site() as it:
            source, destination, move = await ready(it)
            stream, generation = (source, 2) if who == "n1" else (destination, 1)
            report = told_of(
                move.vm_id, _Role.DESTINATION, claim_generation=generation, target=TARGET
            )
            await stream.send(report)
            await asyncio.sleep(A_WHILE_S)

            assert all(each.target is None for each in orders(source))

    virtual(main())


def test_what_a_node_told_is_forgotten_with_its_session() -> None:
    async def main() -> None:
        async with site() as it:
            source, destination, move = await ready(it)
            heard: list[None] = []
            it.hub.on_migration_report(lambda: heard.append(None))
            await destination.send(told_of(move.vm_id, _Role.DESTINATION, target=TARGET))
            await asyncio.sleep(A_WHILE_S)
            assert heard == [None]
            assert move.told("n2") is not None
            assert move.told("n1") is None
            await destination.close()
            await asyncio.sleep(A_WHILE_S)
            assert move.told("n2") is None

            await greeted(it, "n2")
            await asyncio.sleep(A_WHILE_S)
            assert move.told("n2") is None
            await greeted(it, "n1")
            assert orders(source)[-1].target == TARGET, "what was sent is sent"

    virtual(main())


def test_what_a_node_told_is_forgotten_when_it_has_nothing_to_do_with_the_vm_any_more() -> None:
    async def main() -> None:
        async with site() as it:
            source, _, move = await ready(it)
            await move.to_finalize()
            await source.send(told_of(move.vm_id, _Role.SOURCE, _Stage.FINALIZE, settled=True))
            await asyncio.sleep(A_WHILE_S)
            assert move.told("n1") is not None
            await move.finish("finalize", close_claim(None, swept=True))
            await asyncio.sleep(A_WHILE_S)

            assert move.told("n1") is None

    virtual(main())


def test_a_leftover_is_swept_by_its_own_nodes_report_only() -> None:
    async def main() -> None:
        async with site() as it:
            source, destination, move = await ready(it)
            await move.to_finalize()
            await move.finish("finalize", close_claim(None, swept=False))
            assert len(move.leftovers) == 1
            vm_id = move.vm_id
            swept = told_of(vm_id, _Role.SOURCE, _Stage.FINALIZE, generation=1, settled=True)
            await destination.send(swept)
            for not_swept in (
                told_of(vm_id, _Role.SOURCE, _Stage.FINALIZE, generation=1),
                told_of(vm_id, _Role.SOURCE, _Stage.FINALIZE, settled=True),
                told_of(vm_id, _Role.SOURCE, _Stage.ABORT, generation=1, settled=True),
                told_of(vm_id, _Role.DESTINATION, _Stage.FINALIZE, generation=1, settled=True),
            ):
                await source.send(not_swept)
                await asyncio.sleep(A_WHILE_S)
            assert len(move.leftovers) == 1
            await source.send(swept)
            await asyncio.sleep(A_WHILE_S)

            assert not move.leftovers

    virtual(main())


def test_sweeping_what_is_swept_writes_nothing() -> None:
    async def main() -> None:
        async with site() as it:
            _, _, move = await ready(it)
            before = it.state.vms[move.vm_id]
            node_id = it.node_id
            await it.submit(
                HearOfLeftover(vm_id=move.vm_id, node_id=node_id, generation=1, gone=True)
            )
            await it.submit(
                HearOfLeftover(vm_id="vm-gone", node_id=node_id, generation=1, gone=True)
            )

            assert it.state.vms[move.vm_id] == before

    virtual(main())
