"""Who has this machine: it is claimed for one lab at a time, and cleared of any."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab import layout, leftovers, signals
from tests.lab.capabilities import keep_capabilities
from tests.lab.layout import LabError
from tests.lab.link import SupervisorLink

Say = Callable[[str], None]


def claim(link: SupervisorLink, say: Say) -> None:
    """Take the lab's directory and start the supervisor; only one lab can.

    What a lab left that died with all its processes, as when the machine went down, is removed.
    Raises LabError while anything of another lab lives.
    """
    with signals.held(), leftovers.alone():
        found = leftovers.find()
        if leftovers.processes():
            listed = "".join(f"\n  {line}" for line in found)
            raise LabError(
                "a lab runs, or its supervisor was killed; `./dev lab down` removes it:" + listed
            )
        if found:
            say(f"a lab that died left this, it is removed: {', '.join(found)}")
            leftovers.remove()
        layout.STATE_DIR.mkdir(mode=0o755)
        layout.STATE_DIR.chmod(0o755)
        try:
            link.launch()
        except BaseException:
            link.shut_down()
            leftovers.remove()
            raise


def clear(link: SupervisorLink | None = None) -> None:
    """End and remove any lab, whether it runs or was killed; signals do not stop this."""
    with signals.held():
        keep_capabilities()
        (link or SupervisorLink()).shut_down()
        leftovers.clear()
