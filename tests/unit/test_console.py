"""A VM's console log is one text, whatever nodes have parts of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.commands.migrations import LOGS_MAX, HearOfLeftover, with_log_on
from controlplane.commands.nodes import SetNodeState
from controlplane.commands.vms import CreateVm, DeleteVm
from controlplane.services.console import console_log
from controlplane.services.context import Permission, Principal, Scope
from controlplane.services.requests import ConsoleQuery
from shared.errors import NodeUnreachable
from shared.model import NodeState, ObservedPower, VmStatus
from shared.protocol import Query, QueryKind
from tests.unit.api_world import World
from tests.unit.core_world import USER, CoreWorld, spec

ADMIN = Principal("admin", frozenset(Permission), Scope())
LOGS = {"a": b"boot\none two ", "b": b"three ", "c": b"four five"}
WHOLE = b"".join(LOGS.values())


class Parts:
    """A VM that has been on a and b, and is on c now; ``silent`` nodes do not answer."""

    def __init__(self) -> None:
        self.world = World()
        self.node_ids = {name: self.world.join(name) for name in LOGS}
        self.silent: set[str] = set()
        command = CreateVm(name="web-1", tenant="default", labels={}, spec=spec(), by=USER)
        self.vm_id = self.world.state.operations[self.world.apply(command)].record.target
        self.world.run(self.vm_id, self.node_ids["c"])
        stored = self.world.state.vms[self.vm_id]
        status = replace(stored.record.status, logs_on=(self.node_ids["a"], self.node_ids["b"]))
        self.world.state.put(replace(stored.record, status=status), stored.revision)

    async def ask(self, node_id: str, query: Query) -> bytes:
        name = next(each for each, known in self.node_ids.items() if known == node_id)
        if name in self.silent:
            raise NodeUnreachable(name)
        log = LOGS[name]
        if query.kind is QueryKind.CONSOLE_SIZE:
            return str(len(log)).encode()
        assert query.kind is QueryKind.CONSOLE_LOG
        return log[query.offset : query.offset + query.limit_bytes]

    async def read(self, offset: int, limit: int = 1000) -> bytes:
        context = replace(self.world.context, ask=self.ask)
        query = ConsoleQuery(offset=offset, limit=limit)
        return await console_log(context, ADMIN, self.vm_id, query)


@pytest.mark.parametrize("offset", [*range(len(WHOLE) + 2), *range(-len(WHOLE) - 2, 0)])
@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_any_part_of_it_is_a_part_of_the_whole(offset: int, limit: int) -> None:
    start = max(0, len(WHOLE) + offset) if offset < 0 else offset

    assert await Parts().read(offset, limit) == WHOLE[start : start + limit]


async def test_a_part_that_cannot_be_read_hides_no_other() -> None:
    parts = Parts()
    parts.silent = {"a"}
    assert await parts.read(0) == LOGS["b"] + LOGS["c"]
    parts.silent = {"c"}
    with pytest.raises(NodeUnreachable):
        await parts.read(0)


def test_a_node_is_remembered_once_and_not_while_the_vm_is_there() -> None:
    status = VmStatus()
    for left, new in (("a", "b"), ("b", "a"), ("a", "c")):
        status = with_log_on(status, left, new)
    assert status.logs_on == ("b", "a")
    for number in range(LOGS_MAX + 3):
        status = with_log_on(status, f"n{number}", None)
    assert len(status.logs_on) == LOGS_MAX


@pytest.mark.parametrize("state", [NodeState.READY, NodeState.SILENT])
def test_a_deleted_vm_waits_for_the_logs_of_nodes_that_can_be_asked(state: NodeState) -> None:
    world = CoreWorld()
    other = world.join("n2")
    vm_id = world.running()
    stored = world.state.vms[vm_id]
    status = replace(stored.record.status, logs_on=(other,))
    world.state.put(replace(stored.record, status=status), stored.revision)
    world.apply(SetNodeState(node_id=other, state=state, by=USER))
    world.apply(DeleteVm(vm_id=vm_id, by=USER))

    world.report(vm_id, ObservedPower.ABSENT, permit_used=True, removed=True)

    if state is NodeState.SILENT:
        assert vm_id not in world.state.vms, "a log is nothing to wait for"
        return
    assert [left.node for left in world.vm(vm_id).status.leftovers] == [other]
    generation = world.vm(vm_id).status.generation
    world.apply(HearOfLeftover(vm_id=vm_id, node_id=other, generation=generation, gone=True))
    assert vm_id not in world.state.vms
