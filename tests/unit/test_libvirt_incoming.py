"""Which domains never ran here, from the order of libvirt's events."""

from __future__ import annotations

import libvirt
import pytest

from agent.libvirt_incoming import IncomingDomains
from shared.moves import EndState

NAME = "vm-1"
CAME = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED)
BOOTED = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED)
STAYS = (libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_DEFINED_ADDED)
PAUSED = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED)
RAN = (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED)
ENDED = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED)
FORGOTTEN = (libvirt.VIR_DOMAIN_EVENT_UNDEFINED, libvirt.VIR_DOMAIN_EVENT_UNDEFINED_REMOVED)


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ([], EndState.DOWN),
        ([ENDED], EndState.DOWN),
        ([CAME, STAYS, PAUSED, ENDED], EndState.NEVER_RAN),
        ([CAME, STAYS], EndState.UNKNOWN),
        ([CAME, STAYS, RAN], EndState.DOWN),
        ([CAME, STAYS, RAN, ENDED], EndState.DOWN),
        ([CAME, STAYS, ENDED, BOOTED], EndState.DOWN),
        ([CAME, STAYS, ENDED, BOOTED, ENDED], EndState.DOWN),
        ([CAME, STAYS, ENDED, FORGOTTEN], EndState.DOWN),
        ([CAME, RAN, ENDED, CAME, ENDED], EndState.NEVER_RAN),
    ],
)
def test_only_what_came_and_ended_never_ran(events: list[tuple[int, int]], end: EndState) -> None:
    domains = IncomingDomains()
    for event, detail in events:
        domains.told(NAME, event, detail)

    assert domains.judged(NAME, EndState.DOWN) is end
    assert domains.judged("vm-2", EndState.DOWN) is EndState.DOWN


@pytest.mark.parametrize("end", set(EndState) - {EndState.DOWN})
def test_nothing_else_is_judged(end: EndState) -> None:
    domains = IncomingDomains()
    domains.told(NAME, *CAME)

    assert domains.judged(NAME, end) is end


def test_what_was_told_before_events_were_lost_does_not_count() -> None:
    domains = IncomingDomains()
    for told in (CAME, ENDED):
        domains.told(NAME, *told)
    domains.forget()

    assert domains.judged(NAME, EndState.DOWN) is EndState.DOWN
