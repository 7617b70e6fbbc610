"""The serial console log of a VM: one text, whatever nodes it has run on.

Each node writes a log of its own, which begins when the guest starts or arrives there; the parts
are joined in the order of the VM's stays. A part whose node cannot be asked is left out, except the
present one's.
"""

from __future__ import annotations

from controlplane.services.context import Context, Permission, Principal
from controlplane.services.requests import ConsoleQuery
from controlplane.services.scope import authorize, find_vm
from shared.errors import NovacronError, StateConflict
from shared.model import Vm
from shared.protocol import Query, QueryKind


async def console_log(
    context: Context, principal: Principal, reference: str, query: ConsoleQuery
) -> bytes:
    """Return a part of the VM's serial console log.

    Raises Forbidden, NotFound, StateConflict (never placed), NodeUnreachable.
    """
    authorize(principal, Permission.VMS_READ)
    vm = find_vm(context, principal, reference).record
    if vm.status.node is None:
        raise StateConflict(f"{vm.name!r} has no console log: it is on no node")
    reader = _Reader(context, principal, vm)
    if not vm.status.logs_on:
        return await reader.part(vm.status.node, query.offset, query.limit)
    return await _joined(reader, vm.status.node, vm.status.logs_on, query)


class _Reader:
    """Asks nodes for parts of one VM's log, within one request."""

    def __init__(self, context: Context, principal: Principal, vm: Vm) -> None:
        self._context = context
        self._principal = principal
        self._vm = vm

    async def part(self, node_id: str, offset: int, limit: int) -> bytes:
        return await self._ask(node_id, QueryKind.CONSOLE_LOG, offset, limit)

    async def size(self, node_id: str) -> int:
        return int(await self._ask(node_id, QueryKind.CONSOLE_SIZE, 0, 0))

    async def _ask(self, node_id: str, kind: QueryKind, offset: int, limit: int) -> bytes:
        question = Query(
            id=f"{self._principal.request_id}-{kind.value}",
            kind=kind,
            vm_id=self._vm.id,
            domain_name=self._vm.domain_name,
            offset=offset,
            limit_bytes=limit,
        )
        return await self._context.ask(node_id, question)


async def _joined(
    reader: _Reader, present: str, earlier: tuple[str, ...], query: ConsoleQuery
) -> bytes:
    sizes: list[tuple[str, int]] = []
    for node_id in earlier:
        try:
            sizes.append((node_id, await reader.size(node_id)))
        except NovacronError:
            continue  # what cannot be read now is not worth hiding the rest for
    sizes.append((present, await reader.size(present)))
    total = sum(size for _, size in sizes)
    start = max(0, total + query.offset) if query.offset < 0 else query.offset
    parts: list[bytes] = []
    left = query.limit
    for node_id, size in sizes:
        if start < size and left > 0:
            part = await reader.part(node_id, start, min(left, size - start))
            parts.append(part)
            left -= len(part)
        start = max(0, start - size)
    return b"".join(parts)
