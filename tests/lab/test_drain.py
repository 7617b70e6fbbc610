"""`novacron node drain` on real nodes: interrupted, through a dead control plane, and cancelled.

Six guests with disks of every kind are on one of three nodes; the command is the one that people
type, in a process of its own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.lab.cluster import LabPlan
from tests.lab.layout import REPOSITORY
from tests.lab.link import wait_until
from tests.lab.migration_cell import MigrationCell, Spoilt, complaints, speaking_vm
from tests.lab.pulses import PulseWitness
from tests.lab.strikes import REPLICA

pytestmark = pytest.mark.lab

FIRST, *OTHERS = ("n1", "n2", "n3")
KINDS = {"bare": "", "local": "default", "shared": "shared"}
VMS = {f"{kind}-{n}": pool for n in (1, 2) for kind, pool in KINDS.items()}
COMMAND_LIMIT_S = 180.0
INTERRUPTED = 130
WAIT_AGAIN = re.compile(r"^ *wait again: novacron op wait (op-\w+)$", re.MULTILINE)
UNDO = re.compile(r"^ *undo it: *novacron op cancel (op-\w+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MigrationCell]:
    scratch = tmp_path_factory.mktemp("cell")
    with MigrationCell(scratch, LabPlan(nodes=3)) as cell:
        _novacron(cell, "node", "cordon", *OTHERS)
        cell.create(*(speaking_vm(name, pool=pool) for name, pool in VMS.items()))
        _novacron(cell, "node", "uncordon", *OTHERS)
        yield cell


def test_a_drain_goes_on_without_its_terminal_and_its_leader(cell: MigrationCell) -> None:
    with cell.witness() as witness:
        since = witness.now()
        said = _interrupted_drain(cell, FIRST)
        cell.trial.killed_and_back(REPLICA)
        operation = _named(WAIT_AGAIN, said)
        assert operation in _novacron(cell, "op", "wait", operation)
        assert cell.trial.api.operation(operation).state == "succeeded"
        _rest_and_judge(cell, witness, since)
    node = cell.trial.node_view(FIRST)
    assert node.cordoned
    assert node.allocated.vms == 0
    assert FIRST not in {vm.status.where for vm in cell.trial.vms().values()}
    _novacron(cell, "node", "uncordon", FIRST)
    assert not cell.trial.node_view(FIRST).cordoned


def test_a_cancelled_drain_leaves_its_node_open(cell: MigrationCell) -> None:
    where = [vm.status.where for vm in cell.trial.vms().values()]
    fullest = max(set(where), key=where.count)
    with cell.witness() as witness:
        since = witness.now()
        said = _interrupted_drain(cell, fullest)
        operation = _named(UNDO, said)
        _novacron(cell, "op", "cancel", operation)
        assert cell.trial.api.operation(operation).state == "cancelled"
        _rest_and_judge(cell, witness, since)
    assert not cell.trial.node_view(fullest).cordoned
    left = [vm for vm in cell.trial.vms().values() if vm.status.where == fullest]
    assert left, "it had moved all of them before it was cancelled"


def _interrupted_drain(cell: MigrationCell, node: str) -> str:
    """Begin a drain, press Ctrl-C once a guest is on its way, and return what was said then."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So a shell starts what it runs in the background; who is started by it would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    drain = subprocess.Popen(
        _command("node", "drain", node),
        env=_environment(cell),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(
            lambda: any(o.kind == "vm.migrate" and not o.ended for o in cell.trial.operations()),
            "a guest to be on its way",
        )
        drain.send_signal(signal.SIGINT)
        said, _ = drain.communicate(timeout=COMMAND_LIMIT_S)
    finally:
        drain.kill()
        drain.wait()
    assert drain.returncode == INTERRUPTED, said
    return said


def _named(line: re.Pattern[str], said: str) -> str:
    """Return the operation that a command told how to come back to."""
    found = line.search(said)
    assert found is not None, said
    return found.group(1)


def _rest_and_judge(cell: MigrationCell, witness: PulseWitness, since: float) -> None:
    """Hold that every guest lives on, never ran twice, and that nothing is left over."""
    try:
        cell.rest(*VMS)
    except Spoilt as spoilt:
        print(f"\nQEMU spoilt a guest: {spoilt}")
    for vm in cell.trial.vms().values():
        seen = witness.account(vm.id)
        if said := seen.last_words(since):
            print(f"\nQEMU spoilt {vm.name}: {said[0]}")
        else:
            began = [pulse for pulse in seen.pulses if pulse.at < since]
            boots = len({pulse.boot for pulse in began})
            assert complaints(seen, boots, since) == [], vm.name


def _novacron(cell: MigrationCell, *words: str) -> str:
    done = subprocess.run(
        _command(*words),
        env=_environment(cell),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _command(*words: str) -> Sequence[str]:
    return (sys.executable, "-m", "controlplane.cli.main", *words)


def _environment(cell: MigrationCell) -> dict[str, str]:
    built = cell.lab.state()
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "NOVACRON_ENDPOINT": ",".join(built.api),
        "NOVACRON_CA": built.ca,
        "NOVACRON_TOKEN": Path(built.token).read_text().strip(),
    }
