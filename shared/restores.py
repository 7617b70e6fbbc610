"""What records say after a restore of etcd: whose word is still missing about what runs where.

``shared/model.py`` puts these into the records; docs/decisions/0016-backup-and-restore.md says why.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct


class Restored(Struct, frozen=True, kw_only=True, gc=False):
    """The last restore of etcd, and of when its backup is.

    ``recovering``: until every node has told what it has, nothing is started, bound or moved.
    """

    backup_at: datetime
    at: datetime
    recovering: bool = True


class Unproven(Struct, frozen=True, kw_only=True, gc=False):
    """A VM of which only a backup says where it is: nothing happens to it until nodes have told.

    ``nodes`` may have it, as far as is known. ``why`` it stays so although all of them were asked.
    """

    nodes: tuple[str, ...] = ()
    why: str = ""


class NodeRecovery(Struct, frozen=True, kw_only=True, gc=False):
    """``told``: the last epoch in which the node has told all that it has.

    ``gone``: an operator has said in this epoch that nothing runs there. ``unrecorded`` are the ids
    of VMs that it has a domain of, and that no record is of: made after the backup.
    """

    told: int = 0
    gone: bool = False
    unrecorded: tuple[str, ...] = ()
