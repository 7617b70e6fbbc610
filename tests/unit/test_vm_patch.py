"""PATCH of a VM: merged as RFC 7396 says, every fault at once, and no running guest touched."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace

from controlplane.commands.vm_patch import HaPatch, MigrationPatch, PlacementPatch
from shared.model import HaSpec, MigrationSpec, PlacementSpec
from shared.moves import MigrationClaim, MigrationStage
from tests.unit.api_world import World, new_vm

WEB = "/api/v1/vms/web-1"
SPEC: dict[str, Any] = {
    "placement": {
        "node_labels": {"zone": "a", "rack": "7"},
        "affinity": [{"group": "near"}],
        "anti_affinity": [{"group": "web"}],
    },
    "ha": {"restart": False, "priority": 7},
}


@pytest.fixture
async def world() -> World:
    world = World()
    world.join("n1")
    async with world.client() as client:
        assert (await client.post("/api/v1/vms", json=new_vm(**SPEC))).is_success
    return world


@pytest.mark.parametrize(
    ("patch", "labels", "spec"),
    [
        ({}, {"tier": "gold"}, {}),
        ({"labels": {"tier": None, "app": "web"}}, {"app": "web"}, {}),
        ({"labels": None}, {}, {}),
        (
            {"spec": {"placement": {"node_labels": {"rack": None}, "affinity": []}}},
            {"tier": "gold"},
            {"placement": {"node_labels": {"zone": "a"}, "anti_affinity": ["web"]}},
        ),
        ({"spec": {"placement": None}}, {"tier": "gold"}, {"placement": {}}),
        (
            {"spec": {"ha": {"priority": None}}},
            {"tier": "gold"},
            {"ha": {"restart": False, "priority": 0}},
        ),
        (
            {"spec": {"ha": {"restart": True}, "migration": {"policy": "never-disrupt"}}},
            {"tier": "gold"},
            {"ha": {"restart": True, "priority": 7}},
        ),
    ],
)
async def test_it_is_merged(
    world: World, patch: dict[str, Any], labels: dict[str, str], spec: dict[str, Any]
) -> None:
    async with world.client() as client:
        before = (await client.get(WEB)).json()
        answer = await client.patch(
            WEB, json=patch, headers={"Content-Type": "application/merge-patch+json"}
        )
        after = (await client.get(WEB)).json()
    assert answer.status_code == 200
    assert answer.json() == after
    assert after["labels"] == labels
    if "placement" in spec:
        found = after["spec"]["placement"]
        assert found["node_labels"] == spec["placement"].get("node_labels", {})
        assert [rule["group"] for rule in found["affinity"]] == []
        groups = [rule["group"] for rule in found["anti_affinity"]]
        assert groups == spec["placement"].get("anti_affinity", [])
    else:
        assert after["spec"]["placement"] == before["spec"]["placement"]
    assert after["spec"]["ha"] == spec.get("ha", before["spec"]["ha"])
    assert after["status"] == before["status"]


async def test_what_changes_nothing_writes_nothing(world: World) -> None:
    before = (world.state.revision, world.state.last_seq)
    async with world.client() as client:
        answer = await client.patch(WEB, json={"labels": {"tier": "gold"}, "spec": {}})
    assert answer.status_code == 200
    assert world.state.last_seq == before[1]


async def test_a_change_is_in_history_with_its_parts(world: World) -> None:
    async with world.client() as client:
        await client.patch(WEB, json={"labels": {"a": "b"}, "spec": {"ha": {"priority": 1}}})
        (event,) = (await client.get("/api/v1/events?kind=vm.changed")).json()["items"]
    assert event["data"] == {"changed": ["labels", "spec.ha"]}
    assert event["by"] == "admin"


async def test_every_fault_at_once(world: World) -> None:
    patch = {
        "name": "other",
        "status": {},
        "colour": "blue",
        "labels": {"Tier": "gold", "tier": 7},
        "spec": {
            "vcpus": 4,
            "power": "stopped",
            "size": 1,
            "placement": {"node_labels": {"zone": "!"}, "affinity": [{"hard": 1}], "near": "x"},
            "ha": {"priority": 5000},
            "migration": {"policy": "whatever"},
        },
    }
    async with world.client() as client:
        answer = await client.patch(WEB, json=patch)
    assert answer.status_code == 422
    assert {(f["pointer"], f["code"]) for f in answer.json()["errors"]} == {
        ("/name", "immutable"),
        ("/status", "immutable"),
        ("/colour", "unknown_field"),
        ("/labels/Tier", "bad_format"),
        ("/labels/tier", "wrong_type"),
        ("/spec/vcpus", "immutable"),
        ("/spec/power", "immutable"),
        ("/spec/size", "unknown_field"),
        ("/spec/placement/node_labels/zone", "bad_format"),
        ("/spec/placement/affinity/0/group", "missing"),
        ("/spec/placement/affinity/0/hard", "wrong_type"),
        ("/spec/placement/near", "unknown_field"),
        ("/spec/ha/priority", "too_large"),
        ("/spec/migration/policy", "not_allowed"),
    }


@pytest.mark.parametrize(
    ("patch", "fault"),
    [
        ({"labels": {f"l{n}": "" for n in range(32)}}, ("/labels", "too_long")),
        (
            {"spec": {"placement": {"node_labels": {f"l{n}": "" for n in range(31)}}}},
            ("/spec/placement/node_labels", "too_long"),
        ),
        (
            {"spec": {"placement": {"affinity": [{"group": "web"}]}}},
            ("/spec/placement/anti_affinity/0/group", "duplicate"),
        ),
        ({"spec": None}, ("/spec", "wrong_type")),
        ([], ("", "wrong_type")),
    ],
)
async def test_the_whole_must_be_valid_too(
    world: World, patch: Any, fault: tuple[str, str]
) -> None:
    async with world.client() as client:
        before = world.state.revision
        answer = await client.patch(WEB, json=patch)
    assert [(f["pointer"], f["code"]) for f in answer.json()["errors"]] == [fault]
    assert world.state.revision == before


async def test_other_kinds_of_patch_are_not_read(world: World) -> None:
    async with world.client() as client:
        for kind in ("application/json-patch+json", "text/plain"):
            answer = await client.patch(WEB, content=b"{}", headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
        plain = await client.patch(
            WEB, content=b"{}", headers={"Content-Type": "application/json; charset=utf-8"}
        )
    assert plain.status_code == 200


async def test_what_is_being_deleted_is_not_changed(world: World) -> None:
    (stored,) = world.state.vms.values()
    world.state.put(replace(stored.record, deleting=True), stored.revision)
    async with world.client() as client:
        answer = await client.patch(WEB, json={"labels": {}})
    assert (answer.status_code, answer.json()["code"]) == (409, "state_conflict")


async def test_how_it_moves_is_not_changed_while_it_moves(world: World) -> None:
    (stored,) = world.state.vms.values()
    claim = MigrationClaim(
        operation="op-1", stage=MigrationStage.TRANSFER, source="node-1", source_generation=1
    )
    status = replace(stored.record.status, migration=claim)
    world.state.put(replace(stored.record, status=status), stored.revision)
    async with world.client() as client:
        answer = await client.patch(WEB, json={"spec": {"migration": {"strict": True}}})
        assert (answer.status_code, answer.json()["code"]) == (409, "state_conflict")
        assert "op-1" in answer.json()["detail"]
        answer = await client.patch(WEB, json={"labels": {"tier": "gold"}})
        assert answer.status_code == 200


def test_a_new_field_of_what_can_be_changed_is_one_of_its_patch_too() -> None:
    pairs: list[tuple[type[Struct], type[Struct]]] = [
        (PlacementPatch, PlacementSpec),
        (HaPatch, HaSpec),
        (MigrationPatch, MigrationSpec),
    ]
    for patch, kind in pairs:
        assert set(patch.__struct_fields__) == set(kind.__struct_fields__)
