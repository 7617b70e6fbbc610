"""The relay processes of a node's migrations, as its agent's directory and the kernel show them."""

from __future__ import annotations

from pathlib import Path

from agent.relay_files import dial_file, holder, used_file
from tests.lab.layout import NODE_STATE_DIR
from tests.lab.nodes import LightNode
from tests.lab.processes import ProcessKey, is_alive

DIRECTORY = NODE_STATE_DIR / "relay"
# How a relay process is told from its agent: the module that its command line imports.
_MODULES = (b"agent.relay_dial", b"agent.relay_serve")
# A mark that a token was used stays for an hour.
_STAYS = ".used"


def source_pid(node: LightNode, name: str) -> int | None:
    """Return the process that a migration's source libvirtd is connected to."""
    return _living(dial_file(node.inside(DIRECTORY), name))


def destination_pid(node: LightNode, name: str) -> int | None:
    """Return the process that is connected to a migration's destination libvirtd."""
    return _living(used_file(node.inside(DIRECTORY), name))


def leftovers(node: LightNode) -> list[str]:
    """Return what a node without any migration should not have."""
    files = [p.name for p in node.inside(DIRECTORY).iterdir() if p.suffix != _STAYS]
    relays = [key.pid for key in node.processes() if _is_relay(key.pid)]
    return [
        *(f"{node.name}: relay file {name}" for name in sorted(files)),
        *(f"{node.name}: relay process {pid}" for pid in relays),
    ]


def _living(path: Path) -> int | None:
    # The boot that the file names, too, is the node's own, which only its processes see.
    found = holder(path)
    living = found is not None and is_alive(ProcessKey(found.pid, found.started))
    return found.pid if found is not None and living else None


def _is_relay(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(module in words for module in _MODULES)
