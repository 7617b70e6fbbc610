"""The command that changes nothing: it finds out what the newest memory is."""

from __future__ import annotations

from msgspec import Struct

from controlplane.commands.draft import Draft


class ProveNewest(Struct, frozen=True, kw_only=True, tag="prove_newest"):
    """Once this is submitted, the replica has in memory all that anybody was told of before.

    The leader answers it only while its lease is young, and a follower once it has seen as much.
    """

    def decide(self, draft: Draft) -> str:
        return ""
