"""novacron node, op, cluster, events and top: what is shown of what the API sends."""

from __future__ import annotations

import json
from typing import Any

from tests.unit.cli_fake_api import (
    Cli,
    FakeApi,
    FakeTerminal,
    Reply,
    a_node,
    a_vm,
    an_operation,
    listing,
    problem,
)
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

CLUSTER = {
    "id": "cluster-1",
    "cell": "k3f9q2",
    "epoch": 1,
    "version": "0.1.0",
    "schema_level": 1,
    "leader": {
        "replica": "r1",
        "url": "https://10.88.0.1:8443",
        "term": "1.44",
        "since": "2026-11-20T11:59:00Z",
    },
    "replicas": [{"name": "r1", "url": "https://10.88.0.1:8443", "version": "0.1.0"}],
    "members": [
        {
            "endpoint": "127.0.0.1:2379",
            "reachable": True,
            "version": "3.4.23",
            "is_leader": True,
            "raft_term": 9,
            "revision": 4711,
            "db_size_bytes": 1536 * 1024,
            "db_in_use_bytes": 512 * 1024,
            "alarms": ["NOSPACE"],
            "problem": "",
        },
        {"endpoint": "127.0.0.1:2381", "reachable": False, "problem": "not connected"},
    ],
    "nodes": {"ready": 3, "silent": 0},
    "vms": 6,
    "revision": "r7",
}


def an_event(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "seq": number,
        "id": f"e{number}",
        "kind": "vm.running",
        "object": "vm-1",
        "at": "2026-11-20T11:59:00Z",
        "by": "user-1",
        "data": {},
        **fields,
    }


def test_nodes_show_what_they_have_and_gave(cli: Cli, api: FakeApi) -> None:
    never_seen = a_node("node-2", "n2", inventory=None, state="silent", cordoned=True)
    api.on("GET", "nodes", listing(a_node(), never_seen))

    assert cli.run("node", "ls") == 0

    header, first, second = cli.stdout.splitlines()
    assert header.split() == [
        "NAME",
        "STATE",
        "SINCE",
        "VMS",
        "VCPU",
        "MEMORY",
        "VIRT",
        "ADDRESS",
        "AGE",
    ]
    assert "2 GiB/4 GiB" in first
    assert "2/4" in first
    assert "silent, cordoned" in second


def test_a_node_is_described(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "nodes/n1", a_node(cordoned=True, cordon_reason="DIMM swap"))

    assert cli.run("node", "show", "n1") == 0

    assert "cordoned: DIMM swap" in cli.stdout
    assert "default: 40.5 of 50.0 GiB free" in cli.stdout


def test_cordon_says_why_and_uncordon_undoes(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "nodes/n1/actions/cordon", a_node(cordoned=True))
    api.on("POST", "nodes/n1/actions/uncordon", a_node())

    assert cli.run("node", "cordon", "n1", "--reason", "DIMM swap") == 0
    assert cli.stdout == "n1 cordoned\n"
    assert api.requests[0].json() == {"reason": "DIMM swap"}
    assert cli.run("node", "uncordon", "n1", "-o", "json") == 0
    assert json.loads(cli.stdout) == a_node()
    assert cli.run("node", "cordon", "n1", "n9") == 9


def test_operations_are_listed_by_state_and_target(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations", listing(an_operation()))

    assert cli.run("op", "ls", "--state", "running", "--target", "vm-1") == 0

    assert "vm.create" in cli.stdout
    assert api.requests[0].query["state"] == ["running"]
    assert api.requests[0].query["target"] == ["vm-1"]


def test_only_the_newest_operations_are_fetched(cli: Cli, api: FakeApi) -> None:
    page = [an_operation(id=f"op-{n}") for n in range(60)]
    api.on("GET", "operations", listing(cursor="c1"), listing(*page, cursor="c2"))

    assert cli.run("op", "ls", "-o", "name") == 0

    assert cli.stdout.split() == [f"op-{n}" for n in range(50)]
    assert len(api.requests) == 2


def test_a_failed_operation_shows_its_error(cli: Cli, api: FakeApi) -> None:
    faults = [{"pointer": "/spec", "code": "x", "message": "too much"}]
    error = {"title": "No room", "code": "unschedulable", "detail": "0 of 3", "errors": faults}
    api.on("GET", "operations/op-1", an_operation("failed", error=error))

    assert cli.run("op", "show", "op-1") == 0

    assert "No room (unschedulable)" in cli.stdout
    assert "/spec: too much" in cli.stdout


def test_a_drain_shows_what_it_waits_for_until_it_has_ended(cli: Cli, api: FakeApi) -> None:
    left = [{"vm": "vm-1", "name": "web-1", "reason": "it is being deleted"}]
    details = {"type": "drain", "left": left}
    path = "operations/op-1"
    api.on("GET", path, *(an_operation(state, details=details) for state in ("running", "failed")))

    assert cli.run("op", "show", "op-1") == 0
    assert "web-1: it is being deleted" in cli.stdout
    assert cli.run("op", "show", "op-1") == 0
    assert "it is being deleted" not in cli.stdout


def test_the_cluster_shows_who_leads(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", CLUSTER, {**CLUSTER, "leader": None})

    assert cli.run("cluster", "status") == 0
    assert "r1 (https://10.88.0.1:8443), term 1.44" in cli.stdout
    assert "1 of 2 reachable" in cli.stdout
    assert "127.0.0.1:2379: NOSPACE" in cli.stdout
    assert cli.run("cluster", "status") == 0
    assert "nobody leads" in cli.stdout


def test_members_are_listed(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", CLUSTER)

    assert cli.run("cluster", "members") == 0
    _, first, second = cli.stdout.splitlines()
    for part in ("leader", "3.4.23", "1.5 MiB", "512 KiB", " 9 ", "4711", "NOSPACE"):
        assert part in first
    assert "not connected" in second
    assert cli.run("cluster", "members", "-o", "name") == 0
    assert cli.stdout == "127.0.0.1:2379\n127.0.0.1:2381\n"


def test_the_leader_is_shown_with_its_term(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", CLUSTER, CLUSTER, {**CLUSTER, "leader": None})

    assert cli.run("cluster", "leader") == 0
    for part in ("r1", "https://10.88.0.1:8443", "1.44", "2026-11-20T11:59:00Z"):
        assert part in cli.stdout
    assert cli.run("cluster", "leader", "-o", "name") == 0
    assert cli.stdout == "r1\n"
    assert cli.run("cluster", "leader") == 0
    assert "nobody leads" in cli.stdout


def test_the_leader_is_asked_to_step_down(cli: Cli, api: FakeApi) -> None:
    refused = problem(503, "no_leader", "nobody leads at present")
    api.on("POST", "cluster/actions/step-down", CLUSTER, refused)

    assert cli.run("cluster", "step-down") == 0
    assert "r1 gives up its term 1.44" in cli.stdout
    assert cli.run("cluster", "step-down") == 8


def test_events_are_read_to_their_end(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "events", listing(an_event(1), an_event(2), cursor="c2"), listing(an_event(3)))

    assert cli.run("events", "--kind", "vm.running", "--since", "e0") == 0

    assert len(cli.stdout.splitlines()) == 3
    assert [request.query["since"] for request in api.requests] == [["e0"], ["e0"]]
    assert api.requests[1].query["cursor"] == ["c2"]
    assert api.requests[0].query["kind"] == ["vm.running"]


def test_without_since_only_the_last_events_are_asked_for(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "events", listing(an_event(1), an_event(2)))

    assert cli.run("events", "-o", "name", "--kind", "vm.*") == 0

    assert cli.stdout.split() == ["e1", "e2"]
    assert [request.query for request in api.requests] == [{"kind": ["vm.*"], "last": ["50"]}]


def test_an_older_control_plane_is_read_from_the_start_for_the_last_events(
    cli: Cli, api: FakeApi
) -> None:
    fault = {"pointer": "/last", "code": "unknown_field", "message": "is not known here"}
    api.on(
        *("GET", "events"),
        problem(422, "validation", errors=[fault]),
        listing(*(an_event(n) for n in range(60)), cursor="c2"),
        listing(*(an_event(n) for n in range(60, 80))),
        a_stream(a_frame(an_event(80))),
    )
    terminal = FakeTerminal()
    terminal.sleeps_left = 0

    assert cli.run("events", "-f", "-o", "name", terminal=terminal) == 0

    assert cli.stdout.split() == [f"e{n}" for n in range(30, 81)]
    assert ["last" in request.query for request in api.requests] == [True, False, False, False]
    assert api.requests[-1].headers["last-event-id"] == "r7"


def test_another_fault_of_the_query_is_no_reason_to_read_all(cli: Cli, api: FakeApi) -> None:
    fault = {"pointer": "/kind/0", "code": "bad_format", "message": "is no kind"}
    api.on("GET", "events", problem(422, "validation", errors=[fault]))

    assert cli.run("events", "--kind", "?") == 1

    assert len(api.requests) == 1


def test_events_in_json_are_the_apis_objects(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "events", listing(an_event(1)))

    assert cli.run("events", "-o", "json") == 0

    assert json.loads(cli.stdout)["items"] == [an_event(1)]


def a_stream(*frames: str, rest: str = "") -> Reply:
    """A stream that is cut after these frames, within the rest."""
    body = ("".join(f"{frame}\n\n" for frame in frames) + rest).encode()
    return Reply(body, headers={"Content-Type": "text/event-stream"})


def a_frame(event: dict[str, Any]) -> str:
    return f"id: {event['id']}\ndata: {json.dumps(event)}"


def test_following_goes_on_without_gaps_from_stream_to_stream(cli: Cli, api: FakeApi) -> None:
    hostile = an_event(3, by="\x1b]0;x")
    api.on(
        *("GET", "events"),
        listing(an_event(1)),
        a_stream("retry: 2000\nid: p1", a_frame(an_event(2)), ": heartbeat\nid: p2"),
        Reply(b"", cut=True),
        problem(503, "no_leader"),
        a_stream(a_frame(hostile), "event: resume\nid: p4\ndata: {}", rest="id: p5\ndata: cut o"),
        a_stream("event: progress\ndata: {}", 'event: resync\nid: p9\ndata: {"detail": "gone"}'),
        a_stream(rest=f"{a_frame(an_event(10))}\n"),
    )
    terminal = FakeTerminal()
    terminal.sleeps_left = 5

    assert cli.run("events", "-f", "--kind", "vm.*", terminal=terminal) == 0

    told = cli.stdout.splitlines()
    assert len(told) == 3
    assert "\x1b" not in cli.stdout
    assert "events are missing here: gone" in cli.stderr
    assert "since" not in api.requests[0].query
    assert [request.query["kind"] for request in api.requests] == [["vm.*"]] * len(api.requests)
    last = [request.headers.get("last-event-id") for request in api.requests]
    assert last == [None, "r7", "p2", "p2", "p2", "p4", "p9"]
    assert all(r.headers["accept"] == "text/event-stream" for r in api.requests[1:])


def test_followed_events_in_json_are_one_a_line(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "events", listing(), a_stream(a_frame(an_event(1)), a_frame(an_event(2))))
    terminal = FakeTerminal()
    terminal.sleeps_left = 0

    assert cli.run("events", "-f", "--since", "e0", "-o", "json", terminal=terminal) == 0

    assert [json.loads(line) for line in cli.stdout.splitlines()] == [an_event(1), an_event(2)]
    assert api.requests[0].query["since"] == ["e0"]


def test_following_ends_at_what_does_not_pass(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "events", listing(), problem(403, "forbidden"))
    assert cli.run("events", "-f") == 5
    api.on("GET", "events", listing(), Reply({"items": []}))
    assert cli.run("events", "-f") == 1
    assert "does not answer with a stream" in cli.stderr


def test_events_of_a_name_are_those_of_its_object(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "nodes/n1", a_node())
    api.on("GET", "vms/web-1", a_vm())
    api.on("GET", "events", listing())

    assert cli.run("events", "--object", "n1", "--object", "web-1") == 0
    assert api.requests[-1].query["object"] == ["n1", "web-1"]
    assert cli.run("node", "events", "n1") == 0
    assert api.requests[-1].query["object"] == ["node-1"]
    assert cli.run("vm", "events", "web-1") == 0
    assert api.requests[-1].query["object"] == ["vm-web-1-id"]
    assert cli.run("vm", "events", "nobody") == 3


def test_top_shows_the_busiest_first(cli: Cli, api: FakeApi) -> None:
    calm = {
        "object": "vm-1",
        "name": "calm",
        "latest": {"cpu_percent": 1.25},
        "as_of": "2026-11-01T12:00:00Z",
    }
    busy = {
        "object": "vm-2",
        "name": "busy",
        "latest": {"cpu_percent": 95.0, "memory_bytes": 3 * 1024**3, "disk_read_bytes_per_s": 2048},
    }
    silent = {"object": "vm-3", "name": "silent", "latest": None}
    api.on("GET", "metrics", listing(calm, silent, busy))

    assert cli.run("top", "vms") == 0

    lines = cli.stdout.splitlines()
    assert lines[1].split() == ["busy", "95", "3", "GiB", "2", "KiB/s", "-", "-", "-"]
    assert [line.split()[0] for line in lines] == ["VM", "busy", "calm", "silent"]
    assert api.requests[0].query["kind"] == ["vm"]


def test_top_of_everything_and_of_one(cli: Cli, api: FakeApi) -> None:
    usage = {"object": "node-1", "name": "n1", "latest": {"cpu_percent": 12.0}}
    api.on("GET", "metrics", listing(usage))
    api.on("GET", "nodes/n1/metrics", {"object": "node-1", "series": {}, **usage})

    assert cli.run("top") == 0
    assert cli.stdout.splitlines()[0].startswith("NODE")
    assert cli.run("top", "-o", "json") == 0
    assert json.loads(cli.stdout) == {"nodes": [usage], "vms": [usage]}
    assert cli.run("node", "top", "n1") == 0
    assert cli.stdout.splitlines()[1].startswith("n1     12")
