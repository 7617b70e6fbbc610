"""VMs on the move, in memory: two nodes, and a migration brought as far as a test wants."""

from __future__ import annotations

from typing import Any

from controlplane.commands.draft import Author
from controlplane.commands.drains import DRAIN, RequestDrain
from controlplane.commands.migrations import (
    MigrationLimits,
    RequestMigration,
    admit,
    claim_destination,
    close_claim,
    switch,
    to_stage,
)
from controlplane.commands.sagas import BeginUndo, Effect, FailStep, FinishStep, FinishUndo, Note
from controlplane.commands.sagas import unchanged as nothing
from controlplane.sagas.drain import DRAINING
from controlplane.sagas.migrate import MIGRATION
from shared.model import ObservedPower, Operation
from shared.moves import MigrationClaim, MigrationStage
from shared.problems import problem
from tests.unit.core_world import USER, CoreWorld, no_check

FAULT = problem("broken", "it broke")


class MoveWorld(CoreWorld):
    """The nodes are ``n1``, on which VMs run, and ``n2``."""

    def __init__(self) -> None:
        super().__init__()
        self.other_id = self.join("n2")

    def request(self, vm_id: str, destination: str | None = None) -> RequestMigration:
        return RequestMigration(
            vm_id=vm_id,
            destination=destination,
            steps=MIGRATION.names,
            no_return=MIGRATION.no_return,
            by=USER,
        )

    def migrate(self, vm_id: str) -> str:
        return self.apply(self.request(vm_id))

    def drain(self, node_id: str | None = None, by: Author = USER, **changes: Any) -> RequestDrain:
        fields: dict[str, Any] = {"reason": "", "skip": ()}
        return RequestDrain(
            node_id=node_id or self.node_id,
            steps=DRAINING.names,
            no_return=DRAINING.no_return,
            by=by,
            **{**fields, **changes},
        )

    def finish(self, operation_id: str, step: str, effect: Effect = nothing) -> None:
        self.apply(FinishStep(operation_id=operation_id, step=step, effect=effect))

    def note(self, operation_id: str, step: str, effect: Effect) -> None:
        self.apply(Note(operation_id=operation_id, step=step, effect=effect))

    def fail(self, operation_id: str, step: str) -> None:
        self.apply(FailStep(operation_id=operation_id, step=step, fault=FAULT))

    def undo(self, operation_id: str, step: str, effect: Effect = nothing) -> None:
        self.apply(BeginUndo(operation_id=operation_id, step=step))
        self.apply(FinishUndo(operation_id=operation_id, step=step, effect=effect))

    def moving(self, step: str, name: str = "web-1", **spec: Any) -> tuple[str, str]:
        """Return the ids of a VM and of its migration, which has come to ``step``."""
        vm_id = self.running(name, **spec)
        operation_id = self.migrate(vm_id)
        for done in MIGRATION.names[: MIGRATION.names.index(step)]:
            self.finish(operation_id, done, self.effects().get(done, nothing))
        return vm_id, operation_id

    def effects(self) -> dict[str, Effect]:
        """What the steps of a migration write that goes well."""
        return {
            "admit": admit(self.other_id, MigrationLimits()),
            "claim": claim_destination(no_check, copied=("root",)),
            "prepare": to_stage(MigrationStage.TRANSFER),
            "switch": switch(ObservedPower.RUNNING),
            "finalize": close_claim(None, swept=True),
        }

    def left_over(self, name: str = "web-1") -> str:
        """Return a VM that has moved to ``n2``, and of which ``n1`` may still hold something."""
        vm_id, operation_id = self.moving("finalize", name)
        self.finish(operation_id, "finalize", close_claim(None, swept=False))
        return vm_id

    def claim(self, vm_id: str) -> MigrationClaim:
        claim = self.vm(vm_id).status.migration
        assert claim is not None, "it is on the move"
        return claim

    def operation(self, operation_id: str) -> Operation:
        return self.state.operations[operation_id].record

    def drain_id(self) -> str:
        return next(
            stored.record.id
            for stored in self.state.operations.values()
            if stored.record.kind == DRAIN
        )
