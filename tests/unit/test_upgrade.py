"""From one release to the next: what waits for the end of the upgrade, and how it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.commands.drains import RequestDrain
from controlplane.commands.migrations import RequestMigration
from controlplane.commands.upgrade import FinalizeUpgrade
from controlplane.commands.vm_patch import ChangeVm, MigrationPatch, SpecPatch, VmPatch
from controlplane.commands.vms import CreateVm
from controlplane.services import cluster as services
from controlplane.services.context import ROLES, Permission, Principal, Scope
from shared.errors import Forbidden, UpgradeBlocked, UpgradeUnfinished
from shared.model import (
    SCHEMA_LEVEL,
    AuditRecord,
    BootSpec,
    Event,
    MigrationSpec,
    VersionFacts,
    VmSpec,
)
from shared.version import VERSION, release_of
from tests.unit.api_world import REPLICA, SYSTEM, World, new_vm
from tests.unit.cli_fake_api import Cli, FakeApi, problem
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

CLUSTER = "/api/v1/cluster"
FINALIZE = f"{CLUSTER}/actions/finalize-upgrade"
OLD = "0.1.0"
NOW = replace(REPLICA, version=VERSION)


def versions(agent: str) -> VersionFacts:
    return VersionFacts(agent=agent, libvirt="9.0.0", qemu="7.2", kernel="6.1")


def of_level(level: int) -> World:
    """Return a cluster of a level, whose one replica is of this release."""
    world = World()
    (stored,) = world.state.clusters.values()
    world.state.put(replace(stored.record, schema_level=level), world.state.revision + 1)
    world.state.advanced(world.state.revision + 1)
    world.replicas = (NOW,)
    return world


@pytest.fixture
def world() -> World:
    """Return a cluster that began with the release before and has one node, upgraded."""
    world = of_level(SCHEMA_LEVEL - 1)
    world.join("n1", versions=versions(VERSION))
    return world


def level(world: World) -> int:
    found = world.state.cluster()
    assert found is not None
    return found.schema_level


def finalize(world: World) -> FinalizeUpgrade:
    return FinalizeUpgrade(replicas=world.replicas, agents=world.agents, by=SYSTEM)


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.1.0", (0, 1)),
        ("0.2.17", (0, 2)),
        ("1.10.0", (1, 10)),
        ("0.3.0rc1", (0, 3)),
        ("0.2", (0, 2)),
        ("", (0, 0)),
        ("newest", (0, 0)),
        ("1", (0, 0)),
        ("1." + "9" * 50, (0, 0)),
    ],
)
def test_a_release_is_told_by_its_first_two_numbers(version: str, release: tuple[int, int]) -> None:
    assert release_of(version) == release


def test_the_level_is_raised_once_and_history_tells(world: World) -> None:
    before = world.state.last_seq
    cluster_id = world.apply(finalize(world))
    assert level(world) == SCHEMA_LEVEL
    audit, event = (world.state.history[seq] for seq in range(before + 1, before + 3))
    assert isinstance(audit, AuditRecord)
    assert (audit.action, audit.object) == ("cluster.finalize_upgrade", cluster_id)
    assert isinstance(event, Event)
    assert event.kind == "cluster.upgrade_finalized"
    assert event.data == {
        "release": VERSION,
        "schema_level": SCHEMA_LEVEL,
        "before": SCHEMA_LEVEL - 1,
    }

    assert world.apply(finalize(world)) == cluster_id
    assert world.state.last_seq == before + 2


def test_a_level_above_ours_is_left_alone() -> None:
    world = of_level(SCHEMA_LEVEL + 1)
    world.replicas = (replace(REPLICA, version=OLD),)
    world.apply(finalize(world))
    assert level(world) == SCHEMA_LEVEL + 1


def test_everyone_of_an_older_release_is_named_at_once(world: World) -> None:
    world.join("n2", versions=versions(OLD))
    n3 = world.join("n3", versions=versions(VERSION))
    n4 = world.join("n4", versions=versions(VERSION))
    lost = world.state.nodes[n4].record
    world.state.put(replace(lost, inventory=None), world.state.revision + 1)
    world.agents = {n3: OLD}
    world.replicas = (NOW, replace(REPLICA, name="r2", version=OLD))
    with pytest.raises(UpgradeBlocked) as refused:
        world.apply(finalize(world))
    told = {error.pointer: (error.code, error.message) for error in refused.value.errors}
    assert sorted(told) == ["/nodes/n2", "/nodes/n3", "/nodes/n4", "/replicas/r2"]
    assert told["/nodes/n2"] == (
        "old_agent",
        f"its agent is 0.1.0; upgrade it to {VERSION} or newer",
    )
    assert told["/replicas/r2"] == ("old_replica", f"it is 0.1.0; upgrade it to {VERSION} or newer")
    assert "never told" in told["/nodes/n4"][1]
    assert level(world) == SCHEMA_LEVEL - 1


def test_a_newer_agent_in_session_does_not_hide_an_older_record(world: World) -> None:
    n2 = world.join("n2", versions=versions(OLD))
    world.agents = {n2: VERSION}
    with pytest.raises(UpgradeBlocked, match="/nodes/n2"):
        world.apply(finalize(world))


def _running(world: World) -> tuple[str, str]:
    """Return the ids of a VM that runs, and of its node."""
    node_id = world.state.node_id_by_name("n1")
    assert node_id is not None
    spec = VmSpec(vcpus=1, memory_mib=64, boot=BootSpec(kernel="tiny-kernel"))
    world.apply(CreateVm(name="web-1", tenant="default", labels={}, spec=spec, by=SYSTEM))
    vm_id = world.state.vm_id_by_name("default", "web-1")
    assert vm_id is not None
    world.run(vm_id, node_id)
    return vm_id, node_id


def _above_level_one(world: World) -> dict[str, Any]:
    vm_id, node_id = _running(world)
    none: frozenset[str] = frozenset()
    spec = VmSpec(vcpus=1, memory_mib=64, boot=BootSpec(kernel="tiny-kernel"))
    strict = replace(spec, migration=MigrationSpec(strict=True))
    steady = SpecPatch(migration=MigrationPatch(max_downtime_ms=100))
    return {
        "migrate": RequestMigration(
            vm_id=vm_id, destination=None, steps=("admit",), no_return=none, by=SYSTEM
        ),
        "drain": RequestDrain(
            node_id=node_id, reason="", skip=(), steps=("cordon",), no_return=none, by=SYSTEM
        ),
        "create": CreateVm(name="web-2", tenant="default", labels={}, spec=strict, by=SYSTEM),
        "change": ChangeVm(vm_id=vm_id, patch=VmPatch(spec=steady), by=SYSTEM),
    }


@pytest.mark.parametrize("what", ["migrate", "drain", "create", "change"])
def test_what_the_release_before_would_drop_waits_for_the_end(world: World, what: str) -> None:
    command = _above_level_one(world)[what]
    before = world.state.last_seq
    with pytest.raises(UpgradeUnfinished, match="novacron cluster finalize-upgrade"):
        world.apply(command)
    assert world.state.last_seq == before
    world.apply(finalize(world))
    world.apply(command)


def test_what_the_release_before_keeps_does_not_wait(world: World) -> None:
    vm_id, _ = _running(world)
    patch = VmPatch(labels={"tier": "gold"}, spec=SpecPatch(migration=MigrationPatch(strict=False)))
    world.apply(ChangeVm(vm_id=vm_id, patch=patch, by=SYSTEM))
    assert world.state.vms[vm_id].record.labels == {"tier": "gold"}


async def test_the_api_finalizes_and_shows_what_is_in_the_way(world: World) -> None:
    world.join("n2", versions=versions(OLD))
    async with world.client() as client:
        seen = (await client.get(CLUSTER)).json()
        assert (seen["schema_level"], seen["upgrade_pending"]) == (SCHEMA_LEVEL - 1, True)
        assert [each["pointer"] for each in seen["upgrade_blockers"]] == ["/nodes/n2"]
        for query in ("", "?dry_run=true"):
            refused = await client.post(FINALIZE + query)
            assert (refused.status_code, refused.json()["code"]) == (409, "upgrade_blocked")
            assert [each["pointer"] for each in refused.json()["errors"]] == ["/nodes/n2"]

        world.join("n2", versions=versions(VERSION))
        planned = (await client.post(FINALIZE + "?dry_run=true")).json()
        assert (planned["upgrade_pending"], planned["upgrade_blockers"]) == (True, [])
        assert level(world) == SCHEMA_LEVEL - 1
        done = await client.post(FINALIZE)
        assert done.status_code == 200
        assert (done.json()["schema_level"], done.json()["upgrade_pending"]) == (
            SCHEMA_LEVEL,
            False,
        )
        assert (await client.post(FINALIZE)).json() == (await client.get(CLUSTER)).json()


async def test_a_finalize_sent_again_under_its_key_is_answered_with_the_cluster(
    world: World,
) -> None:
    key = {"Idempotency-Key": "once"}
    async with world.client() as client:
        first = await client.post(FINALIZE, headers=key)
        again = await client.post(FINALIZE, headers=key)
    assert first.status_code == 200
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["schema_level"] == SCHEMA_LEVEL


async def test_what_waits_says_so_over_the_api(world: World) -> None:
    async with world.client() as client:
        body = new_vm("careful", migration={"strict": True})
        refused = await client.post("/api/v1/vms", json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "upgrade_unfinished")


async def test_only_who_may_write_the_cluster_finalizes(world: World) -> None:
    permissions = ROLES["admin"] - {Permission.CLUSTER_WRITE}
    reader = Principal("reader", permissions, Scope(), "req-1")
    with pytest.raises(Forbidden, match="cluster:write"):
        await services.finalize_upgrade(world.context, reader)


async def test_a_page_shows_the_first_of_many_and_counts_the_rest(world: World) -> None:
    for number in range(services.BLOCKERS_SHOWN_MAX + 7):
        world.join(f"old-{number}", versions=versions(OLD))
    async with world.client() as client:
        shown = (await client.get(CLUSTER)).json()["upgrade_blockers"]
        refused = (await client.post(FINALIZE)).json()["errors"]
    assert len(shown) == services.BLOCKERS_SHOWN_MAX + 1
    assert shown[-1] == {"pointer": "", "code": "more", "message": "and 7 more"}
    assert len(refused) == services.BLOCKERS_SHOWN_MAX + 7


async def test_a_replica_that_is_too_old_for_the_cluster_is_not_ready() -> None:
    checks = {}
    for level in (SCHEMA_LEVEL, SCHEMA_LEVEL + 1):
        async with of_level(level).client() as client:
            answer = await client.get("/readyz")
        (release,) = (each for each in answer.json()["checks"] if each["name"] == "release")
        checks[answer.status_code] = release
    assert checks[200]["ok"]
    assert not checks[503]["ok"]
    assert "upgrade this replica" in checks[503]["detail"]


def seen(**changes: Any) -> dict[str, Any]:
    return {"id": "cluster-1", "version": VERSION, "schema_level": SCHEMA_LEVEL, **changes}


def test_the_command_says_what_it_did_or_would_do(cli: Cli, api: FakeApi) -> None:
    pending = seen(schema_level=1, upgrade_pending=True)
    api.on("POST", "cluster/actions/finalize-upgrade", pending, seen(), seen())

    assert cli.run("cluster", "finalize-upgrade", "--dry-run") == 0
    assert cli.stdout == "nothing stands in the way; the schema level is 1 still\n"
    assert api.requests[0].query == {"dry_run": ["true"]}
    assert cli.run("cluster", "finalize-upgrade") == 0
    assert cli.stdout == f"the cluster is at schema level {SCHEMA_LEVEL}, as {VERSION} needs\n"
    assert cli.run("cluster", "finalize-upgrade", "-o", "json") == 0
    assert json.loads(cli.stdout) == seen()


def test_the_command_names_everyone_that_is_in_the_way(cli: Cli, api: FakeApi) -> None:
    error = {"pointer": "/nodes/n2", "code": "old_agent", "message": "its agent is 0.1.0"}
    api.on(
        "POST", "cluster/actions/finalize-upgrade", problem(409, "upgrade_blocked", errors=[error])
    )
    assert cli.run("cluster", "finalize-upgrade") == 4
    assert "/nodes/n2: its agent is 0.1.0 (old_agent)" in cli.stderr


def test_status_tells_of_an_upgrade_that_is_not_finished(cli: Cli, api: FakeApi) -> None:
    error = {"pointer": "/nodes/n2", "code": "old_agent", "message": "its agent is 0.1.0"}
    more = {"pointer": "", "code": "more", "message": "and 7 more"}
    pending = seen(schema_level=1, upgrade_pending=True)
    api.on("GET", "cluster", pending | {"upgrade_blockers": [error, more]}, pending, seen())

    assert cli.run("cluster", "status") == 0
    assert "/nodes/n2: its agent is 0.1.0" in cli.stdout
    assert "and 7 more" in cli.stdout
    assert cli.run("cluster", "status") == 0
    assert "novacron cluster finalize-upgrade" in cli.stdout
    assert cli.run("cluster", "status") == 0
    assert "Upgrade" not in cli.stdout
