"""The lab's client of NovaCron's API: the CLI's own, logged in, with the calls of a lab."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from controlplane.cli.client import Client, path_of
from controlplane.cli.context import Context
from controlplane.cli.terminal import Terminal
from controlplane.cli.views import (
    DryRunView,
    MigrationView,
    NodeView,
    OperationView,
    PlanView,
    VmView,
)
from tests.lab.layout import LabError
from tests.lab.state import LabState

POLL_S = 0.02
LONG_POLL_S = 2
OPERATION_LIMIT_S = 120.0

T = TypeVar("T")


class LabApi:
    """Blocking calls; raises CliError (ApiProblem, Unreachable) as the CLI does."""

    def __init__(self, context: Context) -> None:
        quiet = Terminal(out=io.StringIO(), err=io.StringIO())
        self.client = Client(context, quiet, random.Random())

    @classmethod
    def of(cls, state: LabState) -> LabApi:
        """Log in as the administrator of a lab."""
        return cls(
            Context(
                endpoints=state.api,
                ca=Path(state.ca).read_text(),
                token=Path(state.token).read_text().strip(),
            )
        )

    def close(self) -> None:
        self.client.close()

    def nodes(self) -> tuple[NodeView, ...]:
        return self._all("nodes", NodeView)

    def vms(self) -> tuple[VmView, ...]:
        return self._all("vms", VmView)

    def vm(self, name: str) -> VmView:
        return self.client.get_as(VmView, path_of("vms", name))

    def create_vm(self, body: Struct) -> OperationView:
        return self.client.post(path_of("vms"), body).decode(OperationView)

    def act(self, name: str, action: str, body: object = None) -> OperationView:
        """Ask for an action such as ``stop``; the operation has only been accepted."""
        path = path_of("vms", name, "actions", action)
        return self.client.post(path, body).decode(OperationView)

    def plan_drain(self, node: str) -> DryRunView:
        """Ask what would become of each VM of a node that is drained."""
        path = path_of("nodes", node, "actions", "drain")
        return self.client.post(path, {}, (("dry_run", "true"),)).decode(DryRunView)

    def drain(self, node: str) -> OperationView:
        return self.client.post(path_of("nodes", node, "actions", "drain"), {}).decode(
            OperationView
        )

    def uncordon(self, node: str) -> None:
        self.client.post(path_of("nodes", node, "actions", "uncordon"), {})

    def migration(self, id: str) -> MigrationView:
        return self.client.get_as(MigrationView, path_of("migrations", id))

    def delete_vm(self, name: str) -> OperationView:
        return self.client.delete(path_of("vms", name)).decode(OperationView)

    def placement(self, name: str) -> PlanView:
        return self.client.get_as(PlanView, path_of("vms", name, "placement"))

    def plan(self, body: Struct) -> PlanView:
        """Ask where a VM would go, without creating it."""
        return self.client.post(path_of("placement-plans"), body).decode(PlanView)

    def operation(self, id: str) -> OperationView:
        return self.client.get_as(OperationView, path_of("operations", id))

    def wait(self, operation: OperationView, limit_s: float = OPERATION_LIMIT_S) -> OperationView:
        """Return the operation once it has ended; raises LabError when that takes too long."""
        deadline = time.monotonic() + limit_s
        while not operation.ended:
            if time.monotonic() > deadline:
                raise LabError(f"{operation.kind} is still {operation.state} ({operation.phase})")
            # A replica that does not hold the request answers at once.
            time.sleep(POLL_S)
            path = path_of("operations", operation.id)
            answer = self.client.get(path, (("wait", LONG_POLL_S),), LONG_POLL_S)
            operation = answer.decode(OperationView)
        return operation

    def _all(self, collection: str, kind: type[T]) -> tuple[T, ...]:
        listing = self.client.collect(path_of(collection))
        return tuple(msgspec.json.decode(item, type=kind) for item in listing.items)
