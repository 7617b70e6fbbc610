"""The questions that nodes are asked before a VM comes or goes: every reason against it, at once.

Only reads; asked by a saga right before it claims or lets go, and by whoever wants to know
beforehand.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from controlplane.scheduler.moves import copied_disks
from shared.codec import pack, unpack
from shared.errors import FieldError
from shared.model import Node, Vm
from shared.protocol import (
    DestinationCheck,
    DestinationQuestion,
    Query,
    QueryKind,
    SourceCheck,
)

Ask = Callable[[str, Query], Awaitable[bytes]]

AT_REST = SourceCheck()


async def blockers_of(
    ask: Ask, query_id: str, vm: Vm, source: Node, destination: Node
) -> tuple[FieldError, ...]:
    """Return everything that the two nodes hold against a migration. Raises NodeUnreachable."""
    told = unpack(
        await ask(source.id, _query(query_id, vm, QueryKind.MIGRATION_SOURCE)), SourceCheck
    )
    copied = copied_disks(vm, source, destination)
    return (
        *_located(source.name, told.blockers),
        *await arrival_blockers(ask, query_id, vm, destination, copied, told),
    )


async def arrival_blockers(
    ask: Ask,
    query_id: str,
    vm: Vm,
    destination: Node,
    copied: tuple[str, ...] = (),
    guest: SourceCheck = AT_REST,
) -> tuple[FieldError, ...]:
    """Return what a node holds against a VM's coming: its disks that are not copied are not there.

    ``guest`` is what is known of one that runs. Raises NodeUnreachable, Overloaded.
    """
    question = DestinationQuestion(
        vm_id=vm.id,
        domain_uuid=vm.domain_uuid,
        spec=vm.spec,
        copied=copied,
        machine=guest.machine,
        cpu_xml=guest.cpu_xml,
    )
    query = _query(query_id, vm, QueryKind.MIGRATION_DESTINATION, pack(question))
    answer = unpack(await ask(destination.id, query), DestinationCheck)
    return tuple(_located(destination.name, answer.blockers))


def _query(query_id: str, vm: Vm, kind: QueryKind, payload: bytes = b"") -> Query:
    return Query(
        id=f"{query_id}-{kind.value}",
        kind=kind,
        vm_id=vm.id,
        domain_name=vm.domain_name,
        payload=payload,
    )


def _located(node_name: str, blockers: tuple[FieldError, ...]) -> list[FieldError]:
    return [FieldError(f"/nodes/{node_name}", b.code, b.message) for b in blockers]
