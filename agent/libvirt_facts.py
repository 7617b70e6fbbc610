"""What a node has, as libvirt tells it: capacity, CPU, NUMA, pools, networks, artefacts, versions.

Every function blocks and runs in a thread of the driver. Reads only; what this node's libvirt does
not say is left empty rather than guessed.
"""

from __future__ import annotations

import logging
import os
import re

import libvirt
from lxml import etree

from agent.hypervisor import HypervisorFacts
from agent.identity_files import QEMU_TLS_FILES
from agent.libvirt_settings import LibvirtSettings
from shared.model import CpuFacts, NumaCell, PoolFacts
from shared.units import GIB, MIB

log = logging.getLogger(__name__)

ARCHITECTURE = "x86_64"

# The pattern of shared.model.Name: what a VM's spec may call an artefact.
_ARTEFACT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_KIB = {"b": 1 / 1024, "bytes": 1 / 1024, "KiB": 1, "MiB": 1024, "GiB": 1024 * 1024}


def read_facts(
    connection: libvirt.virConnect, settings: LibvirtSettings, virtualization: str
) -> HypervisorFacts:
    """Return the node's facts; ``virtualization`` is the result of the probe."""
    _, memory_mib, cpus, *_ = connection.getInfo()
    capabilities = etree.fromstring(connection.getCapabilities())
    return HypervisorFacts(
        cpus=cpus if settings.cpus is None else settings.cpus,
        memory_mib=memory_mib if settings.memory_mib is None else settings.memory_mib,
        cpu=_cpu(connection, capabilities, settings, virtualization),
        numa=_numa(capabilities),
        pools=tuple(_pools(connection, settings)),
        networks=existing_networks(settings),
        artefacts=_artefacts(settings),
        machine_types=_machine_types(capabilities),
        virtualization=virtualization,
        libvirt_version=_version(connection.getLibVersion()),
        qemu_version=_version(connection.getVersion()),
        migration_tls=has_qemu_tls(settings),
    )


def existing_networks(settings: LibvirtSettings) -> tuple[str, ...]:
    """Return the names of the configured networks whose bridge is there, sorted."""
    return tuple(
        sorted(
            name
            for name, bridge in settings.networks.items()
            if (settings.network_dir / bridge / "bridge").is_dir()
        )
    )


def has_qemu_tls(settings: LibvirtSettings) -> bool:
    """Return whether QEMU finds here what it encrypts migrations with; the agent reads no key.

    What the agent may not look into counts as missing, and is told: nobody would find it otherwise.
    """
    try:
        return all((settings.qemu_tls_dir / name).exists() for name in QEMU_TLS_FILES)
    except PermissionError:
        log.warning(
            "%s: the agent may not look into it, so VMs are not migrated; it has to be of mode "
            "0755, while the keys in it are QEMU's alone",
            settings.qemu_tls_dir,
        )
        return False


def kvm_is_offered(connection: libvirt.virConnect) -> bool:
    """Return whether libvirt would accept KVM guests; whether they boot is another matter."""
    capabilities = etree.fromstring(connection.getCapabilities())
    return (
        capabilities.find(f"./guest/arch[@name='{ARCHITECTURE}']/domain[@type='kvm']") is not None
    )


def _cpu(
    connection: libvirt.virConnect,
    capabilities: etree._Element,
    settings: LibvirtSettings,
    virtualization: str,
) -> CpuFacts:
    topology = capabilities.find("./host/cpu/topology")
    counts: dict[str, str] = {}
    if topology is not None:
        counts.update({str(key): str(value) for key, value in topology.items()})
    return CpuFacts(
        model=capabilities.findtext("./host/cpu/model") or "",
        vendor=capabilities.findtext("./host/cpu/vendor") or "",
        flags=_cpu_flags(connection, capabilities),
        sockets=int(counts.get("sockets", 1)),
        cores=int(counts.get("cores", 1)),
        threads=int(counts.get("threads", 1)),
        models=_usable_models(connection, settings, virtualization),
    )


def _cpu_flags(connection: libvirt.virConnect, capabilities: etree._Element) -> tuple[str, ...]:
    """Return every feature of the machine's CPU: those its model implies and the rest."""
    cpu = capabilities.find("./host/cpu")
    if cpu is None:
        return ()
    try:
        expanded = connection.baselineCPU(
            [etree.tostring(cpu, encoding="unicode")],
            libvirt.VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES,
        )
    except libvirt.libvirtError:
        # A CPU that this libvirt has no model for: what it lists by name is all that is known.
        expanded = etree.tostring(cpu, encoding="unicode")
    features = etree.fromstring(expanded).findall("./feature")
    return tuple(
        sorted({f.get("name", "") for f in features if f.get("policy") != "disable"} - {""})
    )


def _usable_models(
    connection: libvirt.virConnect, settings: LibvirtSettings, virtualization: str
) -> tuple[str, ...]:
    try:
        document = connection.getDomainCapabilities(
            None, ARCHITECTURE, settings.machine, virtualization
        )
    except libvirt.libvirtError:
        # The pinned machine type is not known here: no guest can be defined, so no model fits.
        return ()
    models = etree.fromstring(document).findall("./cpu/mode[@name='custom']/model[@usable='yes']")
    return tuple(sorted(model.text for model in models if model.text))


def _numa(capabilities: etree._Element) -> tuple[NumaCell, ...]:
    cells = []
    for cell in capabilities.findall("./host/topology/cells/cell"):
        memory = cell.find("memory")
        cpus = sorted(int(cpu.get("id", 0)) for cpu in cell.findall("./cpus/cpu"))
        cells.append(
            NumaCell(
                id=int(cell.get("id", 0)),
                memory_mib=0 if memory is None else _mib(memory),
                cpus=tuple(cpus),
            )
        )
    return tuple(cells)


def _mib(memory: etree._Element) -> int:
    return int(int(memory.text or 0) * _KIB.get(memory.get("unit", "KiB"), 1) * 1024 // MIB)


def _pools(connection: libvirt.virConnect, settings: LibvirtSettings) -> list[PoolFacts]:
    facts = []
    for name in sorted(settings.pools):
        try:
            pool = connection.storagePoolLookupByName(name)
            _, capacity, _, available = pool.info()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
                raise
            continue
        facts.append(
            PoolFacts(
                name=name,
                capacity_gib=capacity / GIB,
                free_gib=available / GIB,
                shared=name in settings.shared_pools,
            )
        )
    return facts


def _artefacts(settings: LibvirtSettings) -> tuple[str, ...]:
    if not settings.artefact_dir.is_dir():
        return ()
    with os.scandir(settings.artefact_dir) as entries:
        return tuple(sorted(e.name for e in entries if _ARTEFACT.fullmatch(e.name) and e.is_file()))


def _machine_types(capabilities: etree._Element) -> tuple[str, ...]:
    """Return canonical machine types: an alias means another machine after an upgrade."""
    machines = capabilities.findall(f"./guest/arch[@name='{ARCHITECTURE}']/machine")
    return tuple(sorted({m.text for m in machines if m.text and m.get("canonical") is None}))


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
