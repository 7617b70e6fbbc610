"""What callers hand in: the bodies and the query parameters of the use cases.

The constraints stated here are what the API checks and what its schema shows. Rules across fields
are in ``validation.py``.
"""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct

from controlplane.commands.vm_patch import SpecPatch, VmPatch
from controlplane.services.pages import LIMIT_DEFAULT, LIMIT_MAX, CursorText, Limit
from controlplane.services.views import VmView
from shared.admission import REQUEST_BYTES_MAX, Renewal
from shared.model import Labels, Name, OperationState, VmPhase, VmSpec
from shared.units import KIB, MIB

# A client that waits longer asks again; proxies cut idle answers after a minute.
WAIT_MAX_S = 60
CONSOLE_LIMIT_DEFAULT = 64 * KIB
# One message to an agent and back holds at most 4 MiB.
CONSOLE_LIMIT_MAX = MIB
_SAFE_INTEGER = 2**53 - 1

# Long enough for an id or a name; what is longer can be neither.
Reference = Annotated[str, Meta(min_length=1, max_length=63)]
KindTerm = Annotated[
    str,
    Meta(
        max_length=63,
        pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*(\.\*)?$",
        description="a kind, such as vm.running, or all below one: vm.*",
    ),
]
# Each is a walk of its own through history.
Kinds = Annotated[tuple[KindTerm, ...], Meta(max_length=16)]
Objects = Annotated[tuple[Reference, ...], Meta(max_length=16)]
Since = Annotated[str, Meta(max_length=64)]
Last = Annotated[
    int,
    Meta(
        ge=1,
        le=LIMIT_MAX,
        description="only the newest so many, in one page whatever `limit` says; "
        "not with since or cursor, nor to follow",
    ),
]
LabelTerm = Annotated[str, Meta(max_length=127, pattern=r"^[^=]+=[^=]*$", description="key=value")]


class NoBody(Struct, frozen=True):
    """An action that takes nothing."""


class NewVm(Struct, frozen=True, kw_only=True):
    """A VM to make, or to plan for."""

    name: Name
    spec: VmSpec
    labels: Labels = {}


# What a VM has and a patch of it may not name.
VM_IMMUTABLE = frozenset(
    {f"/{name}" for name in VmView.__struct_fields__ if name not in VmPatch.__struct_fields__}
    | {
        f"/spec/{name}"
        for name in VmSpec.__struct_fields__
        if name not in SpecPatch.__struct_fields__
    }
)


class ShutdownOrder(Struct, frozen=True, kw_only=True):
    """``deadline_s``: a guest that has not followed by then is stopped."""

    deadline_s: Annotated[float, Meta(ge=0, le=86400)] = 60.0


class MigrateOrder(Struct, frozen=True, kw_only=True):
    """``destination``: a node's id or name; left out, the best one is chosen."""

    destination: Reference | None = None


class DrainOrder(Struct, frozen=True, kw_only=True):
    """``skip``: VMs, by id or name, that stay where they are; the node is then not empty."""

    reason: Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""
    skip: Annotated[tuple[Reference, ...], Meta(max_length=100)] = ()


class CordonOrder(Struct, frozen=True, kw_only=True):
    reason: Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""


NodePattern = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9*]([a-z0-9.*-]*[a-z0-9*])?$",
        description="a node's name, or a pattern of names: rack1-*",
    ),
]
# As /etc/hosts and certificates take it; a name or an address of either family.
NodeAddress = Annotated[
    str, Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?$")
]
JOIN_TOKEN_LIFETIME_S = 15 * 60.0


class NewJoinToken(Struct, frozen=True, kw_only=True):
    """``nodes``: who may join with it, by name or pattern; left out, any. It lets one node in."""

    nodes: Annotated[tuple[NodePattern, ...], Meta(max_length=16)] = ()
    needs_approval: bool = False
    lifetime_s: Annotated[float, Meta(ge=60, le=7 * 86400)] = JOIN_TOKEN_LIFETIME_S


class Enrolment(Struct, frozen=True, kw_only=True):
    """A node asks to be let in: who it says it is, and the public keys that it has made."""

    token: Annotated[str, Meta(max_length=300)]
    name: Name
    address: NodeAddress
    agent_request: Annotated[str, Meta(max_length=REQUEST_BYTES_MAX)]
    qemu_request: Annotated[str, Meta(max_length=REQUEST_BYTES_MAX)]

    def keys(self) -> Renewal:
        return Renewal(agent_request=self.agent_request, qemu_request=self.qemu_request)


class RevokeOrder(Struct, frozen=True, kw_only=True):
    reason: Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""


class NoQuery(Struct, frozen=True):
    """A route that takes no query parameters."""


class DryRunQuery(Struct, frozen=True, kw_only=True):
    """``dry_run``: tell what the write would do, and change nothing."""

    dry_run: bool = False


class PageQuery(Struct, frozen=True, kw_only=True):
    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class VmQuery(PageQuery, frozen=True, kw_only=True):
    label: Annotated[tuple[LabelTerm, ...], Meta(max_length=16)] = ()
    node: Reference | None = None
    phase: VmPhase | None = None
    name: Reference | None = None


class NodeQuery(PageQuery, frozen=True, kw_only=True):
    label: Annotated[tuple[LabelTerm, ...], Meta(max_length=16)] = ()


class OperationQuery(PageQuery, frozen=True, kw_only=True):
    state: OperationState | None = None
    target: Reference | None = None
    kind: Kinds = ()


class MigrationQuery(PageQuery, frozen=True, kw_only=True):
    state: OperationState | None = None
    vm: Reference | None = None


class EventQuery(PageQuery, frozen=True, kw_only=True):
    """``since``: an event's id or a list's revision; what is returned comes after it.

    ``last``: the newest so many only, in one page. ``progress``: frames of progress too; for who
    follows.
    """

    since: Since | None = None
    last: Last | None = None
    object: Objects = ()
    kind: Kinds = ()
    progress: bool = False


class AuditQuery(PageQuery, frozen=True, kw_only=True):
    since: Since | None = None
    object: Objects = ()
    action: Kinds = ()


class WaitQuery(Struct, frozen=True, kw_only=True):
    """``wait``: seconds to hold the answer back while the operation has not ended."""

    wait: Annotated[int, Meta(ge=0, le=WAIT_MAX_S)] = 0


class ConsoleQuery(Struct, frozen=True, kw_only=True):
    """``offset`` in bytes, below zero from the end; ``limit`` in bytes."""

    offset: Annotated[int, Meta(ge=-_SAFE_INTEGER, le=_SAFE_INTEGER)] = -4096
    limit: Annotated[int, Meta(ge=1, le=CONSOLE_LIMIT_MAX)] = CONSOLE_LIMIT_DEFAULT


class UsageKind(enum.StrEnum):
    NODE = "node"
    VM = "vm"


class UsageQuery(PageQuery, frozen=True, kw_only=True):
    kind: UsageKind = UsageKind.VM
