"""What every write has in common, whatever it changes: the terms that its client ties to it.

A use case submits its command through its context; the context of one request is ``tied`` to that
request's terms, so that no use case can forget them. One request is one command: a key stands for
one change, and a second would be answered with the first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from controlplane.commands.draft import Command
from controlplane.commands.newest import ProveNewest
from controlplane.commands.terms import Expected, OnTerms, RequestKey, check_same, still_kept
from controlplane.services import cluster, vms
from controlplane.services.admission import admission_view
from controlplane.services.context import Context, Principal, Result, Submit
from controlplane.services.nodes import node_view
from controlplane.services.operations import find_operation
from controlplane.services.scope import find_node
from controlplane.services.views import (
    AdmissionView,
    ClusterView,
    NodeView,
    OperationView,
    VmView,
    operation_view,
)
from shared.errors import (
    DeletedSince,
    NotFound,
    OutcomeUnknown,
    StateConflict,
    Unavailable,
    ValidationFailed,
)

# Of the ids that stand for what a request became; a create becomes its operation.
VM_ID_PREFIX = "vm-"
NODE_ID_PREFIX = "node-"

Object = OperationView | NodeView | VmView | ClusterView | AdmissionView


UseCase = Callable[[Context], Awaitable[object]]


class TiedSubmit:
    """Submits the one command of a request on its terms.

    ``done`` once it was committed; ``replayed`` when that was by an earlier request.
    """

    def __init__(
        self, submit: Submit, key: RequestKey | None = None, expected: Expected | None = None
    ) -> None:
        self._submit = submit
        self._key = key
        self._expected = expected
        self._used = False
        self.done = False
        self.replayed = False

    async def __call__(self, command: Command[Result]) -> Result:
        assert not self._used, "one request is one command"
        self._used = True
        decided = await self._submit(
            OnTerms(command=command, key=self._key, expected=self._expected)
        )
        self.done, self.replayed = True, decided.replayed
        return decided.result


def tied(context: Context, submit: Submit) -> Context:
    return replace(context, submit=submit)


async def carry_out(
    context: Context,
    principal: Principal,
    key: RequestKey | None,
    expected: Callable[[], Expected | None],
    use_case: UseCase,
) -> tuple[object, bool]:
    """Return what a write returns, and whether an earlier request under its key had done it.

    Use cases look names up in this replica's memory, which is behind the leader's while it follows,
    and older still while it takes over. Nobody is told on such grounds that something is not there:
    a write that fails on it is done again once memory is proven to be the newest.
    """
    for is_last in (False, True):
        if key is not None and (known := await _answer_again(context, principal, key)) is not None:
            return known, True
        submit: TiedSubmit | None = None
        try:
            submit = TiedSubmit(context.submit, key, expected())
            return await use_case(tied(context, submit)), submit.replayed
        except (NotFound, ValidationFailed):
            if is_last or (submit is not None and submit.done):
                raise
        await _catch_up(context)
    raise AssertionError("the last attempt returns or raises")


async def _catch_up(context: Context) -> None:
    """Return once this replica's memory is the newest. Raises Unavailable: nothing was changed."""
    try:
        await context.submit(ProveNewest())
    except OutcomeUnknown as unknown:
        raise Unavailable(f"what there is cannot be told just now: {unknown}") from unknown


async def _answer_again(context: Context, principal: Principal, key: RequestKey) -> Object | None:
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
    if result.startswith(NODE_ID_PREFIX):
        raise DeletedSince(f"the request was done; node {result} has been removed since")
    if result in state.join_tokens:
        raise StateConflict(
            f"the request made join token {result}, whose secret is told once: withdraw it, and "
            "make another"
        )
    if result in state.admissions:
        return admission_view(state.admissions[result].record)
    if result in state.clusters:
        return await cluster.show_cluster(context, principal)
    operation = await find_operation(context, principal.scope, result)
    if operation is None:
        raise NotFound(f"the request was done as {result}, which this replica does not have")
    return operation_view(operation)
