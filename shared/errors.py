"""The one error tree.

A class says what a client may conclude from it: a stable ``code``, the HTTP status, and whether
the same call may succeed later. Raise with context, ``from`` the cause; the loop that decides what
to do with an error logs it, once.

    NovacronError
    ├── MalformedRequest          400  the bytes are not what the route reads
    ├── ValidationFailed          422  every field error at once, with pointers
    ├── Unauthenticated           401
    ├── Forbidden                 403
    ├── NotFound                  404
    │   └── DeletedSince               the change was made, and what it was made to is gone since
    ├── MethodNotAllowed          405
    ├── PayloadTooLarge           413
    ├── Conflict                  409
    │   ├── NameTaken
    │   ├── StateConflict              the action does not fit the object's state
    │   ├── IllegalTransition          a table in shared.states has no such row
    │   ├── ChangeTooLarge             more writes than one transaction may hold
    │   └── UpgradeUnfinished          it needs a schema level that the cluster has not reached
    ├── UpgradeBlocked            409  every replica and agent that is still of an older release
    ├── RestoreRefused            409  everything that stands against restoring a backup
    ├── CursorExpired             410  the walk's moment is too long ago: start again
    ├── HistoryGone               410  what came after that is not all here: list again
    ├── PreconditionFailed        412  the object is not the one that If-Match names
    ├── UnsupportedMediaType      415
    ├── IdempotencyKeyReused      422  the key came with another request before
    ├── Unavailable               503  retry later; nothing was changed
    │   ├── NoLeader
    │   ├── LeadershipLost
    │   ├── ReleaseTooOld              the cluster's schema level is above this replica's
    │   ├── StoreUnavailable
    │   ├── NodeUnreachable
    │   └── Overloaded
    ├── OutcomeUnknown            503  the change may or may not have happened: read back
    ├── StoreError                500
    │   ├── Compacted                  the revision asked for is gone: list again
    │   ├── WatchLost                  the stream ended: resume
    │   └── StoreFull             507  etcd's quota alarm: reads still work, nothing is written
    ├── Refused                   409  an agent's fence said no
    │   ├── StaleTerm
    │   ├── StaleRevision
    │   └── GenerationMismatch
    ├── HypervisorError           500
    │   ├── HypervisorUnavailable
    │   ├── DomainNotFound
    │   ├── ArtefactMissing
    │   └── DiskMissing                a VM that has run lacks one: never made anew
    ├── Disconnected              503  the peer of a stream is gone
    ├── RecordUnreadable          500  stored or received bytes do not decode
    └── ConfigInvalid             500  every fault of a configuration at once
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct


class FieldError(Struct, frozen=True, gc=False):
    """One fault of a request or a configuration; ``pointer`` is a JSON pointer (RFC 6901)."""

    pointer: str
    code: str
    message: str


class NovacronError(Exception):
    """Something that NovaCron can name; ``str()`` is a sentence for the user."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False


class MalformedRequest(NovacronError):
    code = "malformed"
    http_status = 400


class FieldErrors(NovacronError):
    """An error made of field errors; its text lists them all."""

    def __init__(self, summary: str, errors: tuple[FieldError, ...]) -> None:
        assert errors, "an error about fields names at least one"
        listed = "; ".join(f"{e.pointer or '/'}: {e.message}" for e in errors)
        super().__init__(f"{summary}: {listed}")
        self.summary = summary
        self.errors = errors


class ValidationFailed(FieldErrors):
    code = "validation"
    http_status = 422

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        super().__init__("the request is not valid", errors)


class Unauthenticated(NovacronError):
    code = "unauthenticated"
    http_status = 401


class Forbidden(NovacronError):
    code = "forbidden"
    http_status = 403


class NotFound(NovacronError):
    code = "not_found"
    http_status = 404


class DeletedSince(NotFound):
    code = "deleted_since"


class MethodNotAllowed(NovacronError):
    code = "method_not_allowed"
    http_status = 405


class PayloadTooLarge(NovacronError):
    code = "payload_too_large"
    http_status = 413


class Conflict(NovacronError):
    code = "conflict"
    http_status = 409


class NameTaken(Conflict):
    code = "name_taken"


class StateConflict(Conflict):
    code = "state_conflict"


class IllegalTransition(Conflict):
    code = "illegal_transition"


class ChangeTooLarge(Conflict):
    code = "change_too_large"


class UpgradeUnfinished(Conflict):
    code = "upgrade_unfinished"


class UpgradeBlocked(FieldErrors):
    code = "upgrade_blocked"
    http_status = 409

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        super().__init__("the upgrade cannot be finalized yet", errors)


class RestoreRefused(FieldErrors):
    code = "restore_refused"
    http_status = 409

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        super().__init__("the backup cannot be restored", errors)


class CursorExpired(NovacronError):
    code = "cursor_expired"
    http_status = 410


class HistoryGone(NovacronError):
    code = "history_gone"
    http_status = 410


class PreconditionFailed(NovacronError):
    code = "precondition_failed"
    http_status = 412


class UnsupportedMediaType(NovacronError):
    code = "unsupported_media_type"
    http_status = 415


class IdempotencyKeyReused(NovacronError):
    code = "idempotency_key_reused"
    http_status = 422


class Unavailable(NovacronError):
    code = "unavailable"
    http_status = 503
    retryable = True


class NoLeader(Unavailable):
    code = "no_leader"


class LeadershipLost(Unavailable):
    code = "leadership_lost"


class ReleaseTooOld(Unavailable):
    code = "release_too_old"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class NodeUnreachable(Unavailable):
    code = "node_unreachable"


class Overloaded(Unavailable):
    code = "overloaded"


class OutcomeUnknown(NovacronError):
    """Ambiguous is not failed: whoever gets this must read back before it concludes anything."""

    code = "outcome_unknown"
    http_status = 503
    retryable = True


class StoreError(NovacronError):
    code = "store"


class Compacted(StoreError):
    code = "compacted"

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"history below revision {compact_revision} was compacted")
        self.compact_revision = compact_revision


class WatchLost(StoreError):
    code = "watch_lost"


class StoreFull(StoreError):
    code = "store_full"
    http_status = 507


class Refused(NovacronError):
    code = "refused"
    http_status = 409


class StaleTerm(Refused):
    code = "stale_term"


class StaleRevision(Refused):
    code = "stale_revision"


class GenerationMismatch(Refused):
    code = "generation_mismatch"


class HypervisorError(NovacronError):
    code = "hypervisor"


class HypervisorUnavailable(HypervisorError):
    code = "hypervisor_unavailable"
    retryable = True


class DomainNotFound(HypervisorError):
    code = "domain_not_found"


class ArtefactMissing(HypervisorError):
    code = "artefact_missing"


class DiskMissing(HypervisorError):
    code = "disk_missing"


class Disconnected(NovacronError):
    code = "disconnected"
    http_status = 503
    retryable = True


class RecordUnreadable(NovacronError):
    code = "record_unreadable"


class ConfigInvalid(FieldErrors):
    code = "config_invalid"

    def __init__(self, source: str, errors: tuple[FieldError, ...]) -> None:
        super().__init__(f"the configuration {source} is not valid", errors)
