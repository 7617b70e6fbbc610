"""controlplane.cli.wait: progress, and every way in which waiting ends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.cli_fake_api import Cli, FakeApi, FakeTerminal, Reply, an_operation, problem
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

DONE = an_operation("succeeded", "")


def test_waiting_again_ends_with_the_operation(cli: Cli, api: FakeApi) -> None:
    progress = {"percent": 41.5, "eta_s": 2.1}
    api.on("GET", "operations/op-1", an_operation(progress=progress), DONE)

    assert cli.run("op", "wait", "op-1") == 0

    assert cli.stdout == "op-1 succeeded\n"
    assert cli.stderr == "vm.create op-1: running, place (0/1), 42%, about 2s left\n"


def test_a_failed_operation_is_told_with_its_problem(cli: Cli, api: FakeApi) -> None:
    error = {"title": "No room", "status": 409, "code": "unschedulable", "detail": "0 of 3"}
    failed = an_operation("failed", "", error=error)
    api.on("GET", "operations/op-1", failed)

    assert cli.run("op", "wait", "op-1", "-o", "json") == 7

    assert json.loads(cli.stdout) == failed
    assert "vm.create of op-1: No room" in cli.stderr
    assert "0 of 3" in cli.stderr


def test_a_cancelled_operation_is_an_error(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation("cancelled", ""))

    assert cli.run("op", "wait", "op-1") == 1
    assert "cancelled" in cli.stderr


def test_a_timeout_ends_the_waiting_only(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation())

    assert cli.run("op", "wait", "op-1", "--timeout", "2s") == 6

    assert cli.stdout == ""
    assert "it goes on" in cli.stderr
    assert "try: novacron op wait op-1" in cli.stderr
    waits = [int(request.query["wait"][0]) for request in api.requests if request.query]
    assert waits
    assert max(waits) <= 2


def test_an_answer_that_is_not_held_back_is_no_reason_to_hurry(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation())

    assert cli.run("op", "wait", "op-1", "--timeout", "60s") == 6

    assert len(api.requests) <= 120


def test_ctrl_c_detaches_from_everything_that_is_left(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation())
    api.on("GET", "operations/op-2", an_operation(id="op-2"))
    terminal = FakeTerminal()
    terminal.looks_left = 8

    assert cli.run("op", "wait", "op-1", "op-2", terminal=terminal) == 130

    assert cli.stderr.splitlines()[-2:] == [
        "detached; vm.create of op-1 (op-1) goes on",
        "  wait again: novacron op wait op-1 op-2",
    ]


def start(api: FakeApi, *names: str, action: str = "start", **fields: Any) -> None:
    """Let the API accept an action on each VM, as operations op-a, op-b and so on."""
    for name in names:
        accepted = an_operation(id=f"op-{name}", kind=f"vm.{action}", **fields)
        api.on("POST", f"vms/{name}/actions/{action}", Reply(accepted, 202))
        api.on("GET", f"operations/op-{name}", accepted)


def test_those_whose_turn_comes_after_the_time_is_up_are_looked_at_once(
    cli: Cli, api: FakeApi
) -> None:
    start(api, "a", "b")
    api.on("GET", "operations/op-b", an_operation("succeeded", "", id="op-b", kind="vm.start"))

    assert cli.run("vm", "start", "a", "b", "--timeout", "5s") == 9

    assert cli.stdout == "b started\n"
    assert "vm.start of a (op-a) has not ended in time" in cli.stderr
    assert "of b" not in cli.stderr
    looks = [each for each in api.requests if each.path.endswith("operations/op-b")]
    assert [look.query for look in looks] == [{}]


def test_waiting_again_looks_at_all_before_the_time_is_up(cli: Cli, api: FakeApi) -> None:
    ended = an_operation("succeeded", "", id="op-2")
    api.on("GET", "operations/op-1", an_operation())
    api.on("GET", "operations/op-2", an_operation(id="op-2"), ended)

    assert cli.run("op", "wait", "op-1", "op-2", "--timeout", "2s") == 9
    assert cli.stdout == "op-2 succeeded\n"


def test_a_control_plane_that_is_away_when_the_time_is_up_is_asked_once(
    cli: Cli, api: FakeApi
) -> None:
    away = problem(503, "no_leader", retryable=True)
    api.on("GET", "operations/op-1", an_operation(), away)
    api.on("GET", "operations/op-2", an_operation(id="op-2"), away)

    assert cli.run("op", "wait", "op-1", "op-2", "--timeout", "1s") == 6

    assert len([each for each in api.requests if each.path.endswith("op-2")]) == 2


def test_ctrl_c_while_waiting_tells_what_was_refused(cli: Cli, api: FakeApi) -> None:
    start(api, "b", action="migrate", cancellable=True)
    api.on("POST", "vms/a/actions/migrate", problem(409, "state_conflict", "a is stopped"))
    terminal = FakeTerminal()
    terminal.looks_left = 8

    assert cli.run("vm", "migrate", "a", "b", terminal=terminal) == 130

    told = cli.stderr.splitlines()
    assert "a: error: State conflict (state_conflict, status 409)" in told
    assert "a:   a is stopped" in told
    assert told[-3:] == [
        "detached; vm.migrate of b (op-b) goes on",
        "  wait again: novacron op wait op-b",
        "  undo it:    novacron op cancel op-b",
    ]


@pytest.mark.parametrize("no_wait", [[], ["--no-wait"]])
def test_ctrl_c_while_submitting_names_what_was_accepted(
    cli: Cli, api: FakeApi, no_wait: list[str]
) -> None:
    start(api, "a", "b", action="migrate", cancellable=True)
    api.on("POST", "vms/x/actions/migrate", problem(409, "state_conflict"))
    api.on("POST", "vms/c/actions/migrate", problem(503, "no_leader", retryable=True))
    terminal = FakeTerminal()
    terminal.sleeps_left = 0

    code = cli.run("vm", "migrate", "a", "x", "b", "c", "d", "e", *no_wait, terminal=terminal)

    assert code == 130
    assert cli.stdout == ""
    assert cli.stderr.splitlines()[1:] == [
        "x: error: State conflict (state_conflict, status 409)",
        "interrupted; vm.migrate of a (op-a) goes on",
        "interrupted; vm.migrate of b (op-b) goes on",
        "c may or may not have been accepted: look before you repeat it",
        "not submitted: d e",
        "  wait again: novacron op wait op-a op-b",
        "  undo it:    novacron op cancel op-a op-b",
    ]


def test_ctrl_c_while_the_first_is_submitted_leaves_that_one_unsure(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms/a/actions/stop", problem(503, "no_leader", retryable=True))
    terminal = FakeTerminal()
    terminal.sleeps_left = 0

    assert cli.run("vm", "stop", "a", terminal=terminal) == 130

    assert cli.stderr.splitlines()[1:] == [
        "interrupted",
        "a may or may not have been accepted: look before you repeat it",
    ]


def test_ctrl_c_before_the_waiting_began_has_changed_nothing(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation())
    api.on("GET", "operations/op-2", problem(503, "no_leader", retryable=True))
    terminal = FakeTerminal()
    terminal.sleeps_left = 0

    assert cli.run("op", "wait", "op-1", "op-2", "op-3", terminal=terminal) == 130

    assert cli.stderr.splitlines()[1:] == [
        "detached; nothing was changed",
        "  wait again: novacron op wait op-1 op-2 op-3",
    ]


def test_waiting_bridges_an_election(cli: Cli, api: FakeApi) -> None:
    nobody = [problem(503, "no_leader", retryable=True)] * 8
    api.on("GET", "operations/op-1", an_operation(), *nobody, DONE)

    assert cli.run("op", "wait", "op-1") == 0


def test_waiting_gives_up_on_a_control_plane_that_stays_away(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation(), problem(503, "no_leader", retryable=True))

    assert cli.run("op", "wait", "op-1") == 8
    assert "try: novacron op wait op-1" in cli.stderr


def test_an_operation_that_is_gone_is_not_waited_for(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "operations/op-1", an_operation(), problem(404, "not_found"))

    assert cli.run("op", "wait", "op-1") == 3


def test_waiting_for_room_names_the_command_that_explains(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms", an_operation())
    api.on("GET", "operations/op-1", *[an_operation()] * 20, DONE)
    api.on("GET", "vms/vm-web-1-id", {"id": "vm-web-1-id", "name": "web-1"})

    assert cli.run("vm", "create", "web-1") == 0

    assert cli.stderr.count("novacron vm explain web-1") == 1


@pytest.mark.parametrize("tty", [True, False])
def test_progress_never_mixes_with_data(cli: Cli, api: FakeApi, tty: bool) -> None:
    api.on("GET", "operations/op-1", an_operation(phase="run"), DONE)

    assert cli.run("op", "wait", "op-1", "-o", "name", terminal=FakeTerminal(tty=tty)) == 0

    assert cli.stdout == "op-1\n"
    assert ("\r" in cli.stderr) is tty
