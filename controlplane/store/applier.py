"""The leader's one writer.

Commands wait here, are decided one after the other on a draft over the leader's memory, and go to
etcd as one transaction per group, which compares the leader key and the applier's mark. The memory
advances only by what was committed. A group whose outcome is unknown is sent again, unchanged:
the mark makes the second attempt either commit it or prove that the first one did.

Nobody is told what does not hold yet. A refusal may rest on a change of the same group, so it is
told when that is committed; and what needs no write is told only while the lease is young, since
another may lead by now who has written more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from controlplane.commands.draft import Command, Draft, SealedDraft
from controlplane.state import ClusterState
from controlplane.store import keys
from controlplane.store.port import (
    Committed,
    Delete,
    Fence,
    KeyValue,
    NotCommitted,
    Put,
    Store,
    Write,
)
from shared.clock import Clock
from shared.codec import pack, unpack
from shared.errors import (
    ChangeTooLarge,
    LeadershipLost,
    NovacronError,
    OutcomeUnknown,
    Overloaded,
    RecordUnreadable,
    StoreUnavailable,
)
from shared.ids import IdSource
from shared.model import Applied, HistoryEntry, Record, Term

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# etcd's default --max-txn-ops is 128; one write is the mark.
GROUP_WRITES_MAX = 127
# At 25 commands a group and 3 ms a commit this is half a second of work; more is refused at once.
WAITING_COMMANDS_MAX = 4096
# A term that ends by intent lets the group under way come to its end for so long: a commit takes
# milliseconds, and the next leader waits.
FINISH_S = 0.5
# Sending a group of unknown outcome again is cheap and safe; how often is bounded by the term.
RETRY_DELAY_S = 0.1


class TermOver(LeadershipLost):
    """The fence did not hold. ``ambiguous``: the group may have been committed before that."""

    def __init__(self, message: str, *, ambiguous: bool) -> None:
        super().__init__(message)
        self.ambiguous = ambiguous


class _Waiting(Struct, eq=False):
    """One caller's change; equal to no other, so that thousands are searched without comparing."""

    command: Command[Any]
    result: asyncio.Future[Any]


class _Refused(Struct, frozen=True):
    """What was decided of a command that changes nothing, because it was refused."""

    error: Exception


class Applier:
    """Serves one term: made when it begins, closed for good when it is lost.

    ``until_writable`` is awaited before each commit: it holds writes back while the lease is old.
    ``group_writes_max`` bounds a transaction.
    """

    def __init__(
        self,
        store: Store,
        state: ClusterState,
        term: Term,
        mark: KeyValue | None,
        ids: IdSource,
        clock: Clock,
        until_writable: Callable[[], Awaitable[None]],
        group_writes_max: int = GROUP_WRITES_MAX,
    ) -> None:
        self._store = store
        self._state = state
        self._term = term
        self._mark_revision = 0 if mark is None else mark.mod_revision
        self._seq = 0 if mark is None else unpack(mark.value, Applied).seq
        self._ids = ids
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._until_writable = until_writable
        self._group_writes_max = group_writes_max
        self._lost: LeadershipLost | None = None
        # Set once a command is committed that asks for the end of the term.
        self.given_up = asyncio.Event()
        # So many of those that wait are written one by one: together they could not be.
        self._apart = 0

    @property
    def term(self) -> Term:
        return self._term

    async def submit(self, command: Command[Result], limit_s: float | None = None) -> Result:
        """Return what the command decided, once it is committed.

        Raises the command's refusal, Overloaded, LeadershipLost, StoreUnavailable (nothing
        happened), OutcomeUnknown (it may have happened); one of the last two after ``limit_s``.
        """
        if self._lost is not None:
            raise self._lost
        if len(self._waiting) >= WAITING_COMMANDS_MAX:
            raise Overloaded(f"{WAITING_COMMANDS_MAX} changes are waiting to be written")
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(command, result)
        self._waiting.append(waiting)
        self._wake.set()
        try:
            async with asyncio.timeout(limit_s):
                return await result
        except TimeoutError:
            raise self._given_up(waiting) from None

    def close(self, reason: LeadershipLost) -> None:
        """Refuse what waits and whatever comes; the term is over."""
        self._lost = reason
        for waiting in self._waiting:
            _refuse(waiting, reason)
        self._waiting.clear()

    async def run(self) -> None:
        """Commit groups until leadership is lost; raises LeadershipLost."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    await self._commit_group()
        except LeadershipLost as lost:
            self.close(lost)
            raise

    def _given_up(self, waiting: _Waiting) -> NovacronError:
        """Take back what still waits; say what may have become of a change that took too long."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            return StoreUnavailable("etcd does not answer; nothing was changed")
        return OutcomeUnknown("etcd does not answer; the change is being written or never will be")

    async def _commit_group(self) -> None:
        draft = Draft(self._state, self._ids, self._clock.now(), self._term)
        fit = self._group_writes_max
        group: list[tuple[_Waiting, Any]] = []
        while self._waiting and not (group and self._apart):
            savepoint = draft.savepoint()
            waiting = self._waiting[0]
            try:
                decided = waiting.command.decide(draft)
                if draft.size() > fit and not group:
                    raise ChangeTooLarge(f"the change is {draft.size()} writes; {fit} fit")
            except Exception as error:
                draft.rollback(savepoint)
                decided = _Refused(_refusal(error))
            if draft.size() > fit:
                draft.rollback(savepoint)
                break
            self._waiting.popleft()
            group.append((waiting, decided))
        self._apart = max(0, self._apart - len(group))
        if group:
            await self._write(draft.sealed(self._seq), group)

    async def _write(self, sealed: SealedDraft, group: list[tuple[_Waiting, Any]]) -> None:
        if not sealed:
            await self._tell_unwritten(group)
            return
        try:
            writes = _writes(sealed)
        except Exception as error:
            self._refuse_or_part(group, _refusal(error))
            return
        committing = asyncio.create_task(self._commit(writes, sealed))
        try:
            await asyncio.wait({committing})
        finally:
            await _finish(committing)
            self._conclude(committing, sealed, group)

    def _conclude(
        self,
        committing: asyncio.Task[int],
        sealed: SealedDraft,
        group: list[tuple[_Waiting, Any]],
    ) -> None:
        """Take what was committed, and tell who waits. Raises TermOver."""
        try:
            revision = committing.result()
        except asyncio.CancelledError:
            _refuse_all(group, OutcomeUnknown("the replica stopped while the change was written"))
            raise
        except TermOver as over:
            unknown = OutcomeUnknown(f"{over}; the change may have been written before that")
            _refuse_all(group, unknown if over.ambiguous else over)
            raise
        except ChangeTooLarge as error:
            self._refuse_or_part(group, error)
            return
        except NovacronError as error:
            _refuse_all(group, error)
            return
        self._take(sealed, revision)
        _resolve(group)
        if sealed.gives_up_term:
            self.given_up.set()

    async def _tell_unwritten(self, group: list[tuple[_Waiting, Any]]) -> None:
        """Tell what was decided on memory alone, once that is proven to be the newest."""
        try:
            await self._until_writable()
        except asyncio.CancelledError:
            _refuse_all(group, LeadershipLost("the term ended; nothing was changed"))
            raise
        _resolve(group)

    def _refuse_or_part(self, group: list[tuple[_Waiting, Any]], error: Exception) -> None:
        """Refuse a change that cannot be written; of several, find out which by trying each."""
        if len(group) == 1:
            _refuse_all(group, error)
            return
        self._waiting.extendleft(waiting for waiting, _ in reversed(group))
        self._apart += len(group)

    async def _commit(self, changes: list[Write], sealed: SealedDraft) -> int:
        """Return the revision at which the group was committed, by this attempt or an earlier one.

        Raises TermOver, StoreFull, StoreUnavailable, ChangeTooLarge (certainly not committed).
        """
        group_id = self._ids.new("group")
        seq = sealed.history[-1].seq if sealed.history else self._seq
        mark = Put(keys.MARK, pack(Applied(group=group_id, seq=seq)))
        writes = (*changes, mark)
        fence = Fence(self._term.revision, self._mark_revision)
        sent_before = False
        while True:
            await self._until_writable()
            try:
                outcome = await self._store.commit(fence, writes)
            except NovacronError as error:
                # Once sent, no later refusal says what became of the first attempt.
                if not sent_before and not isinstance(error, OutcomeUnknown):
                    raise
                sent_before = True
                log.warning("the outcome of a commit is unknown: sending it again", exc_info=error)
                await asyncio.sleep(RETRY_DELAY_S)
                continue
            if isinstance(outcome, Committed):
                self._mark_revision, self._seq = outcome.revision, seq
                return outcome.revision
            return self._read_back(outcome, group_id, seq, ambiguous=sent_before)

    def _read_back(self, outcome: NotCommitted, group_id: str, seq: int, *, ambiguous: bool) -> int:
        mark = outcome.mark
        if mark is not None and _group_of(mark) == group_id:
            self._mark_revision, self._seq = mark.mod_revision, seq
            return mark.mod_revision
        raise TermOver(
            f"term {self._term} is over: the leader key or the applier's mark is another's",
            ambiguous=ambiguous,
        )

    def _take(self, sealed: SealedDraft, revision: int) -> None:
        take_writes(self._state, sealed.changes, sealed.history, sealed.trimmed, revision)


def take_writes(
    state: ClusterState,
    changes: Sequence[tuple[type[Record], str, Record | None]],
    history: Sequence[HistoryEntry],
    trimmed: Sequence[int],
    revision: int,
) -> None:
    """Advance a state by committed writes."""
    for kind, record_id, record in changes:
        if record is None:
            state.remove(kind, record_id)
        else:
            state.put(record, revision)
    for entry in history:
        state.put_history(entry)
    for seq in trimmed:
        state.remove_history(seq)
    state.advanced(revision)


def _writes(sealed: SealedDraft) -> list[Write]:
    writes: list[Write] = []
    for kind, record_id, record in sealed.changes:
        key = keys.key_of(kind, record_id)
        writes.append(Delete(key) if record is None else Put(key, pack(record)))
    writes += [Put(keys.history_key(entry.seq), pack(entry)) for entry in sealed.history]
    writes += [Delete(keys.history_key(seq)) for seq in sealed.trimmed]
    return writes


def _group_of(mark: KeyValue) -> str:
    """Return which group wrote a mark; a mark that does not decode is nobody's of ours."""
    try:
        return unpack(mark.value, Applied).group
    except RecordUnreadable:
        return ""


async def _finish(committing: asyncio.Task[int]) -> None:
    """Return once a commit has ended; soon after a stop it is cancelled."""
    if not committing.done():
        await asyncio.wait({committing}, timeout=FINISH_S)
        committing.cancel()
        await asyncio.wait({committing})


def _refusal(error: Exception) -> Exception:
    """A command that breaks is our fault, but must not stop the others."""
    if not isinstance(error, NovacronError):
        log.error("a command failed in its decision", exc_info=error)
    return error


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)


def _refuse_all(group: list[tuple[_Waiting, Any]], error: Exception) -> None:
    """Refuse a group that was not written, or of which nobody knows.

    What was refused anyway has certainly changed nothing; but what for may not have been written.
    """
    nothing_done = LeadershipLost("what stood against it may not have been written; try again")
    for waiting, decided in group:
        unknown = isinstance(error, OutcomeUnknown) and isinstance(decided, _Refused)
        _refuse(waiting, nothing_done if unknown else error)


def _resolve(group: list[tuple[_Waiting, Any]]) -> None:
    for waiting, decided in group:
        if isinstance(decided, _Refused):
            _refuse(waiting, decided.error)
        elif not waiting.result.done():
            waiting.result.set_result(decided)
