"""Domain XML: written from a typed definition, and the one element of ours read back.

Pure. Documents are built element by element, never from text, so that no field of a definition can
become markup. No path comes from a user: the driver resolves every one into the layout. Reading
treats all XML as hostile: no entities, no network, no outsized trees.
"""

from __future__ import annotations

from lxml import etree
from msgspec import Struct

from agent.hypervisor import DomainDefinition
from shared.errors import HypervisorError
from shared.ids import mac_address

METADATA_NAMESPACE = "https://novacron.dev/xmlns/domain/1"
METADATA_PREFIX = "novacron"

METADATA_TAG = f"{{{METADATA_NAMESPACE}}}vm"
# libvirt's own answers stay below this; lxml's tree of it is about ten times as large.
_XML_BYTES_MAX = 1024 * 1024
_GUEST_STATS_PERIOD_S = 5
# Part of some models (svm of qemu64), but offered by few nodes under KVM, and in nobody's way when
# it is missing everywhere.
_NESTED_VIRTUALIZATION = ("svm", "vmx")


class DomainLayout(Struct, frozen=True, kw_only=True):
    """What the node adds to a definition: paths, bridges, and what its QEMU is to emulate.

    ``disk_paths`` and ``bridges`` go with the spec's disks and NICs, one for each, in order.
    """

    domain_type: str
    machine: str
    cpu_model: str
    kernel_path: str
    initrd_path: str | None
    disk_paths: tuple[str, ...]
    bridges: tuple[str, ...]
    console_log_path: str


class DomainMetadata(Struct, frozen=True):
    """What a domain of ours says about itself."""

    vm_id: str
    generation: int


def build_domain_xml(definition: DomainDefinition, layout: DomainLayout) -> str:
    """Return the XML that libvirt is to define. Raises HypervisorError for text XML cannot hold."""
    spec = definition.spec
    assert len(layout.disk_paths) == len(spec.disks), "a path for each disk"
    assert len(layout.bridges) == len(spec.nics), "a bridge for each NIC"
    try:
        return etree.tostring(_domain(definition, layout), encoding="unicode")
    except ValueError as error:
        raise HypervisorError(f"VM {definition.vm_id!r} does not fit into XML: {error}") from error


def read_metadata(xml: str) -> DomainMetadata | None:
    """Return what a domain's XML, or its bare metadata element, says; None for a foreign one.

    libvirt hands out the bare element without its namespace, by which it has found it. Metadata of
    ours that cannot be understood makes a domain foreign too: it is never acted on.
    """
    root = parse_xml(xml)
    if root is None:
        return None
    bare = root.tag in (METADATA_TAG, "vm")
    element = root if bare else root.find(f"./metadata/{METADATA_TAG}")
    if element is None:
        return None
    vm_id, generation = element.get("id", ""), element.get("generation", "")
    # 18 digits hold every etcd revision; isdigit() alone lets other scripts' digits in.
    if not vm_id or not (generation.isascii() and generation.isdigit() and len(generation) <= 18):
        return None
    return DomainMetadata(vm_id, int(generation))


def disk_target(index: int) -> str:
    """Return the guest's device name of a VM's disk."""
    return f"vd{chr(ord('a') + index)}"


def parse_xml(xml: str) -> etree._Element | None:
    if len(xml) > _XML_BYTES_MAX:
        return None
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, huge_tree=False, load_dtd=False
    )
    try:
        return etree.fromstring(xml.encode("utf-8", "replace"), parser)
    except (etree.XMLSyntaxError, ValueError):
        return None


def _domain(definition: DomainDefinition, layout: DomainLayout) -> etree._Element:
    spec = definition.spec
    root = etree.Element("domain", type=layout.domain_type)
    _text(root, "name", definition.name)
    _text(root, "uuid", definition.uuid)
    _text(root, "title", definition.title)
    metadata = etree.SubElement(root, "metadata")
    etree.SubElement(
        metadata,
        METADATA_TAG,
        {
            "id": definition.vm_id,
            "generation": str(definition.generation),
            "tenant": definition.tenant,
        },
        nsmap={METADATA_PREFIX: METADATA_NAMESPACE},
    )
    _text(root, "memory", str(spec.memory_mib), unit="MiB")
    _text(root, "vcpu", str(spec.vcpus), placement="static")
    _boot(root, definition, layout)
    features = etree.SubElement(root, "features")
    etree.SubElement(features, "acpi")
    etree.SubElement(features, "apic")
    cpu = etree.SubElement(root, "cpu", mode="custom", match="exact")
    _text(cpu, "model", layout.cpu_model, fallback="forbid")
    for feature in _NESTED_VIRTUALIZATION:
        etree.SubElement(cpu, "feature", policy="disable", name=feature)
    etree.SubElement(root, "clock", offset="utc")
    _text(root, "on_poweroff", "destroy")
    _text(root, "on_reboot", "restart")
    _text(root, "on_crash", "destroy")
    _devices(root, definition, layout)
    return root


def _boot(root: etree._Element, definition: DomainDefinition, layout: DomainLayout) -> None:
    boot = etree.SubElement(root, "os")
    _text(boot, "type", "hvm", arch="x86_64", machine=layout.machine)
    _text(boot, "kernel", layout.kernel_path)
    if layout.initrd_path is not None:
        _text(boot, "initrd", layout.initrd_path)
    if definition.spec.boot.cmdline:
        _text(boot, "cmdline", definition.spec.boot.cmdline)


def _devices(root: etree._Element, definition: DomainDefinition, layout: DomainLayout) -> None:
    devices = etree.SubElement(root, "devices")
    # Without this libvirt adds a USB controller that no guest of ours needs.
    etree.SubElement(devices, "controller", type="usb", model="none")
    for index, path in enumerate(layout.disk_paths):
        _disk(devices, index, path)
    for index, bridge in enumerate(layout.bridges):
        given = definition.spec.nics[index].mac
        _nic(devices, bridge, given or mac_address(definition.vm_id, index))
    serial = etree.SubElement(devices, "serial", type="pty")
    etree.SubElement(serial, "log", file=layout.console_log_path, append="on")
    etree.SubElement(serial, "target", port="0")
    console = etree.SubElement(devices, "console", type="pty")
    etree.SubElement(console, "target", type="serial", port="0")
    balloon = etree.SubElement(devices, "memballoon", model="virtio")
    etree.SubElement(balloon, "stats", period=str(_GUEST_STATS_PERIOD_S))
    rng = etree.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    # A guest kernel's panic reaches libvirt through this device only; without it a crashed guest
    # looks like a running one.
    etree.SubElement(devices, "panic", model="isa")


def _disk(devices: etree._Element, index: int, path: str) -> None:
    disk = etree.SubElement(devices, "disk", type="file", device="disk")
    # The format is written down: libvirt must never guess it from what a guest wrote.
    etree.SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
    etree.SubElement(disk, "source", file=path)
    etree.SubElement(disk, "target", dev=disk_target(index), bus="virtio")


def _nic(devices: etree._Element, bridge: str, mac: str) -> None:
    interface = etree.SubElement(devices, "interface", type="bridge")
    etree.SubElement(interface, "mac", address=mac)
    etree.SubElement(interface, "source", bridge=bridge)
    etree.SubElement(interface, "model", type="virtio")


def _text(parent: etree._Element, tag: str, text: str, **attributes: str) -> None:
    etree.SubElement(parent, tag, attributes).text = text
