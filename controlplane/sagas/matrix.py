"""What has become of a migration, from both of its ends: a table, and nothing but a table.

The outcome is never read from a return code: a call that succeeded may have lost the guest, and one
that failed may have moved it. ``UNKNOWN`` also stands for an end that cannot be asked. A node that
has booted since is one without a domain. Measured for libvirt 9.0 in every row that can occur.
"""

from __future__ import annotations

import enum

from shared.moves import EndState


class Verdict(enum.Enum):
    """WAIT: cannot be told yet. SWITCHED: the destination has the guest, for good. STAYED: the
    source has it. LOST: neither has; the guest ended by itself while it was moved.
    """

    WAIT = "wait"
    SWITCHED = "switched"
    STAYED = "stayed"
    LOST = "lost"


_E, _V = EndState, Verdict
DESTINATION_ENDS = (
    _E.ABSENT,
    _E.INCOMING,
    _E.NEVER_RAN,
    _E.READY,
    _E.RUNNING,
    _E.DOWN,
    _E.UNKNOWN,
)
# A destination that runs, or that has a definition and ran, owns the guest whatever the source
# says: its disks have been written to since. "Both run" is the split that libvirt 9.0 makes of a
# relay that dies too early; the older generation is the one to end.
_ROWS: dict[EndState, tuple[Verdict, ...]] = {
    _E.MOVING: (_V.WAIT, _V.WAIT, _V.WAIT, _V.WAIT, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
    _E.RUNNING: (_V.STAYED, _V.STAYED, _V.STAYED, _V.STAYED, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
    _E.HELD: (_V.STAYED, _V.STAYED, _V.STAYED, _V.STAYED, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
    _E.AWAY: (_V.STAYED, _V.STAYED, _V.STAYED, _V.STAYED, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
    # Without a source, what is incoming will either come to run or be ended by its libvirtd. All of
    # one that fell right then has arrived: its disks are there.
    _E.DOWN: (_V.LOST, _V.WAIT, _V.SWITCHED, _V.SWITCHED, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
    _E.ABSENT: (_V.LOST, _V.WAIT, _V.SWITCHED, _V.SWITCHED, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
    _E.UNKNOWN: (_V.WAIT, _V.WAIT, _V.WAIT, _V.WAIT, _V.SWITCHED, _V.SWITCHED, _V.WAIT),
}
VERDICTS: dict[tuple[EndState, EndState], Verdict] = {
    (source, destination): verdict
    for source, row in _ROWS.items()
    for destination, verdict in zip(DESTINATION_ENDS, row, strict=True)
}


def verdict(source: EndState, destination: EndState) -> Verdict:
    """Return what the two ends say together; total: what cannot be is waited out."""
    return VERDICTS.get((source, destination), Verdict.WAIT)
