"""The command line of both daemons: run, or say what is wrong with a configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.__main__ import main as agent_main
from controlplane.__main__ import main as controlplane_main
from shared.version import VERSION

AGENT = """\
node_name = "n1"
address = "10.88.0.11"
controlplane = ["10.88.0.1:8444"]
[tls]
ca = "/ca"
certificate = "/certificate"
key = "/key"
"""
CONTROLPLANE = """\
name = "r1"
[api]
advertise = "https://10.88.0.1:8443"
[agents]
advertise = "10.88.0.1:8444"
[tls]
ca = "/ca"
certificate = "/certificate"
key = "/key"
[etcd]
endpoints = ["10.88.0.1:2379"]
[bootstrap]
cluster_file = "/cluster.json"
admin_key_file = "/admin-key.json"
"""
# Runs `config check` of a daemon on a file with this text.
Check = Callable[[Callable[[], None], str], None]
DAEMONS = [(agent_main, AGENT), (controlplane_main, CONTROLPLANE)]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    def run(main: Callable[[], None], text: str) -> None:
        file = tmp_path / "some.toml"
        file.write_text(text)
        monkeypatch.setattr(sys, "argv", ["novacron", "config", "check", str(file)])
        main()

    return run


@pytest.mark.parametrize(("main", "text"), DAEMONS)
def test_a_valid_configuration_is_called_so(
    check: Check,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], None],
    text: str,
) -> None:
    check(main, text)
    assert capsys.readouterr().out.endswith("some.toml: valid\n")


@pytest.mark.parametrize(("main", "text"), DAEMONS)
def test_every_fault_is_told_and_nothing_runs(
    check: Check,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], None],
    text: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        check(main, f'log_leven = "info"\n{text}typo = 1\n')
    said = str(ended.value)
    assert "/log_leven" in said
    assert "/typo" in said
    assert capsys.readouterr().out == ""


def test_a_fault_across_fields_is_told(check: Check) -> None:
    with pytest.raises(SystemExit, match="nfs: not among pools"):
        check(agent_main, f'{AGENT}[hypervisor]\nshared_pools = ["nfs"]\n')


@pytest.mark.parametrize("main", [agent_main, controlplane_main])
def test_the_version_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[[], None]
) -> None:
    monkeypatch.setattr(sys, "argv", ["novacron", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith(f" {VERSION}\n")
