"""Whether KVM works here: found out by booting a guest, not by looking at ``/dev/kvm``.

The device can be there and guests still hang (nested and paravirtual KVM). The probe's guest is
transient, ends with the connection that made it, and is never taken for anyone's VM.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid

import libvirt

from agent.domain_xml import DomainLayout, build_domain_xml
from agent.hypervisor import DomainDefinition
from agent.libvirt_facts import kvm_is_offered
from agent.libvirt_settings import LibvirtSettings
from agent.libvirt_storage import console_log_name, delete_volume, pool_target, read_console_log
from shared.errors import HypervisorError
from shared.model import DEFAULT_TENANT, BootSpec, VmSpec

KVM = "kvm"
EMULATION = "qemu"
PROBE_NAME = "novacron-kvm-probe"
PROBE_KERNEL = "tiny-kernel"
PROBE_INITRD = "tiny-initrd"

# The guest is up in half a second under KVM; under emulation it would be in three.
BOOT_LIMIT_S = 10.0
_LOOK_PERIOD_S = 0.25
_MEMORY_MIB = 128
_LOG_BYTES_MAX = 64 * 1024
# What the tiny guest's first process says; a kernel that speaks and then hangs proves nothing.
_BOOTED = re.compile(rb"^boot \d", re.MULTILINE)


def probe_virtualization(connection: libvirt.virConnect, settings: LibvirtSettings) -> str:
    """Return ``kvm`` if a guest was seen to boot under it, else ``qemu``; takes 10 s at most."""
    kernel, initrd = settings.artefact(PROBE_KERNEL), settings.artefact(PROBE_INITRD)
    if not (kernel.is_file() and initrd.is_file() and kvm_is_offered(connection)):
        return EMULATION
    _end_leftover(connection)
    try:
        return KVM if guest_boots(connection, settings, KVM, BOOT_LIMIT_S) else EMULATION
    except (libvirt.libvirtError, HypervisorError):
        if not connection.isAlive():
            raise
        return EMULATION


def guest_boots(
    connection: libvirt.virConnect, settings: LibvirtSettings, domain_type: str, limit_s: float
) -> bool:
    """Return whether a tiny guest of that type is up within the limit; it is ended either way."""
    console_dir = pool_target(connection, settings.console_pool)
    layout = DomainLayout(
        domain_type=domain_type,
        machine=settings.machine,
        cpu_model=settings.cpu_model,
        kernel_path=str(settings.artefact(PROBE_KERNEL)),
        initrd_path=str(settings.artefact(PROBE_INITRD)),
        disk_paths=(),
        bridges=(),
        console_log_path=str(console_dir / console_log_name(PROBE_NAME)),
    )
    domain = connection.createXML(
        build_domain_xml(_definition(), layout), libvirt.VIR_DOMAIN_START_AUTODESTROY
    )
    try:
        return _speaks(connection, settings.console_pool, limit_s)
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            domain.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            delete_volume(connection, settings.console_pool, console_log_name(PROBE_NAME))


def _speaks(connection: libvirt.virConnect, console_pool: str, limit_s: float) -> bool:
    end_at = time.monotonic() + limit_s
    while time.monotonic() < end_at:
        said = read_console_log(connection, console_pool, PROBE_NAME, 0, _LOG_BYTES_MAX)
        if _BOOTED.search(said):
            return True
        time.sleep(_LOOK_PERIOD_S)
    return False


def _end_leftover(connection: libvirt.virConnect) -> None:
    """End the probe of an agent that died; libvirt has done so already, in the usual case."""
    with contextlib.suppress(libvirt.libvirtError):
        connection.lookupByName(PROBE_NAME).destroy()


def _definition() -> DomainDefinition:
    boot = BootSpec(kernel=PROBE_KERNEL, initrd=PROBE_INITRD, cmdline="console=ttyS0 quiet")
    return DomainDefinition(
        vm_id=PROBE_NAME,
        name=PROBE_NAME,
        uuid=str(uuid.uuid4()),
        title=PROBE_NAME,
        tenant=DEFAULT_TENANT,
        generation=0,
        spec=VmSpec(vcpus=1, memory_mib=_MEMORY_MIB, boot=boot),
    )
