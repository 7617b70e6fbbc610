"""What of a VM can be changed in place: labels, and what only later decisions read.

A patch is a JSON merge patch (RFC 7396), typed: a field that is not there stays, null puts its
default back, objects are merged, all else is replaced. Nothing here may touch a running guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from msgspec import NODEFAULT, UNSET, Meta, Struct, UnsetType
from msgspec.structs import fields, replace

from controlplane.commands.draft import Author, Draft
from controlplane.commands.operations import put_vm
from controlplane.commands.upgrade import check_spec
from shared.errors import FieldError, StateConflict, ValidationFailed
from shared.model import GroupRule, LabelValue, MigrationPolicy, Name, PlacementSpec, Vm

LABELS_MAX = 32
LabelChanges = dict[Name, LabelValue | None]
Rules = Annotated[tuple[GroupRule, ...], Meta(max_length=8)]

S = TypeVar("S", bound=Struct)


class PlacementPatch(Struct, frozen=True, kw_only=True):
    node_labels: LabelChanges | UnsetType | None = UNSET
    affinity: Rules | UnsetType | None = UNSET
    anti_affinity: Rules | UnsetType | None = UNSET


class HaPatch(Struct, frozen=True, kw_only=True):
    restart: bool | UnsetType | None = UNSET
    priority: Annotated[int, Meta(ge=0, le=1000)] | UnsetType | None = UNSET


class MigrationPatch(Struct, frozen=True, kw_only=True):
    policy: MigrationPolicy | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET
    max_downtime_ms: Annotated[int, Meta(ge=50, le=10_000)] | UnsetType | None = UNSET


class SpecPatch(Struct, frozen=True, kw_only=True):
    placement: PlacementPatch | UnsetType | None = UNSET
    ha: HaPatch | UnsetType | None = UNSET
    migration: MigrationPatch | UnsetType | None = UNSET


class VmPatch(Struct, frozen=True, kw_only=True):
    """What is to be different; a label whose value is null goes."""

    labels: LabelChanges | UnsetType | None = UNSET
    spec: SpecPatch | UnsetType = UNSET


class ChangeVm(Struct, frozen=True, kw_only=True, tag="change_vm"):
    """Changes a VM in place and returns its id; writes nothing where nothing is different.

    Raises NotFound, UpgradeUnfinished, ValidationFailed; StateConflict while it is being deleted,
    and for migration settings while it is migrated: both nodes go by them.
    """

    vm_id: str
    patch: VmPatch
    by: Author

    def decide(self, draft: Draft) -> str:
        vm = draft.vm(self.vm_id)
        if vm.deleting:
            raise StateConflict(f"{vm.name!r} is being deleted")
        changed = merged(vm, self.patch)
        faults = (*_too_many(changed), *repeated_groups(changed.spec.placement))
        if faults:
            raise ValidationFailed(faults)
        if changed == vm:
            return vm.id
        claim = vm.status.migration
        if claim is not None and changed.spec.migration != vm.spec.migration:
            raise StateConflict(
                f"the migration settings of {vm.name!r} cannot be changed while {claim.operation} "
                f"migrates it: wait for that, or cancel it (novacron op cancel {claim.operation})"
            )
        check_spec(draft, changed.spec)
        draft.audit("vm.change", vm.id, self.by, vm.tenant)
        draft.event("vm.changed", vm.id, self.by, tenant=vm.tenant, changed=_parts(vm, changed))
        put_vm(draft, changed)
        return vm.id


def merged(current: S, patch: Struct) -> S:
    """Return ``current`` with a patch merged into it; the patch has no field that it lacks."""
    defaults = {field.name: field for field in fields(current)}
    changes: dict[str, Any] = {}
    for name in patch.__struct_fields__:
        wanted, there = getattr(patch, name), getattr(current, name)
        if wanted is UNSET:
            continue
        if wanted is None:
            field = defaults[name]
            made = field.default_factory is not NODEFAULT
            changes[name] = field.default_factory() if made else field.default
        elif isinstance(wanted, dict):
            values = {**there, **wanted}
            changes[name] = {key: value for key, value in values.items() if value is not None}
        elif isinstance(wanted, Struct):
            changes[name] = merged(there, wanted)
        else:
            changes[name] = wanted
    return replace(current, **changes)


def repeated_groups(placement: PlacementSpec) -> Iterator[FieldError]:
    """Name a group once only: a second rule could but repeat the first or contradict it."""
    seen: set[str] = set()
    for kind in ("affinity", "anti_affinity"):
        for position, rule in enumerate(getattr(placement, kind)):
            if rule.group in seen:
                pointer = f"/spec/placement/{kind}/{position}/group"
                yield FieldError(pointer, "duplicate", f"{rule.group!r} has a rule already")
            seen.add(rule.group)


def _too_many(vm: Vm) -> Iterator[FieldError]:
    """Say where a merge has made more of what each request alone could not have too many of."""
    found = (("/labels", vm.labels), ("/spec/placement/node_labels", vm.spec.placement.node_labels))
    for pointer, labels in found:
        if len(labels) > LABELS_MAX:
            yield FieldError(pointer, "too_long", f"must have at most {LABELS_MAX} entries")


def _parts(before: Vm, after: Vm) -> list[str]:
    parts = [] if before.labels == after.labels else ["labels"]
    for name in SpecPatch.__struct_fields__:
        if getattr(before.spec, name) != getattr(after.spec, name):
            parts.append(f"spec.{name}")
    return parts
