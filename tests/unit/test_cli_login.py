"""novacron init and login: from nothing to a stored context."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from controlplane.cli.context import load_config, parse_endpoint
from controlplane.cli.errors import CliError
from tests.unit.cli_fake_api import Cli, FakeApi, a_vm, listing, problem
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

CLUSTER = {"id": "cluster-1", "cell": "k3f9q2"}


@pytest.fixture
def fresh(cli: Cli) -> Cli:
    """A user who has not logged in."""
    cli.environ = {"HOME": cli.environ["HOME"]}
    return cli


def login(cli: Cli, *more: str) -> int:
    files = cli.files
    paths = ("--ca", str(files.ca_file), "--token-file", str(files.token_file))
    return cli.run("login", "--endpoint", cli.api.url, *paths, *more)


def config_file(cli: Cli) -> Path:
    return Path(cli.environ["HOME"]) / ".config" / "novacron" / "config.toml"


def test_login_is_checked_and_remembered(fresh: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", CLUSTER)
    api.on("GET", "vms", listing(a_vm()))

    assert login(fresh) == 0
    assert "k3f9q2" in fresh.stdout
    assert fresh.run("vm", "ls", "-o", "name") == 0
    assert fresh.stdout == "web-1\n"

    token = fresh.files.token_file.read_text().strip()
    assert api.requests[-1].headers["authorization"] == f"Bearer {token}"
    assert stat.S_IMODE(config_file(fresh).stat().st_mode) == 0o600
    assert token not in fresh.stdout + fresh.stderr


def test_a_refused_token_is_not_remembered(fresh: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", problem(401, "unauthenticated"))

    assert login(fresh) == 5
    assert not config_file(fresh).exists()


def test_contexts_stand_beside_each_other(fresh: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", CLUSTER)
    api.on("GET", "vms", listing(a_vm()))
    assert login(fresh, "--name", "east") == 0
    assert login(fresh, "--name", "west") == 0

    assert load_config(config_file(fresh)).current == "west"
    assert fresh.run("--context", "east", "vm", "ls") == 0
    assert fresh.run("--context", "north", "vm", "ls") == 5
    assert "east, west" in fresh.stderr


def test_the_environment_wins_over_the_file(fresh: Cli, api: FakeApi) -> None:
    api.on("GET", "cluster", CLUSTER)
    api.on("GET", "vms", listing())
    assert login(fresh) == 0
    fresh.environ["NOVACRON_TOKEN"] = "nck_other_token"

    assert fresh.run("vm", "ls") == 0

    assert api.requests[-1].headers["authorization"] == "Bearer nck_other_token"


def test_a_token_of_the_environment_cannot_add_headers(cli: Cli, api: FakeApi) -> None:
    cli.environ["NOVACRON_TOKEN"] = "a\r\nX-Other: b"

    assert cli.run("vm", "ls") == 1
    assert api.requests == []
    assert "X-Other" not in cli.stderr


def test_without_a_login_the_next_step_is_told(fresh: Cli) -> None:
    assert fresh.run("vm", "ls") == 5
    assert "novacron login --endpoint" in fresh.stderr


@pytest.mark.parametrize("content", ["not toml", "unknown = 1", "[contexts.a]\nport = 1"])
def test_a_broken_file_is_told_and_kept(fresh: Cli, api: FakeApi, content: str) -> None:
    api.on("GET", "cluster", CLUSTER)
    config_file(fresh).parent.mkdir(parents=True)
    config_file(fresh).write_text(content)

    assert fresh.run("vm", "ls") == 1
    assert login(fresh) == 1
    assert str(config_file(fresh)) in fresh.stderr
    assert config_file(fresh).read_text() == content


@pytest.mark.parametrize("token", ["", "two\nlines", "with space", "tökén", "x" * 2000])
def test_a_file_without_a_token_is_refused(fresh: Cli, tmp_path: Path, token: str) -> None:
    path = tmp_path / "token"
    path.write_text(token)

    code = fresh.run("login", "--endpoint", "https://127.0.0.1:1", "--token-file", str(path))

    assert code == 1
    assert not config_file(fresh).exists()


@pytest.mark.parametrize(
    "url", ["", "http://a", "https://", "ftp://a", "https://a:b", "https://a/x", "https://u@a"]
)
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(CliError):
        parse_endpoint(url)


@pytest.mark.parametrize(
    ("url", "whole"),
    [("https://a", "https://a:8443"), ("https://[::1]:9", "https://[::1]:9")],
)
def test_an_endpoint_has_a_port(url: str, whole: str) -> None:
    assert parse_endpoint(url).url == whole


def test_init_makes_a_cell_and_says_how_to_log_in(fresh: Cli, tmp_path: Path) -> None:
    root = tmp_path / "new"

    assert fresh.run("init", "--dir", str(root), "--replica", "r1=10.88.0.1") == 0
    assert "novacron login" in fresh.stderr
    assert str(root / "replicas" / "r1" / "controlplane.crt") in fresh.stdout.splitlines()

    assert fresh.run("init", "--dir", str(root), "--node", "n1=10.88.0.11") == 0
    node = root / "nodes" / "n1"
    printed = fresh.stdout.split()
    assert printed[:3] == [str(node / name) for name in ("agent.key", "agent.crt", "peers.crt")]
    assert sorted(printed[3:]) == sorted(str(path) for path in (node / "qemu").iterdir())


def test_a_dry_run_of_init_says_what_is_missing_and_makes_nothing(
    fresh: Cli, tmp_path: Path
) -> None:
    root = tmp_path / "new"
    words = ("init", "--dir", str(root), "--replica", "r1=10.88.0.1", "--member", "r1=10.88.0.1")

    assert fresh.run(*words, "--dry-run") == 0
    told = fresh.stdout.splitlines()
    assert not root.exists()
    assert fresh.run(*words) == 0
    assert sorted(fresh.stdout.splitlines()) == sorted(told)
    assert fresh.run(*words, "--dry-run") == 0
    assert fresh.stdout == ""


@pytest.mark.parametrize(
    "argument",
    [
        "../up=10.0.0.1",
        "a/b=10.0.0.1",
        "N1=10.0.0.1",
        "n1=not a host",
        "n1=",
        "n1",
        "n1\n=10.0.0.1",
    ],
)
def test_init_refuses_names_that_are_none(fresh: Cli, tmp_path: Path, argument: str) -> None:
    root = tmp_path / "new"

    assert fresh.run("init", "--dir", str(root), "--node", argument) == 2
    assert not root.exists()


def test_init_refuses_one_name_for_two(fresh: Cli, tmp_path: Path) -> None:
    pair = ("--node", "n1=10.0.0.1", "--node", "n1=10.0.0.2")

    assert fresh.run("init", "--dir", str(tmp_path / "new"), *pair) == 2
    assert "twice" in fresh.stderr
