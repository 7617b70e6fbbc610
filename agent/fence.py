"""What the agent must never forget: the highest term, and per VM what it was told and has used.

Everything here is durable before it is acted upon. Lower terms and revisions are refused; a
generation is started at most once, whatever crashes in between. Revisions begin anew with each
epoch, after a restore of etcd: they are compared together with theirs.
"""

from __future__ import annotations

import asyncio

from msgspec import Struct
from msgspec.structs import replace

from agent.append_log import AppendLog
from shared.codec import pack, unpack
from shared.errors import StaleRevision, StaleTerm
from shared.model import Term
from shared.offload import Offload

# A rewrite when the file says everything about four times over keeps it short and rare.
REWRITE_FACTOR = 4
REWRITE_RECORDS_MIN = 256


class TermSeen(Struct, frozen=True, tag="term"):
    term: Term


class Departure(Struct, frozen=True, kw_only=True):
    """A migration that this node has begun as its source, under a claim's generation.

    It is begun once. Until the claim is over, a guest that runs here again without our doing has to
    be held: it may run on its new node, too.
    """

    generation: int
    source_generation: int
    domain_name: str


class VmFacts(Struct, frozen=True, kw_only=True, tag="vm"):
    """Per VM: the highest revision told, the highest generation used up, the last request answered.

    A generation is used up when a start under it was begun, or when it was revoked. ``arrival`` is
    the last one for which disks were made here: what was here before is not that claim's to delete.
    ``epoch`` is the revision's; 0 in files of agents that did not write it (see ``Fence._take``).
    """

    vm_id: str
    epoch: int = 0
    revision: int = 0
    used_generation: int = 0
    answered_request: int = 0
    departure: Departure | None = None
    arrival: int = 0


class VmForgotten(Struct, frozen=True, tag="forgotten"):
    """Nothing of the VM is left here. Its id never comes back."""

    vm_id: str


FenceRecord = TermSeen | VmFacts | VmForgotten


class Fence:
    def __init__(self, log: AppendLog, offload: Offload) -> None:
        """Read the log; raises RecordUnreadable rather than act on half of what was known."""
        self._log = log
        self._offload = offload
        self._vms: dict[str, VmFacts] = {}
        self._records = 0
        self._writing = asyncio.Lock()
        self.term = Term(0, 0)
        for data in log.read():
            self._take(unpack(data, FenceRecord))  # type: ignore[arg-type]

    def facts(self, vm_id: str) -> VmFacts:
        return self._vms.get(vm_id) or VmFacts(vm_id=vm_id)

    async def accept_term(self, term: Term) -> None:
        """Persist a term. Raises StaleTerm for one below the highest seen."""
        self.check_term(term)
        if term > self.term:
            await self._write(TermSeen(term))

    async def accept_revision(self, term: Term, vm_id: str, revision: int) -> None:
        """Persist a VM's revision before it is acted on. Raises StaleTerm, StaleRevision."""
        self.check(term, vm_id, revision)
        facts = self.facts(vm_id)
        if (term.epoch, revision) > (facts.epoch, facts.revision):
            await self._write(replace(facts, epoch=term.epoch, revision=revision))

    async def use_generation(self, vm_id: str, generation: int) -> None:
        """Persist that a generation will never be started from now on (again)."""
        facts = self.facts(vm_id)
        if generation > facts.used_generation:
            await self._write(replace(facts, used_generation=generation))

    async def expect_arrival(self, vm_id: str, generation: int) -> None:
        """Persist that a generation comes here running, and that its disks are about to be made."""
        facts = self.facts(vm_id)
        if generation > facts.arrival:
            used = max(generation, facts.used_generation)
            await self._write(replace(facts, used_generation=used, arrival=generation))

    async def answer_request(self, vm_id: str, number: int) -> None:
        facts = self.facts(vm_id)
        if number > facts.answered_request:
            await self._write(replace(facts, answered_request=number))

    def departures(self) -> dict[str, Departure]:
        """Return the migrations that were begun from here and are not known to be over, by VM."""
        return {
            vm_id: facts.departure
            for vm_id, facts in self._vms.items()
            if facts.departure is not None
        }

    async def depart(self, vm_id: str, departure: Departure) -> None:
        """Persist that a migration is begun, or given up: from now on it never is (again)."""
        facts = self.facts(vm_id)
        if facts.departure is None or facts.departure.generation < departure.generation:
            await self._write(replace(facts, departure=departure))

    async def end_departure(self, vm_id: str) -> None:
        facts = self.facts(vm_id)
        if facts.departure is not None:
            await self._write(replace(facts, departure=None))

    async def forget(self, vm_id: str) -> None:
        if vm_id in self._vms:
            await self._write(VmForgotten(vm_id))

    def check_term(self, term: Term) -> None:
        if term < self.term:
            raise StaleTerm(f"term {term} is below {self.term}, which this node has accepted")

    def check(self, term: Term, vm_id: str, revision: int) -> None:
        """Raise StaleTerm or StaleRevision unless this is at least what was last accepted."""
        self.check_term(term)
        known = self.facts(vm_id)
        if (term.epoch, revision) < (known.epoch, known.revision):
            raise StaleRevision(
                f"revision {term.epoch}.{revision} of {vm_id} is below "
                f"{known.epoch}.{known.revision}"
            )

    async def _write(self, record: FenceRecord) -> None:
        # One at a time: a rewrite must not lose what was appended but is not in memory yet.
        async with self._writing:
            await self._offload(lambda: self._log.append(pack(record)))
            self._take(record)
            if self._records > max(REWRITE_RECORDS_MIN, REWRITE_FACTOR * len(self._vms)):
                kept: list[FenceRecord] = [TermSeen(self.term), *self._vms.values()]
                await self._offload(lambda: self._log.rewrite([pack(entry) for entry in kept]))
                self._records = len(kept)

    def _take(self, record: FenceRecord) -> None:
        self._records += 1
        if isinstance(record, TermSeen):
            self.term = max(self.term, record.term)
        elif isinstance(record, VmForgotten):
            self._vms.pop(record.vm_id, None)
        elif record.epoch == 0 and record.revision:
            # Of an agent that wrote no epoch: it accepted the revision under the term before it.
            self._vms[record.vm_id] = replace(record, epoch=self.term.epoch)
        else:
            self._vms[record.vm_id] = record
