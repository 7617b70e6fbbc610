"""Live migration over libvirt: one end's state, the pre-flight checks, the move itself.

Blocks; runs in a driver's threads. libvirtd of the source talks to the destination's through the
relay's socket; memory and disks go straight from QEMU to QEMU. What a state means was measured with
libvirt 9.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import libvirt

from agent.hypervisor import HypervisorFacts, MigrationEnd, Outgoing, Transfer
from agent.libvirt_domains import check_generation, find_domain, metadata_of
from agent.libvirt_facts import ARCHITECTURE
from agent.migration_xml import destination_xml, disk_targets, guest_facts
from shared.errors import DomainNotFound, FieldError
from shared.moves import EndState, MigrationFigures
from shared.protocol import DestinationQuestion, SourceCheck

_OUT: int = libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
_IN: int = libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN
# Paused for another reason, a guest has run: an I/O error, a snapshot, a watchdog.
_PAUSED: dict[int, EndState] = {
    libvirt.VIR_DOMAIN_PAUSED_USER: EndState.HELD,
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION: EndState.AWAY,
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP: EndState.INCOMING,
}
_BASE_FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
)
_ACTIVE_JOBS = frozenset({libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED})


def migration_end(connection: libvirt.virConnect, name: str) -> MigrationEnd | None:
    """Return what a domain of ours is as one end of a migration; None when there is none."""
    domain = find_domain(connection, name)
    if domain is None:
        return None
    try:
        metadata = metadata_of(domain)
        if metadata is None:
            return None
        # In this order: a guest that goes on between the two questions is one that runs.
        operation = _operation(domain)
        state, reason = domain.state()
        end = _end_state(state, reason, operation)
        if end in (EndState.DOWN, EndState.NEVER_RAN) and not _is_kept(domain):
            return None
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None
    returned = end is EndState.RUNNING and reason == libvirt.VIR_DOMAIN_RUNNING_MIGRATION_CANCELED
    return MigrationEnd(generation=metadata.generation, state=end, returned=returned)


def hold(connection: libvirt.virConnect, name: str, generation: int) -> bool:
    """Pause a domain that libvirt itself has resumed after a migration."""
    domain = find_domain(connection, name)
    if domain is None:
        return False
    state, reason = domain.state()
    if (state, reason) != (
        libvirt.VIR_DOMAIN_RUNNING,
        libvirt.VIR_DOMAIN_RUNNING_MIGRATION_CANCELED,
    ):
        return False
    check_generation(domain, name, generation)
    domain.suspend()
    return True


def check_source(connection: libvirt.virConnect, name: str, generation: int) -> SourceCheck:
    domain = _domain(connection, name, generation)
    blockers = []
    if not domain.isActive():
        blockers.append(_blocker("not_running", "its domain does not run"))
    elif _operation(domain) is not None:
        blockers.append(_blocker("job_active", "libvirt is at work on its domain"))
    if domain.snapshotNum(0):
        blockers.append(_blocker("has_snapshots", "it has snapshots of libvirt's"))
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    facts = guest_facts(xml)
    if facts.host_devices:
        blockers.append(
            _blocker("host_device", f"it holds {facts.host_devices} device(s) of its node")
        )
    return SourceCheck(blockers=tuple(blockers), machine=facts.machine, cpu_xml=facts.cpu_xml)


def check_destination(
    connection: libvirt.virConnect,
    name: str,
    question: DestinationQuestion,
    facts: HypervisorFacts,
) -> list[FieldError]:
    blockers = []
    # A VM at rest gets its machine where it is started.
    if question.machine and question.machine not in facts.machine_types:
        blockers.append(
            _blocker("machine_type", f"QEMU here has no machine type {question.machine!r}")
        )
    elif question.cpu_xml and not _offers_cpu(connection, question, facts.virtualization):
        blockers.append(_blocker("cpu", "its CPU cannot do what the guest was promised"))
    by_name = find_domain(connection, name)
    if by_name is not None and (by_name.isActive() or metadata_of(by_name) is None):
        blockers.append(_blocker("name_taken", f"a domain {name!r} is here already"))
    with contextlib.suppress(libvirt.libvirtError):
        other = connection.lookupByUUIDString(question.domain_uuid)
        if other.name() != name:
            blockers.append(_blocker("uuid_taken", f"domain {other.name()!r} has its UUID"))
    return blockers


def _offers_cpu(
    connection: libvirt.virConnect, question: DestinationQuestion, virtualization: str
) -> bool:
    """Whether guests with the running guest's CPU can run here."""
    compared = connection.compareHypervisorCPU(
        None, ARCHITECTURE, question.machine, virtualization, question.cpu_xml, 0
    )
    return bool(compared != libvirt.VIR_CPU_COMPARE_INCOMPATIBLE)


def migrate(connection: libvirt.virConnect, name: str, generation: int, outgoing: Outgoing) -> None:
    """Move a domain; returns, or raises libvirt's error, when its libvirtd says it is over."""
    domain = _domain(connection, name, generation)
    flags = _BASE_FLAGS
    xml = destination_xml(
        domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE), outgoing.definition, outgoing.layout
    )
    persistent = destination_xml(
        domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_MIGRATABLE),
        outgoing.definition,
        outgoing.layout,
    )
    parameters: dict[str, Any] = {
        libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{outgoing.address}",
        libvirt.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: outgoing.address,
        libvirt.VIR_MIGRATE_PARAM_DEST_XML: xml,
        libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: persistent,
    }
    spec = outgoing.definition.spec
    if outgoing.copied:
        flags |= libvirt.VIR_MIGRATE_NON_SHARED_DISK
        parameters[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = disk_targets(spec, outgoing.copied)
    if len(outgoing.copied) < len(spec.disks):
        # The operator has said that the pool is shared, and its volumes were seen on both nodes;
        # libvirt only knows file systems that it has a name for.
        flags |= libvirt.VIR_MIGRATE_UNSAFE
    if outgoing.tls:
        flags |= libvirt.VIR_MIGRATE_TLS
        parameters[libvirt.VIR_MIGRATE_PARAM_TLS_DESTINATION] = outgoing.node_name
    if outgoing.paused:
        flags |= libvirt.VIR_MIGRATE_PAUSED
    domain.migrateToURI3(outgoing.uri, parameters, flags)


def abort(connection: libvirt.virConnect, name: str, generation: int) -> None:
    domain = _domain(connection, name, generation)
    if _operation(domain) != _OUT:
        return
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise  # else it has ended meanwhile


def set_max_downtime(
    connection: libvirt.virConnect, name: str, generation: int, max_downtime_ms: int
) -> None:
    _domain(connection, name, generation).migrateSetMaxDowntime(max_downtime_ms, 0)


def transfer(connection: libvirt.virConnect, name: str) -> Transfer | None:
    domain = find_domain(connection, name)
    if domain is None:
        return None
    stats = _job(domain)
    if stats is None or stats.get("operation") != _OUT:
        return None
    return Transfer(
        bytes_done=int(stats.get("data_processed", 0)),
        bytes_total=int(stats.get("data_total", 0)),
        bytes_remaining=int(stats.get("data_remaining", 0)),
        iteration=int(stats.get("memory_iteration", 0)),
        bytes_per_s=float(stats.get("memory_bps", 0) + stats.get("disk_bps", 0)),
    )


def has_left(stats: Mapping[str, Any]) -> bool:
    """Whether a completed job, as libvirt's event tells of it, has moved a domain away."""
    return stats.get("operation") == _OUT


def figures_of(stats: Mapping[str, Any]) -> MigrationFigures:
    """Return what a completed job took, from libvirt's event about it."""
    return MigrationFigures(
        total_ms=int(stats.get("time_elapsed", 0)),
        downtime_ms=int(stats.get("downtime", 0)),
        transferred_bytes=int(stats.get("data_processed", 0)),
    )


def _end_state(state: int, reason: int, operation: int | None) -> EndState:
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        # It was to begin here and could not: nothing of it has run.
        failed = reason == libvirt.VIR_DOMAIN_SHUTOFF_FAILED
        return EndState.NEVER_RAN if failed else EndState.DOWN
    if state == libvirt.VIR_DOMAIN_CRASHED:
        return EndState.DOWN
    if operation == _OUT:
        return EndState.MOVING
    if state != libvirt.VIR_DOMAIN_PAUSED:
        return EndState.RUNNING
    # What comes in is paused for one of the last two reasons, until it has arrived.
    if operation == _IN and reason != libvirt.VIR_DOMAIN_PAUSED_USER:
        return EndState.INCOMING
    return _PAUSED.get(reason, EndState.RUNNING)


def _is_kept(domain: libvirt.virDomain) -> bool:
    """Whether there is a definition, or a process: one without either is gone in a moment."""
    return bool(domain.isActive() or domain.isPersistent())


def _operation(domain: libvirt.virDomain) -> int | None:
    """Return what libvirt is doing with a domain; None when it is at rest."""
    stats = _job(domain)
    return None if stats is None else int(stats["operation"])


def _job(domain: libvirt.virDomain) -> dict[str, Any] | None:
    """Return libvirt's figures of what it is doing with a domain; None when it is at rest."""
    try:
        stats: dict[str, Any] = domain.jobStats(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            return None  # it does not run (any more)
        # The one job that libvirt tells nothing about is one that comes in.
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            return {"operation": _IN}
        raise
    return stats if stats.get("type") in _ACTIVE_JOBS else None


def _domain(connection: libvirt.virConnect, name: str, generation: int) -> libvirt.virDomain:
    domain = find_domain(connection, name)
    if domain is None:
        raise DomainNotFound(f"this node has no domain {name!r}")
    check_generation(domain, name, generation)
    return domain


def _blocker(code: str, message: str) -> FieldError:
    return FieldError("", code, message)
