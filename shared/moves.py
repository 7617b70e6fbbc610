"""What records say of VMs on the move: claims, stages, leftovers, and the journals of their sagas.

``shared/model.py`` puts them into the records; ``shared/states.py`` says what follows what.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct

from shared.open_enum import OpenEnum


class MigrationStage(OpenEnum):
    """What the two nodes of an open migration are to do; written before they are told.

    Each is pushed to source and destination until both have answered it.
    """

    REQUESTED = "requested"  # nothing is given out yet, and no node is told
    PREPARE = "prepare"  # the destination makes ready
    TRANSFER = "transfer"  # the source moves the guest, once
    ABORT = "abort"  # the source ends what it began, or never begins
    LOOK = "look"  # both tell what they have; nothing is done
    CLEAN = "clean"  # the destination leaves nothing
    RESUME = "resume"  # the destination is proven empty: the source's guest goes on
    FINALIZE = "finalize"  # the destination owns the VM: the source leaves nothing
    UNKNOWN = "unknown"


class EndState(OpenEnum):
    """What one end of a migration is, as its agent sees it: the reconcile matrix's rows.

    ``away``: paused by a migration that switched. ``held``: paused by the agent or a user.
    ``ready``: everything has arrived, and it waits to be resumed. ``never_ran``: it came here, and
    ended before it went on; its definition stays.
    """

    ABSENT = "absent"
    DOWN = "down"
    RUNNING = "running"
    MOVING = "moving"
    AWAY = "away"
    HELD = "held"
    INCOMING = "incoming"
    READY = "ready"
    NEVER_RAN = "never_ran"
    UNKNOWN = "unknown"


class MigrationClaim(Struct, frozen=True, kw_only=True, gc=False):
    """An open migration of a VM: while it is there, both nodes count as possible owners.

    ``generation`` is the destination's, in its boot ``boot_id``, 0 before it was given out.
    ``copied`` names the disks whose content moves along; the others are on shared storage.
    ``unclean``: nothing can come to the destination any more, which has not removed all yet.
    """

    operation: str
    stage: MigrationStage
    source: str
    source_generation: int
    destination: str | None = None
    generation: int = 0
    boot_id: str = ""
    copied: tuple[str, ...] = ()
    unclean: bool = False


class Leftover(Struct, frozen=True, kw_only=True, gc=False):
    """A node that may still hold a domain of an earlier generation, and the disks to delete there.

    While there is one, nothing of the VM is started anew anywhere: it might run there; unless it is
    ``empty``: no guest is or comes there, only files are left. ``arrival``: it was to come there.
    """

    node: str
    generation: int
    disks: tuple[str, ...] = ()
    empty: bool = False
    arrival: bool = False


class MigrationFigures(Struct, frozen=True, kw_only=True, gc=False):
    """What a migration took, as QEMU and libvirt count it."""

    total_ms: int = 0
    downtime_ms: int = 0
    transferred_bytes: int = 0


class MigrationJournal(Struct, frozen=True, kw_only=True, tag="migration", gc=False):
    """What a migration was asked for, and what it decided; nodes are ids."""

    source: str
    requested: str | None = None
    destination: str | None = None
    generation: int = 0
    figures: MigrationFigures | None = None


class VmLeft(Struct, frozen=True, kw_only=True, gc=False):
    """A VM that cannot leave, or leaves once something comes that may take long; and what."""

    vm: str
    name: str
    reason: str


class DrainTry(Struct, frozen=True, kw_only=True, gc=False):
    """The last migration that a drain has asked for to move one VM, and how many there were.

    ``code`` and ``detail`` are the problem it ended with: history keeps it for a while only.
    """

    vm: str
    operation: str
    count: int
    at: datetime
    ended_at: datetime | None = None
    code: str = ""
    detail: str = ""


class Unanswered(Struct, frozen=True, gc=False):
    """A node that a drain has asked in vain, since when."""

    node: str
    since: datetime


class DrainJournal(Struct, frozen=True, kw_only=True, tag="drain", gc=False):
    """``cordoned``: the drain found its node open and cordoned it. ``skip`` are VM ids.

    ``total`` is how many VMs the node held when the drain began. ``refused`` are VMs at rest that
    stay, because of what the node answered that was to take them; none is asked about twice.
    ``unanswered`` are nodes that have not answered yet.
    """

    reason: str = ""
    skip: tuple[str, ...] = ()
    cordoned: bool = False
    total: int = 0
    tries: tuple[DrainTry, ...] = ()
    left: tuple[VmLeft, ...] = ()
    refused: tuple[VmLeft, ...] = ()
    unanswered: tuple[Unanswered, ...] = ()
