"""`novacron cluster backup`: whole and checked in its place, or nothing is there."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.cli.cluster_backup import write_backup
from controlplane.cli.errors import CliError
from tests.unit.cli_fake_api import Cli, FakeApi, Reply, make_cell, problem, served
from tests.unit.test_backup_format import a_file

OF_BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    files = make_cell(tmp_path / "cell")
    place = files.root / "replicas" / "r1"
    with served(FakeApi(), place / "controlplane.crt", place / "controlplane.key") as made:
        yield made


@pytest.fixture
def cli(api: FakeApi, tmp_path: Path) -> Cli:
    return Cli(api, make_cell(tmp_path / "cell"), tmp_path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "today.backup"


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_backup_is_written_for_its_owner_only(cli: Cli, api: FakeApi, target: Path) -> None:
    api.on("GET", "cluster/backup", Reply(a_file(), headers=OF_BYTES))
    assert cli.run("cluster", "backup", str(target)) == 0
    assert target.read_bytes() == a_file()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert beside(target) == [target.name]
    assert cli.stdout == f"{target}\n"
    assert "2 keys of etcd, 3 entries of history" in cli.stderr
    assert "not in it: the CA's keys" in cli.stderr


def test_a_file_that_is_there_stays_unless_forced(cli: Cli, api: FakeApi, target: Path) -> None:
    api.on("GET", "cluster/backup", Reply(a_file(), headers=OF_BYTES))
    target.write_bytes(b"yesterday")
    assert cli.run("cluster", "backup", str(target)) == 1
    assert "is there already" in cli.stderr
    assert api.requests == []
    assert target.read_bytes() == b"yesterday"
    assert cli.run("cluster", "backup", "--force", str(target)) == 0
    assert target.read_bytes() == a_file()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "sent", [a_file()[:-1], b"", b"{}", a_file() + b"x", a_file().replace(b"mark", b"mork")]
)
def test_what_is_not_whole_leaves_nothing_behind(
    cli: Cli, api: FakeApi, target: Path, sent: bytes
) -> None:
    api.on("GET", "cluster/backup", Reply(sent, headers=OF_BYTES))
    assert cli.run("cluster", "backup", str(target)) == 1
    assert "no whole backup" in cli.stderr
    assert beside(target) == []
    target.write_bytes(b"yesterday")
    assert cli.run("cluster", "backup", "--force", str(target)) == 1
    assert target.read_bytes() == b"yesterday"
    assert beside(target) == [target.name]


def test_a_connection_that_breaks_leaves_nothing_behind(
    cli: Cli, api: FakeApi, target: Path
) -> None:
    api.on("GET", "cluster/backup", Reply(b"", cut=True))
    assert cli.run("cluster", "backup", str(target)) == 8
    api.on("GET", "cluster/backup", problem(403, "forbidden"))
    assert cli.run("cluster", "backup", str(target)) == 5
    api.on("GET", "cluster/backup", Reply({"items": []}))
    assert cli.run("cluster", "backup", str(target)) == 1
    assert beside(target) == []


def test_a_place_that_is_taken_meanwhile_stays_taken(target: Path) -> None:
    def pieces() -> Iterator[bytes]:
        target.write_bytes(b"another's")
        yield a_file()

    with pytest.raises(CliError, match="is there already"):
        write_backup(target, pieces(), force=False)
    assert target.read_bytes() == b"another's"
    assert beside(target) == [target.name]


def test_a_directory_that_is_not_there_is_told(cli: Cli, api: FakeApi, tmp_path: Path) -> None:
    api.on("GET", "cluster/backup", Reply(a_file(), headers=OF_BYTES))
    assert cli.run("cluster", "backup", str(tmp_path / "nowhere" / "file")) == 1
    assert "No such file or directory" in cli.stderr
