"""The commands that clients' requests become: what one replica may hand to another to commit.

A command that is not listed here never leaves its process. The tag is its name on the wire.
"""

from __future__ import annotations

from controlplane.commands.admission import (
    ApproveNode,
    Enrol,
    MakeJoinToken,
    RenewCertificate,
    RevokeNode,
    WithdrawJoinToken,
)
from controlplane.commands.cluster import RecordStoreRepair, StepDown
from controlplane.commands.drains import RequestDrain
from controlplane.commands.migrations import RequestMigration
from controlplane.commands.newest import ProveNewest
from controlplane.commands.nodes import RemoveNode, SetCordon
from controlplane.commands.recovery import DeclareGone
from controlplane.commands.sagas import CancelOperation
from controlplane.commands.upgrade import FinalizeUpgrade
from controlplane.commands.vm_patch import ChangeVm
from controlplane.commands.vms import ActOnVm, CreateVm, DeleteVm

Forwardable = (
    CreateVm
    | ActOnVm
    | DeleteVm
    | ChangeVm
    | RequestMigration
    | RequestDrain
    | SetCordon
    | RemoveNode
    | DeclareGone
    | CancelOperation
    | FinalizeUpgrade
    | StepDown
    | RecordStoreRepair
    | ProveNewest
    | MakeJoinToken
    | WithdrawJoinToken
    | Enrol
    | ApproveNode
    | RevokeNode
    | RenewCertificate
)
