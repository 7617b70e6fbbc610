"""What every write has in common, whatever it changes: the terms that its client ties to it.

A use case submits its command through its context; the context of one request is ``tied`` to that
request's terms, so that no use case can forget them. One request is one command: a key stands for
one change, and a second would be answered with the first.
"""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.commands.draft import Command
from controlplane.commands.terms import Expected, OnTerms, RequestKey, check_same, still_kept
from controlplane.services import cluster, vms
from controlplane.services.context import Context, Principal, Result, Submit
from controlplane.services.nodes import node_view
from controlplane.services.operations import find_operation
from controlplane.services.scope import find_node
from controlplane.services.views import (
    ClusterView,
    NodeView,
    OperationView,
    VmView,
    operation_view,
)
from shared.errors import NotFound

# Of the ids that stand for what a request became; a create becomes its operation.
VM_ID_PREFIX = "vm-"

Object = OperationView | NodeView | VmView | ClusterView


class TiedSubmit:
    """Submits the one command of a request on its terms; ``replayed`` once it was done before."""

    def __init__(
        self, submit: Submit, key: RequestKey | None = None, expected: Expected | None = None
    ) -> None:
        self._submit = submit
        self._key = key
        self._expected = expected
        self._used = False
        self.replayed = False

    async def __call__(self, command: Command[Result]) -> Result:
        assert not self._used, "one request is one command"
        self._used = True
        decided = await self._submit(
            OnTerms(command=command, key=self._key, expected=self._expected)
        )
        self.replayed = decided.replayed
        return decided.result


def tied(context: Context, submit: Submit) -> Context:
    return replace(context, submit=submit)


async def answer_again(context: Context, principal: Principal, key: RequestKey) -> Object | None:
    """Return what a request became that this replica knows to be done; None when it is new.

    Asked before the use case, which might not find any more what it had deleted. Raises
    IdempotencyKeyReused; DeletedSince when it changed a VM that is gone, NotFound when the
    operation that it became is too old for this replica.
    """
    stored = context.state.idempotency.get(key.id)
    if stored is None or not still_kept(stored.record, context.clock.now()):
        return None
    check_same(stored.record, key)
    return await _shown(context, principal, stored.record.result)


async def _shown(context: Context, principal: Principal, result: str) -> Object:
    state = context.state
    if result.startswith(VM_ID_PREFIX):
        return vms.changed(context, result)
    if result in state.nodes:
        return node_view(state, find_node(context, result))
    if result in state.clusters:
        return await cluster.show_cluster(context, principal)
    operation = await find_operation(context, principal.scope, result)
    if operation is None:
        raise NotFound(f"the request was done as {result}, which this replica does not have")
    return operation_view(operation)
