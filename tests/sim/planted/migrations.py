"""Bugs planted in migrations, at both ends and in the saga between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from agent import arrivals
from agent.fence import Departure, Fence
from controlplane.sagas import matrix, migrate
from controlplane.sagas.context import StepContext
from controlplane.sessions import hub
from controlplane.sessions.desired import desired_of
from shared.model import Node, Term, Vm
from shared.moves import EndState, MigrationClaim, MigrationStage
from shared.protocol import Desired, Intent, MigrationReport, MigrationRole
from tests.sim.agent_ports import ProcessHypervisor

_E = EndState


def switched_source_is_resumed() -> AbstractContextManager[Any]:
    """The source of a migration that has switched is told what one that failed is told."""

    def mixed_up(stored: Any, node: Node, term: Term, name_of: Any) -> Desired | None:
        desired = desired_of(stored, node, term, name_of)
        if desired is None or desired.migration is None or desired.intent is not Intent.LEAVE:
            return desired
        order = replace(desired.migration, stage=MigrationStage.RESUME)
        return replace(desired, intent=Intent.RUN, migration=order)

    return patch.object(hub, "desired_of", mixed_up)


def return_codes_decide() -> AbstractContextManager[Any]:
    """Where the guest is is read from what the source's call returned."""

    def believed(context: StepContext, vm: Vm, claim: MigrationClaim) -> tuple[EndState, EndState]:
        report = migrate._report(context, vm, claim, claim.source)
        if report is None or not report.over:
            return EndState.UNKNOWN, EndState.UNKNOWN
        failed = report.fault is not None
        return (_E.RUNNING, _E.ABSENT) if failed else (_E.ABSENT, _E.RUNNING)

    return patch.multiple(migrate, _ends=believed, _fresh_ends=believed)


@contextmanager
def running_destination_is_cleaned() -> Iterator[None]:
    """Of two guests the source's is kept, and whatever is on the destination is ended."""
    two = {(source, _E.RUNNING): matrix.Verdict.STAYED for source in (_E.RUNNING, _E.HELD)}
    with (
        patch.dict(matrix.VERDICTS, two),
        patch.object(arrivals, "_NEVER_RAN", frozenset(EndState) - {_E.ABSENT}),
    ):
        yield


def departures_are_forgotten() -> AbstractContextManager[Any]:
    """That a guest has set out is in the agent's memory only."""

    async def remember(self: Fence, vm_id: str, departure: Departure) -> None:
        self._take(replace(self.facts(vm_id), departure=departure))

    return patch.object(Fence, "depart", remember)


def unreachable_is_empty() -> AbstractContextManager[Any]:
    """A destination that cannot be asked counts as one that has nothing."""
    ends, fresh_ends, report = migrate._ends, migrate._fresh_ends, migrate._report

    def assumed(found: Any) -> Any:
        def of(context: StepContext, vm: Vm, claim: MigrationClaim) -> tuple[EndState, EndState]:
            source, destination = found(context, vm, claim)
            gone = claim.destination is None or not context.nodes.trusts(claim.destination)
            return (_E.RUNNING, _E.ABSENT) if gone else (source, destination)

        return of

    def answered(
        context: StepContext, vm: Vm, claim: MigrationClaim, node_id: str | None
    ) -> MigrationReport | None:
        if node_id is None or context.nodes.trusts(node_id):
            return report(context, vm, claim, node_id)
        return MigrationReport(
            generation=claim.generation,
            role=MigrationRole.DESTINATION,
            stage=claim.stage,
            end=EndState.ABSENT,
            over=True,
            settled=True,
        )

    return patch.multiple(
        migrate, _ends=assumed(ends), _fresh_ends=assumed(fresh_ends), _report=answered
    )


def nobody_holds_returned_guests() -> AbstractContextManager[Any]:
    """An agent lets a guest be that libvirt lets go on although it may have moved."""

    async def look_away(self: ProcessHypervisor, name: str, generation: int) -> bool:
        return False

    return patch.object(ProcessHypervisor, "hold", look_away)


def failed_source_is_swept() -> AbstractContextManager[Any]:
    """The source of a migration that has failed is told what one that has switched is told."""

    def mixed_up(stored: Any, node: Node, term: Term, name_of: Any) -> Desired | None:
        desired = desired_of(stored, node, term, name_of)
        order = None if desired is None else desired.migration
        if desired is None or order is None or order.stage is not MigrationStage.RESUME:
            return desired
        swept = replace(order, stage=MigrationStage.FINALIZE)
        return replace(desired, intent=Intent.LEAVE, migration=swept)

    return patch.object(hub, "desired_of", mixed_up)
