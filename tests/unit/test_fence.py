"""What the agent never forgets: refusals, and that everything is on disk before it counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from agent.append_log import FileLog, MemoryLog
from agent.fence import REWRITE_RECORDS_MIN, Departure, Fence
from shared.errors import RecordUnreadable, StaleRevision, StaleTerm
from shared.model import Term
from shared.offload import inline

T = TypeVar("T")
VM = "vm-1"


class BrokenDisk(MemoryLog):
    """A disk that stops taking writes when told so."""

    broken = False

    def append(self, record: bytes) -> None:
        if self.broken:
            raise OSError("no space left on device")
        super().append(record)


class SlowThread:
    """Work is done in order; whoever asked is told some turns of the loop later."""

    def __init__(self) -> None:
        self._rng = random.Random(1)

    async def __call__(self, work: Callable[[], T]) -> T:
        result = work()
        for _ in range(self._rng.randrange(8)):
            await asyncio.sleep(0)
        return result


def restarted(log: MemoryLog) -> Fence:
    return Fence(log, inline)


async def test_a_lower_term_is_refused_also_after_a_restart() -> None:
    log = MemoryLog()
    fence = restarted(log)
    await fence.accept_term(Term(1, 9))
    await fence.accept_term(Term(1, 9))

    for known in (fence, restarted(log)):
        with pytest.raises(StaleTerm):
            await known.accept_term(Term(1, 8))
        with pytest.raises(StaleTerm):
            known.check(Term(1, 8), VM, 10**9)
        known.check(Term(2, 1), VM, 0)
    assert len(log.read()) == 1


async def test_a_lower_revision_of_the_same_vm_is_refused_also_after_a_restart() -> None:
    log = MemoryLog()
    fence = restarted(log)
    term = Term(1, 1)
    await fence.accept_revision(term, VM, 10)
    await fence.accept_revision(term, VM, 10)

    for known in (fence, restarted(log)):
        with pytest.raises(StaleRevision):
            await known.accept_revision(term, VM, 9)
        await known.accept_revision(term, "vm-other", 1)


async def test_revisions_begin_anew_with_an_epoch_and_never_go_back_to_an_older_one() -> None:
    log = MemoryLog()
    fence = restarted(log)
    await fence.accept_revision(Term(1, 50), VM, 1000)
    await fence.accept_term(Term(7, 3))
    await fence.accept_revision(Term(7, 3), VM, 12)

    for known in (fence, restarted(log)):
        assert (known.facts(VM).epoch, known.facts(VM).revision) == (7, 12)
        with pytest.raises(StaleRevision):
            known.check(Term(7, 3), VM, 11)
        with pytest.raises(StaleTerm):
            known.check(Term(1, 51), VM, 1001)
        known.check(Term(8, 1), VM, 1)


def old_facts(revision: int) -> bytes:
    """Return what an agent wrote that knew of no epochs."""
    return msgspec.msgpack.encode({"type": "vm", "vm_id": VM, "revision": revision})


async def test_a_revision_without_an_epoch_is_of_the_term_that_it_was_accepted_under() -> None:
    log = MemoryLog()
    fence = restarted(log)
    await fence.accept_term(Term(3, 9))
    log.append(old_facts(1000))
    await restarted(log).accept_term(Term(4, 2))

    known = restarted(log)
    assert known.facts(VM).epoch == 3
    known.check(Term(4, 2), VM, 1)
    log.rewrite([log.read()[0], log.read()[1]])
    with pytest.raises(StaleRevision):
        restarted(log).check(Term(3, 9), VM, 999)


async def test_an_agent_that_knows_no_epochs_reads_what_is_written() -> None:
    log = MemoryLog()
    await restarted(log).accept_revision(Term(5, 1), VM, 20)
    (written,) = log.read()
    assert msgspec.msgpack.decode(written)["revision"] == 20


async def test_used_generations_and_answers_only_grow() -> None:
    log = MemoryLog()
    fence = restarted(log)
    await fence.use_generation(VM, 3)
    await fence.use_generation(VM, 2)
    await fence.answer_request(VM, 5)
    await fence.answer_request(VM, 4)
    await fence.accept_revision(Term(1, 1), VM, 7)

    for known in (fence, restarted(log)):
        facts = known.facts(VM)
        assert (facts.used_generation, facts.answered_request, facts.revision) == (3, 5, 7)


def leaving(generation: int) -> Departure:
    return Departure(generation=generation, source_generation=1, domain_name=VM)


async def test_a_departure_is_on_disk_when_it_is_known_and_stays_until_it_is_over() -> None:
    log = MemoryLog()
    fence = restarted(log)
    await fence.use_generation(VM, 1)
    await fence.depart(VM, leaving(2))
    await fence.depart("vm-other", leaving(7))

    for known in (fence, restarted(log)):
        assert known.departures() == {VM: leaving(2), "vm-other": leaving(7)}
        assert known.facts(VM).used_generation == 1
    await fence.end_departure(VM)
    await fence.end_departure(VM)
    for known in (fence, restarted(log)):
        assert known.departures() == {"vm-other": leaving(7)}
        assert known.facts(VM).used_generation == 1


async def test_of_two_departures_the_newer_one_counts() -> None:
    log = MemoryLog()
    fence = restarted(log)
    for generation in (2, 4, 3, 4):
        await fence.depart(VM, leaving(generation))
    assert fence.departures() == restarted(log).departures() == {VM: leaving(4)}
    assert len(log.read()) == 2


async def test_a_departure_that_could_not_be_written_has_not_begun() -> None:
    log = BrokenDisk()
    fence = restarted(log)
    log.broken = True
    with pytest.raises(OSError, match="no space"):
        await fence.depart(VM, leaving(2))
    assert fence.departures() == {}
    log.broken = False
    await fence.depart(VM, leaving(2))
    log.broken = True
    with pytest.raises(OSError, match="no space"):
        await fence.end_departure(VM)
    assert fence.departures() == restarted(log).departures() == {VM: leaving(2)}


async def test_a_departure_outlives_a_rewrite_and_not_its_vm() -> None:
    log = WatchedLog()
    fence = restarted(log)
    await fence.depart(VM, leaving(2))
    for revision in range(2 * REWRITE_RECORDS_MIN):
        await fence.accept_revision(Term(1, 1), "vm-other", revision)
    assert log.rewrites > 0
    assert restarted(log).departures() == {VM: leaving(2)}
    await fence.forget(VM)
    assert fence.departures() == restarted(log).departures() == {}


async def test_a_file_cut_anywhere_knows_a_departure_wholly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "fence"
    log = FileLog(path)
    fence = Fence(log, inline)
    await fence.use_generation(VM, 1)
    before = path.stat().st_size
    await fence.depart(VM, leaving(2))
    log.close()
    whole = path.read_bytes()
    for length in range(before, len(whole) + 1):
        path.write_bytes(whole[:length])
        survivor = FileLog(path)
        known = Fence(survivor, inline)
        assert known.facts(VM).used_generation == 1
        expected = {VM: leaving(2)} if length == len(whole) else {}
        assert known.departures() == expected
        survivor.close()


def test_a_record_of_an_agent_that_knew_no_departures_is_read() -> None:
    log = MemoryLog()
    log.append(msgspec.msgpack.encode({"type": "vm", "vm_id": VM, "used_generation": 3}))
    facts = restarted(log).facts(VM)
    assert (facts.used_generation, facts.departure) == (3, None)


async def test_a_forgotten_vm_is_as_if_it_had_never_been() -> None:
    log = MemoryLog()
    fence = restarted(log)
    await fence.use_generation(VM, 3)
    await fence.forget(VM)
    await fence.forget("vm-unknown")

    for known in (fence, restarted(log)):
        assert known.facts(VM).used_generation == 0


async def test_what_could_not_be_written_does_not_count() -> None:
    log = BrokenDisk()
    fence = restarted(log)
    log.broken = True

    with pytest.raises(OSError, match="no space"):
        await fence.use_generation(VM, 1)
    with pytest.raises(OSError, match="no space"):
        await fence.accept_term(Term(1, 1))

    assert fence.facts(VM).used_generation == 0
    assert fence.term == Term(0, 0)
    log.broken = False
    await fence.use_generation(VM, 1)
    assert restarted(log).facts(VM).used_generation == 1


async def test_the_log_stays_short_and_says_the_same() -> None:
    log = MemoryLog()
    fence = restarted(log)
    for revision in range(10 * REWRITE_RECORDS_MIN):
        await fence.accept_revision(Term(1, 1), VM, revision)
        assert len(log.read()) <= REWRITE_RECORDS_MIN + 1

    assert restarted(log).facts(VM) == fence.facts(VM)


class WatchedLog(MemoryLog):
    rewrites = 0

    def rewrite(self, records: Sequence[bytes]) -> None:
        self.rewrites += 1
        super().rewrite(records)


async def test_a_rewrite_loses_nothing_that_others_write_meanwhile() -> None:
    """A lost "used" would let the same generation be started twice after a restart."""
    log = WatchedLog()
    fence = Fence(log, SlowThread())
    vms = [f"vm-{number}" for number in range(5)]

    async def work(vm_id: str) -> None:
        for generation in range(1, 200):
            await fence.use_generation(vm_id, generation)
            assert restarted(log).facts(vm_id).used_generation == generation

    await asyncio.gather(*(work(vm_id) for vm_id in vms))

    assert log.rewrites > 1


def test_a_log_that_does_not_decode_is_not_half_believed() -> None:
    log = MemoryLog()
    log.append(b"\xc1")

    with pytest.raises(RecordUnreadable):
        restarted(log)
