"""controlplane.cli.main: start-up, help, and how a run ends."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from controlplane.cli import main
from tests.unit.cli_fake_api import Cli, FakeApi, Reply, a_vm, listing, problem
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

HEAVY = ("grpc", "cryptography", "starlette", "uvicorn", "httpx", "asyncio", "ssl", "rich")


def test_importing_the_command_imports_nothing_heavy() -> None:
    program = (
        "import sys, controlplane.cli.main;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    loaded = done.stdout.decode().strip()
    assert "grpc" not in loaded
    assert "cryptography" not in loaded
    assert "starlette" not in loaded
    assert "uvicorn" not in loaded


def test_every_command_can_be_loaded_and_has_help(cli: Cli) -> None:
    for name in main.COMMANDS:
        command = main.novacron.get_command(click.Context(main.novacron), name)
        assert command is not None
        assert cli.run(name, "--help") == 0


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "controlplane.cli.main", "--help"], capture_output=True, check=True
    )

    assert all(f"  {name} " in done.stdout.decode() for name in main.COMMANDS)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (problem(400, "malformed"), 1),
        (problem(401, "unauthenticated"), 5),
        (problem(403, "forbidden"), 5),
        (problem(404, "not_found"), 3),
        (problem(409, "state_conflict"), 4),
        (problem(409, "unschedulable"), 7),
        (problem(410, "compacted"), 1),
        (problem(412, "precondition_failed"), 4),
        (problem(422, "validation"), 1),
        (problem(500, "internal"), 1),
        (problem(503, "no_leader", retryable=True), 8),
    ],
)
def test_a_problem_has_its_exit_code(cli: Cli, api: FakeApi, reply: Reply, code: int) -> None:
    api.on("GET", "vms/web-1", reply)

    assert cli.run("vm", "show", "web-1") == code
    assert cli.stdout == ""
    assert "error: " in cli.stderr


def test_every_field_error_is_told_with_its_pointer_and_option(cli: Cli, api: FakeApi) -> None:
    faults = [
        {"pointer": "/spec/vcpus", "code": "too_small", "message": "at least 1"},
        {"pointer": "/spec/boot/kernel", "code": "missing", "message": "is required"},
    ]
    api.on("POST", "vms", problem(422, "validation", "2 faults", errors=faults, request_id="q-9"))

    assert cli.run("vm", "create", "web-1", "--vcpus", "0") == 1

    assert "/spec/vcpus: at least 1 (too_small)" in cli.stderr
    assert "/spec/boot/kernel: is required (missing)" in cli.stderr
    assert "q-9" in cli.stderr
    assert "try: correct --vcpus, --kernel, --initrd, --cmdline" in cli.stderr


def test_a_problems_text_moves_no_cursor(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "vms/web-1", problem(500, "internal", "\x1b[2Jgone\nsecond line"))

    assert cli.run("vm", "show", "web-1") == 1

    assert "\x1b" not in cli.stderr
    assert "second line" in cli.stderr.splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("vm", "ls", "-o", "xml"),
        ("vm", "ls", "-l", "tier"),
        ("vm", "start"),
        ("vm", "rm", "web-1"),
        ("vm", "create"),
        ("vm", "create", "a", "--memory", "1.0001MiB"),
        ("vm", "create", "a", "--disk", "root"),
        ("vm", "create", "a", "--affinity", "web:often"),
        ("op", "wait", "op-1", "--timeout", "soon"),
        ("op", "wait", "op-1", "--timeout", "nan"),
        ("api", "GET", "vms", "{}"),
        ("api", "GET", "vms x"),
    ],
)
def test_wrong_usage_is_told_and_sends_nothing(
    cli: Cli, api: FakeApi, arguments: tuple[str, ...]
) -> None:
    assert cli.run(*arguments) == 2
    assert cli.stderr != ""
    assert api.requests == []


def test_an_output_format_may_come_from_the_environment(cli: Cli, api: FakeApi) -> None:
    api.on("GET", "vms", listing(a_vm()))
    cli.environ["NOVACRON_OUTPUT"] = "name"

    assert cli.run("vm", "ls") == 0
    assert cli.stdout == "web-1\n"

    cli.environ["NOVACRON_OUTPUT"] = "xml"
    assert cli.run("vm", "ls") == 2


def test_api_sends_what_was_typed(cli: Cli, api: FakeApi) -> None:
    api.on("POST", "vms/web-1/actions/start", {"id": "op-1"})
    api.on_raw("GET", "/healthz", Reply(b"ok", headers={"Content-Type": "text/plain"}))

    assert cli.run("api", "post", "vms/web-1/actions/start", '{"a": 1}') == 0
    assert json.loads(cli.stdout) == {"id": "op-1"}
    assert api.requests[-1].json() == {"a": 1}
    assert cli.run("api", "GET", "/healthz") == 0
    assert cli.stdout == "ok"


def test_version_needs_no_api(cli: Cli) -> None:
    cli.environ = {"HOME": cli.environ["HOME"]}

    assert cli.run("version") == 0
    assert cli.stdout.startswith("novacron ")
