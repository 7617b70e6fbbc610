"""novacron vm: lists, descriptions, creation, actions, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controlplane.cli.vm_create import parse_size
from tests.unit.cli_fake_api import (
    Cli,
    FakeApi,
    FakeTerminal,
    Reply,
    a_vm,
    an_operation,
    listing,
    problem,
)
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

DONE = an_operation("succeeded", "")
PLAN = {
    "node": "node-1",
    "node_name": "n1",
    "candidates": [
        {
            "node": "node-2",
            "node_name": "n2",
            "fits": False,
            "score": 0.0,
            "reasons": [{"code": "insufficient_memory", "message": "has 1 GiB, needs 2 GiB"}],
            "scores": {},
        },
        {
            "node": "node-1",
            "node_name": "n1",
            "fits": True,
            "score": 0.75,
            "reasons": [],
            "scores": {"free_memory": 0.5},
        },
    ],
    "refusals": {"insufficient_memory": 1},
    "revision": "r7",
}
NO_PLAN = {
    **PLAN,
    "node": None,
    "node_name": None,
    "candidates": [PLAN["candidates"][0]],  # type: ignore[index]
}


def test_ls_is_a_table_for_people(cli: Cli, api: FakeApi) -> None:
    api.on(
        "GET", "vms", listing(a_vm(), a_vm("batch-7", phase="Pending", node=None, node_name=None))
    )

    assert cli.run("vm", "ls", "-l", "tier=gold", "--node", "n1", "--phase", "Running") == 0

    assert cli.stdout.splitlines() == [
        "NAME      STATE     NODE   VCPU   MEMORY   AGE",
        "web-1     Running   n1     2      2 GiB    10m",
        "batch-7   Pending   -      2      2 GiB    10m",
    ]
    assert api.requests[0].query == {
        "label": ["tier=gold"],
        "node": ["n1"],
        "phase": ["Running"],
        "limit": ["500"],
    }


def test_json_is_what_the_api_sent(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "vms", listing(a_vm("a"), cursor="c"), listing(a_vm("b")))
    api.on("GET", "vms/a", a_vm("a"))

    assert cli.run("vm", "ls", "-o", "json") == 0
    assert json.loads(cli.stdout) == {"items": [a_vm("a"), a_vm("b")], "revision": "r7"}
    assert cli.run("vm", "show", "a", "-o", "json") == 0
    assert json.loads(cli.stdout) == a_vm("a")


def test_show_describes(cli: Cli, api: FakeApi) -> None:
    condition = {"type": "Placed", "status": False, "reason": "no_room", "message": "\x1b[2Jx"}
    api.on("GET", "vms/web-1", a_vm(conditions=[condition]))

    assert cli.run("vm", "show", "web-1") == 0

    assert "Node:          n1" in cli.stdout
    assert "root: 20 GiB in pool default" in cli.stdout
    assert "Placed: no (no_room)" in cli.stdout
    assert "\x1b" not in cli.stdout


def test_watch_looks_again_until_interrupted(cli: Cli, api: FakeApi) -> None:
    first, second = (
        listing(a_vm(node=None, node_name=None)),
        listing(a_vm(node=None, node_name=None, phase="Paused")),
    )
    api.on("GET", "vms", first, problem(503, "no_leader"), second)
    terminal = FakeTerminal(tty=True)
    terminal.sleeps_left = 3

    assert cli.run("vm", "ls", "-w", terminal=terminal) == 0

    assert cli.stdout.count("\x1b[2J") == 3
    assert "Paused" in cli.stdout.split("\x1b[2J")[-1]


def test_create_sends_what_was_given_and_waits(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms", Reply(an_operation(), 202))
    api.on("GET", "operations/op-1", an_operation(phase="run"), DONE)
    api.on("GET", "vms/vm-web-1-id", a_vm())

    code = cli.run(
        *("vm", "create", "web-1", "--vcpus", "2", "--memory", "2GiB", "--kernel", "tiny-kernel"),
        *("--disk", "root=20", "--disk", "data=1TiB@fast", "--nic", "lan", "--label", "tier=gold"),
        *("--node-label", "zone=a", "--anti-affinity", "web", "--affinity", "db:soft"),
    )

    assert (code, cli.stdout) == (0, "web-1 created: Running on n1\n")
    assert api.sent("POST")[0].json() == {
        "name": "web-1",
        "labels": {"tier": "gold"},
        "spec": {
            "vcpus": 2,
            "memory_mib": 2048,
            "boot": {"kernel": "tiny-kernel"},
            "disks": [
                {"name": "root", "size_gib": 20},
                {"name": "data", "size_gib": 1024, "pool": "fast"},
            ],
            "nics": [{"network": "lan"}],
            "placement": {
                "node_labels": {"zone": "a"},
                "affinity": [{"group": "db", "hard": False}],
                "anti_affinity": [{"group": "web", "hard": True}],
            },
        },
    }
    assert api.sent("GET")[0].query == {"wait": ["2"]}
    assert "vm.create web-1: running, run" in cli.stderr


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_create_reads_a_file_and_options_win(
    cli: Cli, api: FakeApi, tmp_path: Path, suffix: str
) -> None:
    api.on("POST", "vms", an_operation())
    body = {"name": "a", "spec": {"vcpus": 1, "boot": {"kernel": "k", "cmdline": "x"}}}
    toml = 'name = "a"\n[spec]\nvcpus = 1\n[spec.boot]\nkernel = "k"\ncmdline = "x"\n'
    path = tmp_path / f"vm{suffix}"
    path.write_text(toml if suffix == ".toml" else json.dumps(body))

    arguments = ("--file", str(path), "--vcpus", "4", "--initrd", "i", "--stopped", "--no-wait")
    assert cli.run("vm", "create", "b", *arguments) == 0

    assert cli.stdout == "op-1\n"
    assert api.requests[0].json() == {
        "name": "b",
        "spec": {
            "vcpus": 4,
            "power": "stopped",
            "boot": {"kernel": "k", "cmdline": "x", "initrd": "i"},
        },
    }


@pytest.mark.parametrize("content", ["[1]", "{", "= 1"])
def test_create_refuses_a_file_that_is_none(cli: Cli, tmp_path: Path, content: str) -> None:
    path = tmp_path / "vm.json"
    path.write_text(content)

    assert cli.run("vm", "create", "a", "--file", str(path)) == 2
    assert cli.run("vm", "create", "a", "--file", str(tmp_path / "missing")) == 2


def a_plan(action: str, placement: Any = None, **fields: Any) -> dict[str, Any]:
    vm = {"vm": None, "vm_name": "web-1", "action": action, "reasons": [], **fields}
    return {"kind": f"vm.{action}", "vms": [{**vm, "placement": placement}], "blocked": 0}


def test_a_dry_run_only_plans(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms", a_plan("create", PLAN))

    assert cli.run("vm", "create", "web-1", "--vcpus", "2", "--dry-run") == 0

    assert [request.query for request in api.requests] == [{"dry_run": ["true"]}]
    assert cli.stdout.splitlines() == [
        "web-1 would go to n1",
        "NODE   RESULT                SCORE   DETAIL",
        "n1     fits                  0.750   chosen; free memory 0.50",
        "n2     insufficient memory   -       has 1 GiB, needs 2 GiB",
    ]


def test_a_dry_run_that_fits_nowhere_says_why(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms", a_plan("create", NO_PLAN))

    assert cli.run("vm", "create", "web-1", "--dry-run") == 7

    assert "n2     insufficient memory" in cli.stdout
    assert "no node can run web-1 now: 1 insufficient memory" in cli.stderr


def test_a_dry_run_of_what_stays_stopped_places_nothing(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms", a_plan("create"))

    assert cli.run("vm", "create", "web-1", "--stopped", "--dry-run") == 0

    assert cli.stdout == "web-1 would be created stopped, and placed when it is started\n"


@pytest.mark.parametrize("action", ["start", "stop", "shutdown", "rm"])
def test_a_dry_run_of_a_change_asks_nobody_and_changes_nothing(
    cli: Cli, api: FakeApi, action: str
) -> None:
    plan = a_plan(action, node="node-1", node_name="n1")
    for name in ("a", "b"):
        api.on("POST", f"vms/{name}/actions/{action}", plan)
        api.on("DELETE", f"vms/{name}", plan)

    assert cli.run("vm", action, "a", "b", "--dry-run") == 0

    assert cli.stdout.splitlines()[0].split() == ["VM", "ACTION", "NODE", "TARGET", "NOTE"]
    assert cli.stdout.splitlines()[1].split() == ["web-1", action, "n1", "-", "-"]
    assert [request.query for request in api.requests] == [{"dry_run": ["true"]}] * 2
    assert cli.run("vm", action, "a", "--dry-run", "-o", "json") == 0
    assert json.loads(cli.stdout) == plan


def test_a_dry_run_that_cannot_be_done_says_why(cli: Cli, api: FakeApi) -> None:
    reasons = [{"code": "insufficient_memory", "message": "has 1 GiB, needs 2 GiB"}]
    api.on("POST", "vms/a/actions/start", a_plan("start", NO_PLAN, reasons=reasons))
    api.on("POST", "vms/b/actions/start", problem(409, "state_conflict", "is Running"))

    assert cli.run("vm", "start", "a", "--dry-run") == 7

    assert "web-1   BLOCKED" in cli.stdout
    assert "web-1: has 1 GiB, needs 2 GiB" in cli.stderr
    assert cli.run("vm", "start", "a", "b", "--dry-run") == 9
    assert "BLOCKED" in cli.stdout
    assert "b: error: State conflict" in cli.stderr


@pytest.mark.parametrize("command", [("explain",), ("vm", "explain")])
def test_explain_tells_each_nodes_reason(cli: Cli, api: FakeApi, command: tuple[str, ...]) -> None:
    api.on("GET", "vms/web-1/placement", NO_PLAN)
    api.on("GET", "vms/web-1", a_vm(phase="Pending", node=None, node_name=None))

    assert cli.run(*command, "web-1") == 0

    assert cli.stdout.startswith("web-1 is Pending: 0 of 1 nodes can run it\n")
    assert "has 1 GiB, needs 2 GiB" in cli.stdout


def test_several_vms_are_changed_at_once(cli: Cli, api: FakeApi) -> None:
    for name in ("a", "b"):
        api.on("POST", f"vms/{name}/actions/start", an_operation(id=f"op-{name}", kind="vm.start"))
        api.on("GET", f"operations/op-{name}", an_operation("succeeded", "", id=f"op-{name}"))

    assert cli.run("vm", "start", "a", "b", "a") == 0

    assert cli.stdout == "a started\nb started\n"
    assert [request.method for request in api.requests] == ["POST", "POST", "GET", "GET"]


def test_one_of_several_that_fails_makes_it_partial(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms/a/actions/stop", problem(409, "state_conflict", "a is Stopped"))
    api.on("POST", "vms/b/actions/stop", DONE)

    assert cli.run("vm", "stop", "a", "b", "-o", "json") == 9
    assert json.loads(cli.stdout) == {"items": [DONE]}
    assert "a is Stopped" in cli.stderr
    assert cli.run("vm", "stop", "a", "missing") == 1
    assert cli.run("vm", "stop", "a") == 4


def test_shutdown_sends_its_deadline(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms/a/actions/shutdown", an_operation())

    assert cli.run("vm", "shutdown", "a", "--deadline", "2m", "--no-wait") == 0
    assert api.requests[0].json() == {"deadline_s": 120.0}


def test_rm_with_yes_deletes(cli: Cli, api: FakeApi) -> None:
    api.on("DELETE", "vms/a", an_operation(kind="vm.delete"))
    api.on("GET", "operations/op-1", an_operation("succeeded", "", kind="vm.delete"))

    assert cli.run("vm", "rm", "a", "--yes", "-o", "name") == 0
    assert cli.stdout == "a\n"


def test_logs_are_bytes_as_the_guest_wrote_them(cli: Cli, api: FakeApi) -> None:
    log = b"tick 1\r\n\xff\x00"
    api.on("GET", "vms/a/console-log", Reply(log, headers={"Content-Type": "text/plain"}))

    assert cli.run("vm", "logs", "a", "--bytes", "100") == 0

    assert cli.terminal._out_bytes.getvalue() == log
    assert api.requests[0].query == {"offset": ["-100"], "limit": ["100"]}


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("512MiB", "MiB", 512),
        ("2GiB", "MiB", 2048),
        ("1.5gib", "MiB", 1536),
        ("2048", "MiB", 2048),
        ("1024KiB", "MiB", 1),
        ("1TiB", "GiB", 1024),
        ("2048MiB", "GiB", 2),
    ],
)
def test_sizes(text: str, unit: str, size: int) -> None:
    assert parse_size(text, unit) == size


@pytest.mark.parametrize("text", ["", "2GB", "-1", "1.5", "1e3", "GiB", "1KiB", "٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text, "MiB")


def test_label_sends_only_what_is_to_be_different(cli: Cli, api: FakeApi) -> None:
    api.on("PATCH", "vms/web-1", a_vm())

    assert cli.run("vm", "label", "web-1", "tier=gold", "old-") == 0

    assert cli.stdout == "web-1: tier=gold\n"
    assert api.sent("PATCH")[0].json() == {"labels": {"tier": "gold", "old": None}}
    assert cli.run("vm", "label", "web-1", "tier") == 2
    assert "key=value or key-" in cli.stderr
