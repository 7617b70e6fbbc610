"""Domains: what libvirt says of one, and the acts on one. Blocks; runs in a driver's threads.

Every act reads the generation from the domain's metadata immediately before it, on the same
connection and in the same thread.
"""

from __future__ import annotations

from collections.abc import Callable

import libvirt

from agent.domain_xml import METADATA_NAMESPACE, DomainMetadata, read_metadata
from agent.hypervisor import DomainInfo
from shared.errors import DomainNotFound, GenerationMismatch, HypervisorError
from shared.model import ObservedPower

DomainAct = Callable[[libvirt.virDomain], None]

_RUNNING_STATES = frozenset(
    {
        libvirt.VIR_DOMAIN_RUNNING,
        libvirt.VIR_DOMAIN_BLOCKED,
        # Being shut down: the guest's memory and disks are still in use.
        libvirt.VIR_DOMAIN_SHUTDOWN,
    }
)
_PAUSED_STATES = frozenset({libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED})
# A QEMU that was killed or died reads CRASHED, also if it died while libvirtd was away; one that
# could not be started or left its monitor reads FAILED; DAEMON is libvirtd's own doing.
_CRASH_REASONS = frozenset(
    {
        libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
        libvirt.VIR_DOMAIN_SHUTOFF_FAILED,
        libvirt.VIR_DOMAIN_SHUTOFF_DAEMON,
    }
)
_FORGET_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)


def list_domains(connection: libvirt.virConnect) -> tuple[DomainInfo | None, ...]:
    """Return every domain sorted by name; None stands for one that vanished meanwhile."""
    return tuple(
        describe(domain)
        for domain in sorted(connection.listAllDomains(0), key=libvirt.virDomain.name)
    )


def find_domain(connection: libvirt.virConnect, name: str) -> libvirt.virDomain | None:
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None


def describe(domain: libvirt.virDomain) -> DomainInfo | None:
    """Return what is, or None once the domain is gone.

    ``power`` is UNKNOWN for one that does not run when libvirtd has forgotten why.
    """
    try:
        metadata = metadata_of(domain)
        state, reason = domain.state()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None
    return DomainInfo(
        name=domain.name(),
        uuid=domain.UUIDString(),
        vm_id=None if metadata is None else metadata.vm_id,
        generation=0 if metadata is None else metadata.generation,
        power=observed_power(state, reason),
    )


def metadata_of(domain: libvirt.virDomain) -> DomainMetadata | None:
    """Return our element of a domain, the live one while it runs; None for a foreign domain."""
    try:
        xml = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_NAMESPACE, 0)
    except libvirt.libvirtError as error:
        gone = (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_DOMAIN)
        if error.get_error_code() not in gone:
            raise
        return None
    return read_metadata(xml)


def observed_power(state: int, reason: int) -> ObservedPower:
    """Return what a libvirt state means; UNKNOWN for a shut-off domain without a reason."""
    if state in _RUNNING_STATES:
        return ObservedPower.RUNNING
    if state in _PAUSED_STATES:
        return ObservedPower.PAUSED
    if state == libvirt.VIR_DOMAIN_CRASHED:
        return ObservedPower.CRASHED
    if state != libvirt.VIR_DOMAIN_SHUTOFF or reason == libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN:
        return ObservedPower.UNKNOWN
    if reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN:
        return ObservedPower.SHUT_OFF
    if reason in _CRASH_REASONS:
        return ObservedPower.CRASHED
    return ObservedPower.STOPPED


def act_on(connection: libvirt.virConnect, name: str, generation: int, act: DomainAct) -> None:
    """Act on a domain of exactly that generation.

    Raises DomainNotFound, GenerationMismatch.
    """
    domain = find_domain(connection, name)
    if domain is None:
        raise DomainNotFound(f"this node has no domain {name!r}")
    check_generation(domain, name, generation)
    act(domain)


def check_generation(domain: libvirt.virDomain, name: str, generation: int) -> None:
    metadata = metadata_of(domain)
    if metadata is None:
        raise GenerationMismatch(f"domain {name!r} is not one of ours")
    if metadata.generation != generation:
        raise GenerationMismatch(
            f"domain {name!r} has generation {metadata.generation}, not {generation}"
        )


def define(connection: libvirt.virConnect, name: str, xml: str) -> None:
    """Define a domain, or define it anew while it does not run."""
    domain = find_domain(connection, name)
    if domain is not None:
        if metadata_of(domain) is None:
            raise HypervisorError(f"domain {name!r} is not one of ours")
        bury(domain)
        if domain.isActive():
            raise HypervisorError(f"domain {name!r} runs and cannot be defined anew")
        # libvirt would keep the reason for which the earlier generation ended, and the new one
        # would seem to have powered itself off before it ever ran.
        domain.undefineFlags(_FORGET_FLAGS | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
    connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def undefine(connection: libvirt.virConnect, name: str, generation: int) -> None:
    domain = find_domain(connection, name)
    if domain is None:
        return
    check_generation(domain, name, generation)
    bury(domain)
    if domain.isActive():
        raise HypervisorError(f"domain {name!r} runs and cannot be undefined")
    domain.undefineFlags(_FORGET_FLAGS | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def start(domain: libvirt.virDomain) -> None:
    bury(domain)
    # A start boots: a memory image that somebody saved belongs to another generation.
    domain.createWithFlags(libvirt.VIR_DOMAIN_START_FORCE_BOOT)


def stop(domain: libvirt.virDomain) -> None:
    if domain.isActive():
        domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_DEFAULT)


def shutdown(domain: libvirt.virDomain) -> None:
    domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)


def pause(domain: libvirt.virDomain) -> None:
    domain.suspend()


def resume(domain: libvirt.virDomain) -> None:
    if domain.state()[0] not in _RUNNING_STATES:
        domain.resume()


def reboot(domain: libvirt.virDomain) -> None:
    domain.reboot(libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)


def reset(domain: libvirt.virDomain) -> None:
    domain.reset(0)


def bury(domain: libvirt.virDomain) -> None:
    """End the QEMU of a guest that crashed while libvirtd was away: nobody else has done so."""
    if domain.state()[0] == libvirt.VIR_DOMAIN_CRASHED and domain.isActive():
        domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_DEFAULT)
