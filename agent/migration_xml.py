"""Domain XML on the move: the running domain's own, with what differs on its new node.

Pure. libvirt compares the two for what the guest can see, so nothing else is touched: addresses,
aliases and models stay as they are.
"""

from __future__ import annotations

from lxml import etree
from msgspec import Struct

from agent.domain_xml import METADATA_TAG, disk_target, parse_xml
from agent.hypervisor import DomainDefinition
from shared.errors import HypervisorError
from shared.model import VmSpec
from shared.protocol import DestinationLayout


class GuestFacts(Struct, frozen=True, kw_only=True):
    """What a running domain needs of a node; ``host_devices`` counts what cannot leave its own."""

    machine: str
    cpu_xml: str
    host_devices: int


def destination_xml(xml: str, definition: DomainDefinition, layout: DestinationLayout) -> str:
    """Return a domain's XML for its new node: generation, paths and bridges of over there.

    Raises HypervisorError when its disks or NICs are not those of the definition.
    """
    root = _root(xml)
    metadata = root.find(f"./metadata/{METADATA_TAG}")
    if metadata is None:
        raise HypervisorError(f"domain {definition.name!r} is not one of ours")
    metadata.set("generation", str(definition.generation))
    _set_text(root, "./os/kernel", layout.kernel_path)
    if layout.initrd_path is not None:
        _set_text(root, "./os/initrd", layout.initrd_path)
    disks = root.findall("./devices/disk[@device='disk']/source")
    bridges = root.findall("./devices/interface[@type='bridge']/source")
    if len(disks) != len(layout.disk_paths) or len(bridges) != len(layout.bridges):
        raise HypervisorError(f"domain {definition.name!r} has other disks or NICs than its VM")
    for source, path in zip(disks, layout.disk_paths, strict=True):
        source.set("file", path)
    for source, bridge in zip(bridges, layout.bridges, strict=True):
        source.set("bridge", bridge)
    for log in root.findall("./devices/serial/log") + root.findall("./devices/console/log"):
        log.set("file", layout.console_log_path)
    return str(etree.tostring(root, encoding="unicode"))


def disk_targets(spec: VmSpec, names: tuple[str, ...]) -> list[str]:
    """Return the guest's device names of some of a VM's disks."""
    return [disk_target(i) for i, disk in enumerate(spec.disks) if disk.name in names]


def guest_facts(xml: str) -> GuestFacts:
    root = _root(xml)
    os_type, cpu = root.find("./os/type"), root.find("./cpu")
    return GuestFacts(
        machine="" if os_type is None else os_type.get("machine", ""),
        cpu_xml="" if cpu is None else str(etree.tostring(cpu, encoding="unicode")),
        host_devices=len(root.findall("./devices/hostdev")),
    )


def _root(xml: str) -> etree._Element:
    root = parse_xml(xml)
    if root is None:
        raise HypervisorError("libvirt's XML of a domain cannot be read")
    return root


def _set_text(root: etree._Element, path: str, text: str) -> None:
    element = root.find(path)
    if element is None:
        raise HypervisorError(f"the domain's XML has no {path}")
    element.text = text
