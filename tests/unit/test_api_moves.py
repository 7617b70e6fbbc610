"""Migrations, drains and cancels over the API: accepted, told beforehand, refused, read again."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from controlplane.commands.sagas import FinishStep, unchanged
from controlplane.sagas.drain import DRAINING
from controlplane.sagas.migrate import MIGRATION
from shared.codec import pack
from shared.errors import FieldError
from shared.model import MigrationFacts, StepState
from shared.protocol import DestinationCheck, Query, QueryKind, SourceCheck
from tests.unit.api_world import World, new_vm

V1 = "/api/v1"
MIGRATE = f"{V1}/vms/web-1/actions/migrate"
DRAIN = f"{V1}/nodes/n1/actions/drain"
FACTS = MigrationFacts(address="192.0.2.1", relay="192.0.2.1:8445", tls=True)


class Cell(World):
    """web-1 runs on n1, db-1 is stopped and bound nowhere; n2 is empty."""

    blockers: tuple[FieldError, ...] = ()

    async def ask(self, node_id: str, query: Query) -> bytes:
        """Answer as agents do that are asked before a migration."""
        if query.kind is QueryKind.MIGRATION_SOURCE:
            return pack(SourceCheck(blockers=self.blockers, machine="pc-q35-7.2"))
        assert query.kind is QueryKind.MIGRATION_DESTINATION
        return pack(DestinationCheck())

    async def fill(self) -> None:
        self.node_id = self.join("n1", migration=FACTS)
        self.other_id = self.join("n2", migration=FACTS)
        async with self.client() as client:
            self.vm_id = (await client.post(f"{V1}/vms", json=new_vm())).json()["target"]
            self.run(self.vm_id, self.node_id)
            await client.post(f"{V1}/vms", json=new_vm("db-1", power="stopped"))

    async def post(self, path: str, body: Any = None) -> httpx2.Response:
        async with self.client() as client:
            return await client.post(path, json=body)

    async def get(self, path: str) -> Any:
        async with self.client() as client:
            answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def cell() -> Cell:
    cell = Cell()
    await cell.fill()
    return cell


async def test_a_migration_is_accepted_with_what_it_is_about(cell: Cell) -> None:
    answer = await cell.post(MIGRATE, {"destination": "n2"})

    assert answer.status_code == 202
    operation = answer.json()
    assert answer.headers["location"] == f"{V1}/operations/{operation['id']}"
    assert (operation["kind"], operation["target"]) == ("vm.migrate", cell.vm_id)
    assert (operation["state"], operation["phase"]) == ("running", "admit")
    assert [step["name"] for step in operation["steps"]] == list(MIGRATION.names)
    assert (operation["cancellable"], operation["parent"]) == (True, None)
    details = operation["details"]
    assert details["type"] == "migration"
    assert (details["source"], details["requested"]) == (cell.node_id, cell.other_id)
    assert (details["destination"], details["generation"]) == (None, 0)


async def test_a_migration_is_read_from_the_vms_side(cell: Cell) -> None:
    operation = (await cell.post(MIGRATE, {})).json()
    view = await cell.get(f"{V1}/migrations/{operation['id']}")

    assert (view["vm"], view["vm_name"]) == (cell.vm_id, "web-1")
    assert (view["source"], view["source_name"]) == (cell.node_id, "n1")
    assert (view["destination"], view["destination_name"]) == (None, None)
    assert view["steps"] == operation["steps"]


@pytest.mark.parametrize("what", ["a drain", "a creation", "nothing"])
async def test_only_a_migration_is_read_as_one(cell: Cell, what: str) -> None:
    drain = (await cell.post(DRAIN, {})).json()["id"]
    creation = (await cell.get(f"{V1}/operations?target=web-1"))["items"][-1]["id"]
    operation_id = {"a drain": drain, "a creation": creation, "nothing": "op-none"}[what]
    async with cell.client() as client:
        answer = await client.get(f"{V1}/migrations/{operation_id}")

    assert answer.status_code == 404


# Path, body, status, code; the same with a dry run.
REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "unknown destination": (MIGRATE, {"destination": "n9"}, 404, "not_found"),
    "own node": (MIGRATE, {"destination": "n1"}, 409, "state_conflict"),
    "stopped VM": (f"{V1}/vms/db-1/actions/migrate", {}, 409, "state_conflict"),
    "unknown VM": (f"{V1}/vms/none/actions/migrate", {}, 404, "not_found"),
    "unknown field": (MIGRATE, {"target": "n2"}, 422, "validation"),
    "bad destination": (MIGRATE, {"destination": 5}, 422, "validation"),
    "unknown node": (f"{V1}/nodes/n9/actions/drain", {}, 404, "not_found"),
    "unknown VM to skip": (DRAIN, {"skip": ["none"]}, 404, "not_found"),
    "unknown field of a drain": (DRAIN, {"force": True}, 422, "validation"),
    "bad reason": (DRAIN, {"reason": "a\nb"}, 422, "validation"),
}


@pytest.mark.parametrize("dry", ["", "?dry_run=true"])
@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_refused(cell: Cell, case: str, dry: str) -> None:
    path, body, status, code = REFUSED[case]
    before = cell.state.revision
    answer = await cell.post(path + dry, body)

    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert cell.state.revision == before


async def test_a_vm_moves_once_at_a_time(cell: Cell) -> None:
    operation_id = (await cell.post(MIGRATE, {})).json()["id"]
    for path in (MIGRATE, f"{V1}/vms/web-1/actions/stop"):
        answer = await cell.post(path, {} if path == MIGRATE else None)
        assert answer.status_code == 409
        assert operation_id in answer.json()["detail"]


async def test_a_migration_is_told_beforehand(cell: Cell) -> None:
    before = cell.state.revision
    plan = (await cell.post(f"{MIGRATE}?dry_run=true", {})).json()

    (vm,) = plan["vms"]
    assert (plan["kind"], plan["blocked"], vm["action"]) == ("vm.migrate", 0, "migrate")
    assert (vm["node_name"], vm["target_name"]) == ("n1", "n2")
    assert cell.state.revision == before
    cell.join("n3", migration=FACTS)
    plan = (await cell.post(f"{MIGRATE}?dry_run=true", {"destination": "n3"})).json()
    assert plan["vms"][0]["target_name"] == "n3"
    assert [each["node_name"] for each in plan["vms"][0]["placement"]["candidates"]] == ["n3"]


async def test_a_plan_tells_what_a_node_holds_against_it(cell: Cell) -> None:
    cell.blockers = (FieldError("", "host_device", "it has a device of its node"),)
    plan = (await cell.post(f"{MIGRATE}?dry_run=true", {})).json()

    assert plan["blocked"] == 1
    assert [each["code"] for each in plan["vms"][0]["reasons"]] == ["host_device"]


async def test_a_plan_says_why_nothing_can_be_done(cell: Cell) -> None:
    await cell.post(f"{V1}/nodes/n2/actions/cordon", {"reason": "fan"})
    plan = (await cell.post(f"{MIGRATE}?dry_run=true", {})).json()

    assert (plan["blocked"], plan["vms"][0]["target"]) == (1, None)
    drain = (await cell.post(f"{DRAIN}?dry_run=true", {})).json()
    assert (drain["blocked"], drain["vms"][0]["action"]) == (1, "migrate")
    assert drain["vms"][0]["reasons"]


async def test_a_drain_is_accepted_once_and_told_beforehand(cell: Cell) -> None:
    plan = (await cell.post(f"{DRAIN}?dry_run=true", {"skip": ["web-1"]})).json()
    assert plan["kind"] == "node.drain"
    assert [(each["vm_name"], each["action"]) for each in plan["vms"]] == [("web-1", "stay")]
    assert plan["vms"][0]["reasons"][0]["code"] == "skipped"
    first, second = [
        await cell.post(DRAIN, {"reason": reason, "skip": ["web-1"]}) for reason in ("fan", "disk")
    ]

    assert (first.status_code, second.status_code) == (202, 202)
    operation = first.json()
    assert second.json()["id"] == operation["id"]
    assert [step["name"] for step in operation["steps"]] == list(DRAINING.names)
    assert (operation["target"], operation["cancellable"]) == (cell.node_id, True)
    details = operation["details"]
    assert (details["type"], details["reason"], details["total"]) == ("drain", "fan", 1)
    assert details["skip"] == [cell.vm_id]


async def test_a_node_that_is_drained_is_not_opened(cell: Cell) -> None:
    operation_id = (await cell.post(DRAIN, {})).json()["id"]
    await cell.post(f"{V1}/nodes/n1/actions/cordon", {})
    answer = await cell.post(f"{V1}/nodes/n1/actions/uncordon", {})

    assert answer.status_code == 409
    assert operation_id in answer.json()["detail"]


@pytest.mark.parametrize("path", [MIGRATE, DRAIN])
async def test_a_saga_is_cancelled_once(cell: Cell, path: str) -> None:
    operation_id = (await cell.post(path, {})).json()["id"]
    for _ in range(2):
        answer = await cell.post(f"{V1}/operations/{operation_id}/actions/cancel")
        assert answer.status_code == 202
        view = answer.json()
        assert (view["state"], view["cancellable"]) == ("cancelling", False)
        assert view["error"]["code"] == "cancelled"
    kept = await cell.get(f"{V1}/operations/{operation_id}")
    assert kept["state"] == "cancelling"


async def test_past_its_return_a_migration_is_not_cancelled(cell: Cell) -> None:
    operation_id = (await cell.post(MIGRATE, {})).json()["id"]
    for step in MIGRATION.names[:-1]:
        cell.apply(FinishStep(operation_id=operation_id, step=step, effect=unchanged))
    view = await cell.get(f"{V1}/operations/{operation_id}")
    assert (view["phase"], view["cancellable"]) == ("finalize", False)
    assert [step["state"] for step in view["steps"][:-1]] == [StepState.DONE.value] * 6
    answer = await cell.post(f"{V1}/operations/{operation_id}/actions/cancel")

    assert (answer.status_code, answer.json()["code"]) == (409, "state_conflict")


async def test_what_is_no_saga_is_not_cancelled(cell: Cell) -> None:
    waiting = (await cell.post(f"{V1}/vms", new_vm("late"))).json()["id"]
    ended = (await cell.get(f"{V1}/operations?target=web-1"))["items"][-1]["id"]
    for operation_id, status in ((waiting, 409), (ended, 409), ("op-none", 404)):
        answer = await cell.post(f"{V1}/operations/{operation_id}/actions/cancel")
        assert answer.status_code == status, operation_id
