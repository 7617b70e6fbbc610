"""What the lab writes down: its parts (``state.json``) and its processes (``pids.json``).

``state.json`` is what ``./dev lab status --json`` prints, with the pids of the moment; its names
are relied on by others. The supervisor alone writes ``pids.json``; the lab alone ``state.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from tests.lab.layout import STATE_DIR
from tests.lab.processes import ProcessKey, is_alive

STATE_FILE = STATE_DIR / "state.json"
PIDS_FILE = STATE_DIR / "pids.json"
# The name under which the supervisor records itself.
SUPERVISOR = "supervisor"


class ProgramPid(Struct, frozen=True, kw_only=True):
    """A program of the lab and the process that runs it."""

    name: str
    key: ProcessKey
    restarts: int = 0


class ReplicaState(Struct, frozen=True, kw_only=True):
    name: str
    url: str
    pid: int | None = None


class MemberState(Struct, frozen=True, kw_only=True):
    name: str
    endpoint: str
    pid: int | None = None


class NodeState(Struct, frozen=True, kw_only=True):
    """``id`` is None until the control plane has registered the node."""

    name: str
    id: str | None = None
    address: str
    libvirt_uri: str
    agent_pid: int | None = None
    libvirtd_pid: int | None = None


class LabState(Struct, frozen=True, kw_only=True):
    """``api`` URLs, paths of ``ca`` and ``token``, ``etcd`` endpoints; pids are None when down.

    ``members`` are who is at these endpoints.
    """

    api: tuple[str, ...] = ()
    ca: str = ""
    token: str = ""
    etcd: tuple[str, ...] = ()
    members: tuple[MemberState, ...] = ()
    replicas: tuple[ReplicaState, ...] = ()
    nodes: tuple[NodeState, ...] = ()


def write(path: Path, record: Struct | tuple[Struct, ...]) -> None:
    """Replace a file at once, so that a reader never sees half of it."""
    written = path.with_suffix(".new")
    written.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
    written.rename(path)


def read_state() -> LabState | None:
    """Return the lab's state with the pids of the moment; None when no lab was built."""
    try:
        state = msgspec.json.decode(STATE_FILE.read_bytes(), type=LabState)
    except FileNotFoundError:
        return None
    return with_pids(state, read_pids())


def read_pids() -> tuple[ProgramPid, ...]:
    """Return what the supervisor recorded last; empty when there is no record."""
    try:
        return msgspec.json.decode(PIDS_FILE.read_bytes(), type=tuple[ProgramPid, ...])
    except FileNotFoundError:
        return ()


def with_pids(state: LabState, programs: tuple[ProgramPid, ...]) -> LabState:
    """Return the state with the pid of every part that lives."""
    living = {p.name: p.key.pid for p in programs if is_alive(p.key)}
    replace = msgspec.structs.replace
    return replace(
        state,
        members=tuple(replace(m, pid=living.get(m.name)) for m in state.members),
        replicas=tuple(replace(r, pid=living.get(r.name)) for r in state.replicas),
        nodes=tuple(
            replace(
                n,
                agent_pid=living.get(agent_program(n.name)),
                libvirtd_pid=living.get(libvirtd_program(n.name)),
            )
            for n in state.nodes
        ),
    )


def login_lines(found: LabState) -> list[str]:
    """Return shell lines after which the `novacron` command talks to this lab."""
    return [
        f"export NOVACRON_ENDPOINT={','.join(found.api)} NOVACRON_CA={found.ca}",
        f'export NOVACRON_TOKEN="$(cat {found.token})"',
        f"export PATH={Path(sys.executable).parent}:$PATH",
    ]


def agent_program(node: str) -> str:
    return f"{node}.agent"


def libvirtd_program(node: str) -> str:
    return f"{node}.libvirtd"


def virtlockd_program(node: str) -> str:
    return f"{node}.virtlockd"


def anchor_program(node: str) -> str:
    return f"{node}.anchor"
