"""The questions that both nodes are asked before a migration: every reason against it, at once.

Only reads; asked by the saga right before it claims, and by whoever wants to know beforehand.
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


async def blockers_of(
    ask: Ask, query_id: str, vm: Vm, source: Node, destination: Node
) -> tuple[FieldError, ...]:
    """Return everything that the two nodes hold against a migration. Raises NodeUnreachable."""

    def query(kind: QueryKind, payload: bytes = b"") -> Query:
        return Query(
            id=f"{query_id}-{kind.value}",
            kind=kind,
            vm_id=vm.id,
            domain_name=vm.domain_name,
            payload=payload,
        )

    told = unpack(await ask(source.id, query(QueryKind.MIGRATION_SOURCE)), SourceCheck)
    question = DestinationQuestion(
        vm_id=vm.id,
        domain_uuid=vm.domain_uuid,
        spec=vm.spec,
        copied=copied_disks(vm, source, destination),
        machine=told.machine,
        cpu_xml=told.cpu_xml,
    )
    answer = await ask(destination.id, query(QueryKind.MIGRATION_DESTINATION, pack(question)))
    return (
        *_located(source.name, told.blockers),
        *_located(destination.name, unpack(answer, DestinationCheck).blockers),
    )


def _located(node_name: str, blockers: tuple[FieldError, ...]) -> list[FieldError]:
    return [FieldError(f"/nodes/{node_name}", b.code, b.message) for b in blockers]
