"""One connected agent, as the leader keeps it: what it was told and asked, and what it said.

Everything that waits here is bounded by the number of the node's VMs.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from shared.channel import Channel
from shared.errors import NodeUnreachable
from shared.protocol import (
    TOGETHER_MAX,
    AgentMessage,
    Answer,
    Desired,
    Hello,
    InventoryReport,
    LeaderMessage,
    MigrationReport,
    VmReport,
)

AgentChannel = Channel[LeaderMessage, AgentMessage]
# Reports on several VMs, or what the node has.
Said = tuple[VmReport, ...] | InventoryReport


class AgentSession:
    """``heard_s`` is on the loop's clock; ``greeted`` once the node has accepted the term.

    ``serial`` is of the certificate that the agent has shown.
    """

    def __init__(
        self, node_id: str, hello: Hello, channel: AgentChannel, now_s: float, serial: str = ""
    ) -> None:
        self.node_id = node_id
        self.serial = serial
        self.node_name = hello.node_name
        self.boot_id = hello.boot_id
        self.agent_version = hello.agent_version
        # How many VMs one message to it may tell of.
        self.together_max = TOGETHER_MAX if hello.together else 1
        self.channel = channel
        self.heard_s = now_s
        self.greeted = False
        self.sent: dict[str, Desired] = {}
        self.dirty: dict[str, None] = {}
        self.wake = asyncio.Event()
        self.queries: dict[str, asyncio.Future[bytes]] = {}
        self.displaced = asyncio.Event()
        self.migrations: dict[str, MigrationReport] = {}
        self._reports: dict[str, VmReport] = {}
        self._inventory: InventoryReport | None = None
        self._said = asyncio.Event()

    def mark(self, vm_id: str) -> None:
        """Note that a VM of the node has changed and may have to be pushed."""
        self.dirty[vm_id] = None
        self.wake.set()

    def say(self, message: VmReport | InventoryReport) -> None:
        """Keep what the agent said until it is taken; the newest about each VM counts."""
        if isinstance(message, InventoryReport):
            self._inventory = message
        else:
            self._reports.pop(message.vm_id, None)
            self._reports[message.vm_id] = message
        self._said.set()

    def say_again(self, said: Said) -> None:
        """Put back what could not be taken, unless the agent has said something newer of it."""
        if isinstance(said, InventoryReport):
            self._inventory = self._inventory or said
        else:
            for report in said:
                self._reports.setdefault(report.vm_id, report)
        self._said.set()

    async def next_said(self) -> Said:
        """Return what the agent said and nobody has taken yet, oldest first."""
        while not self._reports and self._inventory is None:
            self._said.clear()
            await self._said.wait()
        if self._reports:
            vm_ids = list(islice(self._reports, TOGETHER_MAX))
            return tuple(self._reports.pop(vm_id) for vm_id in vm_ids)
        said, self._inventory = self._inventory, None
        assert said is not None, "one of the two was there"
        return said

    def settle_query(self, answer: Answer) -> None:
        waiting = self.queries.get(answer.query_id)
        if waiting is None or waiting.done():
            return
        if answer.problem is None:
            waiting.set_result(answer.data)
        else:
            waiting.set_exception(NodeUnreachable(f"{self.node_name}: {answer.problem.detail}"))

    def fail_queries(self) -> None:
        for query in self.queries.values():
            if not query.done():
                query.set_exception(NodeUnreachable(f"{self.node_name} disconnected"))
