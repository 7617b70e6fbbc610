"""What use cases are given: who asks, and the parts of the replica they work with."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Protocol, TypeVar

from msgspec import Struct

from controlplane.commands.draft import Command
from controlplane.issuer import Issues
from controlplane.scheduler.request import SchedulerSettings
from controlplane.state import ClusterState
from controlplane.store.history import History
from controlplane.store.port import Room, Store
from controlplane.telemetry.progress import Progress, ProgressFrame
from controlplane.telemetry.windows import Rates, Series
from shared.clock import Clock
from shared.model import DEFAULT_TENANT, Replica
from shared.offload import Offload
from shared.protocol import Query

Result = TypeVar("Result")


class Permission(enum.StrEnum):
    """What a route may demand; every route demands one."""

    VMS_READ = "vms:read"
    VMS_WRITE = "vms:write"
    NODES_READ = "nodes:read"
    NODES_WRITE = "nodes:write"
    OPERATIONS_READ = "operations:read"
    OPERATIONS_WRITE = "operations:write"
    EVENTS_READ = "events:read"
    CLUSTER_READ = "cluster:read"
    CLUSTER_WRITE = "cluster:write"
    CLUSTER_BACKUP = "cluster:backup"
    METRICS_READ = "metrics:read"
    AUDIT_READ = "audit:read"


ROLES: dict[str, frozenset[Permission]] = {"admin": frozenset(Permission)}


class Scope(Struct, frozen=True):
    """Which tenant's objects a call may touch. There is no scope without a tenant."""

    tenant: str = DEFAULT_TENANT


class Principal(Struct, frozen=True):
    """Who asks, as the credential says."""

    name: str
    permissions: frozenset[Permission]
    scope: Scope
    request_id: str = ""


class Submit(Protocol):
    """Commits a command wherever the leader is, and returns once this replica has what it changed.

    Raises what the command raises, Unavailable, OutcomeUnknown.
    """

    async def __call__(self, command: Command[Result]) -> Result: ...


class Ask(Protocol):
    """Sends a query to a node's agent and returns its answer. Raises NodeUnreachable."""

    async def __call__(self, node_id: str, query: Query) -> bytes: ...


class Figures(Protocol):
    """What nodes and VMs use, as their agents' latest samples say, whichever replica has those.

    ``period_s`` is how far apart the points of a series are.
    """

    period_s: float

    async def latest(self, objects: Iterable[str]) -> dict[str, Rates]: ...

    async def series(self, object_id: str) -> Series | None: ...


class Repaired(Protocol):
    """The largest member of the store before and after, and the members that did not answer."""

    @property
    def before_bytes(self) -> int: ...

    @property
    def after_bytes(self) -> int: ...

    @property
    def skipped(self) -> tuple[str, ...]: ...


class Space(Protocol):
    """How much room the store has, by the last look; ``detail`` says it in words."""

    @property
    def room(self) -> Room: ...

    @property
    def detail(self) -> str: ...

    async def repair(self) -> Repaired:
        """Make room. Raises StateConflict while that is under way, what the store raises."""
        ...


class ProgressReader(Protocol):
    """One follower's view of progress: the latest figure of each operation that moved."""

    async def wait(self) -> None:
        """Return once there is something to take."""
        ...

    def take(self) -> tuple[ProgressFrame, ...]: ...

    def close(self) -> None: ...


class ProgressFeed(Protocol):
    """How far operations are, as this replica runs them or the leader has told it."""

    def latest(self, operation_id: str) -> Progress | None: ...

    def subscribe(self) -> ProgressReader:
        """Return a reader of all figures from now on, which its user closes."""
        ...


class Leadership(Struct, frozen=True):
    """Who leads, as this replica sees it; ``term`` is empty while nobody is known to."""

    replica: str = ""
    url: str = ""
    term: str = ""
    since: datetime | None = None


class Context(Struct, frozen=True):
    """The replica's parts, wired once in ``controlplane/app.py``.

    ``offload`` takes planning over the whole cluster off the event loop; ``replicas`` tells the
    registrations that this replica sees, ``agents`` the versions of the agents in session with the
    leader by node id; ``version`` is this replica's own. ``new_id`` makes an id of a kind;
    ``issuer`` is there where this replica holds the nodes' CAs.
    """

    state: ClusterState
    submit: Submit
    ask: Ask
    history: History
    figures: Figures
    progress: ProgressFeed
    store: Store
    space: Space
    clock: Clock
    scheduler: SchedulerSettings
    leadership: Callable[[], Leadership]
    replicas: Callable[[], tuple[Replica, ...]]
    agents: Callable[[], dict[str, str]]
    offload: Offload
    version: str
    new_id: Callable[[str], str]
    issuer: Issues | None
