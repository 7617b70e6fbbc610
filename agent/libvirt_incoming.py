"""Which domains ended before they ever ran here: those that came from another node, and fell.

libvirt makes an incoming domain one that stays before it lets the guest go on. One whose QEMU ends
between the two looks like any guest that has ended, and only the events of that moment tell them
apart. They come in order, but on another connection than answers do. What was told before a
connection was lost is not known: then such a domain counts as one that has run.
"""

from __future__ import annotations

import libvirt

from shared.moves import EndState

_ENDED = frozenset({libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_CRASHED})
_RAN_OR_GONE = frozenset(
    {
        libvirt.VIR_DOMAIN_EVENT_STARTED,
        libvirt.VIR_DOMAIN_EVENT_RESUMED,
        libvirt.VIR_DOMAIN_EVENT_UNDEFINED,
    }
)


class IncomingDomains:
    """Follows libvirt's lifecycle events; holds one entry for each domain that came and never ran.

    An entry goes with the domain's definition, or with ``gone``.
    """

    def __init__(self) -> None:
        self._has_ended: dict[str, bool] = {}

    def told(self, name: str, event: int, detail: int) -> None:
        started = event == libvirt.VIR_DOMAIN_EVENT_STARTED
        if started and detail == libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED:
            self._has_ended[name] = False
        elif event in _RAN_OR_GONE:
            self._has_ended.pop(name, None)
        elif event in _ENDED and name in self._has_ended:
            self._has_ended[name] = True

    def gone(self, name: str) -> None:
        """Take note that there is no such domain."""
        self._has_ended.pop(name, None)

    def forget(self) -> None:
        """Take note that events were lost."""
        self._has_ended.clear()

    def judged(self, name: str, end: EndState) -> EndState:
        """Return what an end is that looks like ``end``: UNKNOWN while its event is on its way."""
        if end is not EndState.DOWN or name not in self._has_ended:
            return end
        return EndState.NEVER_RAN if self._has_ended[name] else EndState.UNKNOWN
