"""How a cell moves on to this release: what has to wait for that, and the command that does it.

While the release before may still lead, nothing may be written that it would drop: it reads what it
knows of a record, and rewrites the record without the rest. The cluster's ``schema_level`` says how
far that has come. Only ``FinalizeUpgrade`` raises it, and nothing lowers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.draft import Author, Draft
from shared.errors import FieldError, Unavailable, UpgradeBlocked, UpgradeUnfinished
from shared.model import SCHEMA_LEVEL, Cluster, MigrationSpec, Node, Replica, VmSpec
from shared.version import VERSION, release_of

# From which level on what is new in 0.2 may be written: sagas, claims and leftovers, how a VM wants
# to be moved, and that it has run.
MOVES_LEVEL = 2

_RELEASE = release_of(VERSION)


class FinalizeUpgrade(Struct, frozen=True, kw_only=True, tag="finalize_upgrade"):
    """Raises the cluster's level to this release's own and returns the cluster's id.

    Asked again, it does nothing. ``replicas`` are those that are registered, ``agents`` the
    versions that connected agents have told, by node id. Raises UpgradeBlocked, Unavailable.
    """

    replicas: tuple[Replica, ...]
    agents: dict[str, str]
    by: Author

    def decide(self, draft: Draft) -> str:
        cluster = draft.cluster()
        if cluster is None:
            raise Unavailable("the cluster's record is not made yet")
        if cluster.schema_level >= SCHEMA_LEVEL:
            return cluster.id
        behind = tuple(still_behind(draft.nodes(), self.replicas, self.agents))
        if behind:
            raise UpgradeBlocked(behind)
        draft.put(replace(cluster, schema_level=SCHEMA_LEVEL))
        draft.audit("cluster.finalize_upgrade", cluster.id, self.by)
        draft.event(
            "cluster.upgrade_finalized",
            cluster.id,
            self.by,
            release=VERSION,
            schema_level=SCHEMA_LEVEL,
            before=cluster.schema_level,
        )
        return cluster.id


def still_behind(
    nodes: Iterable[Node], replicas: Iterable[Replica], agents: Mapping[str, str]
) -> Iterator[FieldError]:
    """Yield every replica and every node whose agent does not speak this release yet.

    A node counts by its record, whether it is heard or not: it comes back with what it had. What
    its session says (``agents``, by node id) counts besides.
    """
    for replica in replicas:
        if release_of(replica.version) < _RELEASE:
            yield _behind(f"/replicas/{replica.name}", "old_replica", "it", replica.version)
    for node in nodes:
        recorded = "" if node.inventory is None else node.inventory.versions.agent
        oldest = min(recorded, agents.get(node.id, recorded), key=release_of)
        if release_of(oldest) < _RELEASE:
            yield _behind(f"/nodes/{node.name}", "old_agent", "its agent", oldest)


def why_too_old(cluster: Cluster | None) -> str:
    """Return why this release must not lead the cluster; empty when it may.

    It would drop what newer replicas have written into the records that it rewrites.
    """
    if cluster is None or cluster.schema_level <= SCHEMA_LEVEL:
        return ""
    return (
        f"the cluster is at schema level {cluster.schema_level}, and {VERSION} knows levels up to "
        f"{SCHEMA_LEVEL}: upgrade this replica"
    )


def has_level(draft: Draft, level: int) -> bool:
    """Return whether what needs that level may be written."""
    cluster = draft.cluster()
    return cluster is None or cluster.schema_level >= level


def require_level(draft: Draft, level: int, what: str) -> None:
    """Raise UpgradeUnfinished while the cluster has not reached the level that ``what`` needs."""
    if has_level(draft, level):
        return
    raise UpgradeUnfinished(
        f"{what} must wait for the end of the upgrade: once every replica and every agent runs "
        f"{VERSION}, `novacron cluster finalize-upgrade` allows it"
    )


def check_spec(draft: Draft, spec: VmSpec) -> None:
    """Raise UpgradeUnfinished for a spec with something that the release before would drop."""
    migration = spec.migration
    if migration != MigrationSpec(policy=migration.policy):
        require_level(draft, MOVES_LEVEL, "spec.migration.strict or max_downtime_ms")


def _behind(pointer: str, code: str, who: str, version: str) -> FieldError:
    is_version = f"{who} is {version}" if version else f"{who} has never told its version"
    return FieldError(pointer, code, f"{is_version}; upgrade it to {VERSION} or newer")
