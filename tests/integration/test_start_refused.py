"""What a replica does not start on: each fault is told, with its place, and nothing is touched."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.integration.replica_process import ROOT, ReplicaProcess, replica_command
from tests.integration.world import World

pytestmark = pytest.mark.etcd

Change = Callable[[dict[str, Any]], None]


def _wrong_fields(config: dict[str, Any]) -> None:
    del config["name"]
    config["colour"] = "green"
    config["api"]["listen"] = 8443
    config["election"] = {"lease_ttl_s": "long", "patience": 3}
    del config["etcd"]["endpoints"]


def _no_files(config: dict[str, Any]) -> None:
    config["tls"] = {each: f"/nonexistent/{each}" for each in ("ca", "certificate", "key")}


def _no_cell(config: dict[str, Any]) -> None:
    config["bootstrap"] = {
        "cluster_file": "/nonexistent/cluster.json",
        "admin_key_file": config["tls"]["ca"],
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            _wrong_fields,
            (
                "{file}",
                "/name: is required",
                "/colour: is not one of",
                "/api/listen: ",
                "/election/lease_ttl_s: ",
                "/election/patience: is not one of",
                "/etcd/endpoints: is required",
            ),
        ),
        (_no_files, ("/tls/ca: ", "/tls/certificate: ", "/tls/key: ", "/nonexistent/key")),
        (_no_cell, ("/nonexistent/cluster.json: ", "ca.crt: ")),
    ],
    ids=["fields", "TLS files", "bootstrap files"],
)
async def test_every_fault_of_a_configuration_is_told_at_once(
    shared_world: World, change: Change, told: tuple[str, ...]
) -> None:
    replica = shared_world.replica
    config = tomllib.loads(replica.config_file.read_text())
    config["data_dir"] = str(replica.directory / "unused")
    change(config)
    file = replica.directory / "changed.toml"
    file.write_text(tomli_w.dumps(config))
    ended = _run(file)
    assert ended.returncode not in (0, None)
    assert "Traceback" not in ended.stderr
    for text in told:
        assert text.format(file=file) in ended.stderr


async def test_text_that_is_no_toml_is_told(shared_world: World) -> None:
    file = shared_world.replica.directory / "text.toml"
    for text, told in (("name = ", "is not TOML"), (None, "cannot be read")):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        ended = _run(file)
        assert ended.returncode not in (0, None)
        assert str(file) in ended.stderr
        assert told in ended.stderr


async def test_a_second_process_on_the_same_data_does_not_start(shared_world: World) -> None:
    first: ReplicaProcess = shared_world.replica
    ended = _run(first.config_file)
    assert ended.returncode not in (0, None)
    assert "/data_dir: another process of this replica is running" in ended.stderr
    assert str(first.data_dir) in ended.stderr
    assert first.serves()


def _run(config_file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        replica_command(config_file),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        timeout=30,
        check=False,
    )
