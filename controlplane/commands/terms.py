"""On which terms a client's change is made: once under its key, and only to what it has seen.

The record of a key is written in the transaction of the change that it stands for, so that neither
is ever there without the other: whoever sends a request again after an unknown outcome gets what
the first one became, over any restart and change of leader.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Generic, TypeVar, cast

from msgspec import Struct

from controlplane.commands.draft import Command, Draft
from shared.errors import IdempotencyKeyReused, Overloaded, PreconditionFailed
from shared.model import IdempotencyRecord

Result = TypeVar("Result")

# Far longer than any client goes on trying.
KEPT_FOR = timedelta(hours=24)
# 25 MB in etcd and 55 MB in a replica. Past it a new key is refused rather than an old one
# forgotten: a forgotten one would let its request be done twice.
KEYS_MAX = 100_000
# One transaction holds 128 writes; the applier's own mark and other commands need room too.
FORGET_MAX = 100


class RequestKey(Struct, frozen=True, kw_only=True):
    """One request of a client: ``id`` hashes principal and key, ``fingerprint`` what it asks."""

    id: str
    principal: str
    fingerprint: str


class Expected(Struct, frozen=True, kw_only=True):
    """What a change was meant for: an object by id, at one of these revisions or at any."""

    object: str
    revisions: tuple[int, ...] = ()
    whatever: bool = False


class Decided(Struct, Generic[Result], frozen=True):
    """What a command decided; ``replayed``: an earlier one did, and this one changed nothing."""

    result: Result
    replayed: bool


class OnTerms(Struct, Generic[Result], frozen=True, kw_only=True):
    """Decides a command once for its key, and again and again returns what the first one decided.

    With a key the result is the id of what the client is answered with. What is expected of the
    object is asked only when the change is new: once made, it has moved the object on itself.
    Raises IdempotencyKeyReused, PreconditionFailed, Overloaded, and what the command raises; a
    refused command leaves no record, and its key may be used again.
    """

    command: Command[Result]
    key: RequestKey | None = None
    expected: Expected | None = None

    def decide(self, draft: Draft) -> Decided[Result]:
        if self.key is None:
            return Decided(self._decide_new(draft), replayed=False)
        kept = draft.find(IdempotencyRecord, self.key.id)
        if kept is not None and still_kept(kept, draft.now):
            check_same(kept, self.key)
            return Decided(cast(Result, kept.result), replayed=True)
        if kept is None and draft.count(IdempotencyRecord) >= KEYS_MAX:
            raise Overloaded(f"{KEYS_MAX} idempotency keys are kept already: send it without one")
        result = self._decide_new(draft)
        assert isinstance(result, str), "what is replayed is found again by its id"
        draft.put(
            IdempotencyRecord(
                id=self.key.id,
                principal=self.key.principal,
                fingerprint=self.key.fingerprint,
                result=result,
                created_at=draft.now,
            )
        )
        return Decided(result, replayed=False)

    def _decide_new(self, draft: Draft) -> Result:
        if self.expected is not None:
            revision = draft.revision_of(self.expected.object)
            if revision is None or not (
                self.expected.whatever or revision in self.expected.revisions
            ):
                raise PreconditionFailed(
                    "it is not what If-Match names: somebody changed it meanwhile; look again"
                )
        return self.command.decide(draft)


class ForgetKeys(Struct, frozen=True, kw_only=True):
    """Deletes records of keys whose time is over; those that were used anew stay."""

    ids: tuple[str, ...]

    def decide(self, draft: Draft) -> None:
        assert len(self.ids) <= FORGET_MAX, "keys are forgotten in steps"
        for record_id in self.ids:
            kept = draft.find(IdempotencyRecord, record_id)
            if kept is not None and not still_kept(kept, draft.now):
                draft.delete(IdempotencyRecord, record_id)


def still_kept(record: IdempotencyRecord, now: datetime) -> bool:
    return now - record.created_at < KEPT_FOR


def check_same(record: IdempotencyRecord, key: RequestKey) -> None:
    """Raise IdempotencyKeyReused unless the key came with this very request before."""
    if record.fingerprint != key.fingerprint:
        raise IdempotencyKeyReused(
            "the idempotency key came with another request before: use a new key for a new request"
        )
