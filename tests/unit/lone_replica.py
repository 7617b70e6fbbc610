"""A replica without peers, for tests of what does not need any."""

from __future__ import annotations

from controlplane.sessions.peer_messages import PeerAnswer, PeerRequest
from controlplane.sessions.peer_reads import PeerReads
from controlplane.telemetry.windows import Windows
from shared.errors import Disconnected


async def nobody_answers(address: str, request: PeerRequest, limit_s: float) -> PeerAnswer:
    raise Disconnected(f"there is no replica at {address}")


def own_reads(windows: Windows) -> PeerReads:
    """Return what reads this replica's own figures only."""
    return PeerReads(windows, lambda: (), nobody_answers)


NO_PEERS = own_reads(Windows())
