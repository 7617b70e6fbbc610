"""A domain's XML for its new node: what differs over there, and nothing else."""

from __future__ import annotations

import pytest
from lxml import etree
from msgspec.structs import replace

from agent.domain_xml import DomainLayout, build_domain_xml, read_metadata
from agent.hypervisor import DomainDefinition
from agent.migration_xml import destination_xml, disk_targets, guest_facts
from shared.errors import HypervisorError
from shared.model import BootSpec, DiskSpec, NicSpec, VmSpec
from shared.protocol import DestinationLayout

VM_ID = "vm-abcdef00000000000000000001"
HERE = DomainLayout(
    domain_type="qemu",
    machine="pc-q35-7.2",
    cpu_model="qemu64",
    kernel_path="/here/kernel",
    initrd_path="/here/initrd",
    disk_paths=("/here/root.qcow2", "/here/data.qcow2"),
    bridges=("br-here", "br-here-too"),
    console_log_path="/here/console.log",
)
THERE = DestinationLayout(
    kernel_path="/there/kernel",
    initrd_path="/there/initrd",
    disk_paths=("/there/root.qcow2", "/there/data.qcow2"),
    bridges=("br-there", "br-there-too"),
    console_log_path="/there/console.log",
)
DEFINITION = DomainDefinition(
    vm_id=VM_ID,
    name=VM_ID,
    uuid="4a3d80c0-6386-53a3-9d8d-48f4c264f253",
    title="web <1> & more",
    tenant="default",
    generation=1,
    spec=VmSpec(
        vcpus=1,
        memory_mib=192,
        boot=BootSpec(kernel="kernel", initrd="initrd", cmdline="quiet"),
        disks=(DiskSpec(name="root", size_gib=1), DiskSpec(name="data", size_gib=1)),
        nics=(NicSpec(network="lan"), NicSpec(network="wan")),
    ),
)
ARRIVING = replace(DEFINITION, generation=2)


def running(xml: str) -> etree._Element:
    """Return a definition's XML with what libvirt adds once it runs."""
    root = etree.fromstring(xml)
    root.set("id", "7")
    serial = root.find("./devices/serial")
    console = root.find("./devices/console")
    assert serial is not None
    assert console is not None
    etree.SubElement(serial, "alias", name="serial0")
    # libvirt repeats the serial port's log on the console that is the same device.
    etree.SubElement(console, "log", file="/here/console.log", append="on")
    for number, device in enumerate(root.findall("./devices/disk")):
        etree.SubElement(device, "address", type="pci", slot=f"0x{number:02x}")
    return root


XML = etree.tostring(running(build_domain_xml(DEFINITION, HERE)), encoding="unicode")


def differences(one: etree._Element, other: etree._Element, path: str = "") -> dict[str, str]:
    """Return what the other has where they differ, by path; elements must be the same."""
    assert one.tag == other.tag
    assert len(one) == len(other)
    path = f"{path}/{etree.QName(one).localname}"
    found = {
        f"{path}@{name}": other.get(name, "")
        for name in {*one.attrib, *other.attrib}
        if one.get(name) != other.get(name)
    }
    if (one.text or "").strip() != (other.text or "").strip():
        found[path] = other.text or ""
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        found |= differences(a, b, f"{path}[{number}]")
    return found


def test_only_generation_paths_and_bridges_change() -> None:
    moved = destination_xml(XML, ARRIVING, THERE)
    changed = differences(etree.fromstring(XML), etree.fromstring(moved))
    assert sorted(changed.values()) == sorted(
        [
            "2",
            THERE.kernel_path,
            "/there/initrd",
            *THERE.disk_paths,
            *THERE.bridges,
            *(THERE.console_log_path,) * 2,
        ]
    )
    metadata = read_metadata(moved)
    assert metadata is not None
    assert (metadata.vm_id, metadata.generation) == (VM_ID, 2)


def test_disks_and_nics_keep_their_order() -> None:
    root = etree.fromstring(destination_xml(XML, ARRIVING, THERE))
    targets = [each.get("dev") for each in root.findall("./devices/disk/target")]
    files = [each.get("file") for each in root.findall("./devices/disk/source")]
    assert list(zip(targets, files, strict=True)) == [
        ("vda", "/there/root.qcow2"),
        ("vdb", "/there/data.qcow2"),
    ]
    bridges = [each.get("bridge") for each in root.findall("./devices/interface/source")]
    assert bridges == ["br-there", "br-there-too"]


def test_a_domain_without_an_initrd_disks_or_nics_moves_too() -> None:
    bare = replace(DEFINITION.spec, boot=BootSpec(kernel="kernel"), disks=(), nics=())
    here = replace(HERE, initrd_path=None, disk_paths=(), bridges=())
    there = replace(THERE, initrd_path=None, disk_paths=(), bridges=())
    xml = build_domain_xml(replace(DEFINITION, spec=bare), here)
    moved = destination_xml(xml, replace(ARRIVING, spec=bare), there)
    assert "/here/" not in moved


@pytest.mark.parametrize(
    "layout",
    [
        replace(THERE, disk_paths=("/there/root.qcow2",)),
        replace(THERE, disk_paths=(*THERE.disk_paths, "/there/more.qcow2")),
        replace(THERE, bridges=()),
    ],
)
def test_a_domain_that_is_not_as_its_vm_is_not_moved(layout: DestinationLayout) -> None:
    with pytest.raises(HypervisorError, match="other disks or NICs"):
        destination_xml(XML, ARRIVING, layout)


def test_a_stranger_is_not_moved() -> None:
    root = etree.fromstring(XML)
    metadata = root.find("./metadata")
    assert metadata is not None
    root.remove(metadata)
    with pytest.raises(HypervisorError, match="not one of ours"):
        destination_xml(etree.tostring(root, encoding="unicode"), ARRIVING, THERE)
    with pytest.raises(HypervisorError, match="cannot be read"):
        destination_xml("<domain", ARRIVING, THERE)


def test_a_domain_that_does_not_boot_a_kernel_is_not_moved() -> None:
    root = etree.fromstring(XML)
    boot, kernel = root.find("./os"), root.find("./os/kernel")
    assert boot is not None
    assert kernel is not None
    boot.remove(kernel)
    with pytest.raises(HypervisorError, match="kernel"):
        destination_xml(etree.tostring(root, encoding="unicode"), ARRIVING, THERE)


def test_disks_are_named_to_libvirt_as_the_guest_knows_them() -> None:
    assert disk_targets(DEFINITION.spec, ("data",)) == ["vdb"]
    assert disk_targets(DEFINITION.spec, ("data", "root")) == ["vda", "vdb"]
    assert disk_targets(DEFINITION.spec, ()) == []


def test_what_a_guest_needs_of_its_node() -> None:
    facts = guest_facts(XML)
    assert (facts.machine, facts.host_devices) == ("pc-q35-7.2", 0)
    assert "qemu64" in facts.cpu_xml
    root = etree.fromstring(XML)
    devices = root.find("./devices")
    assert devices is not None
    etree.SubElement(devices, "hostdev", mode="subsystem", type="pci")
    assert guest_facts(etree.tostring(root, encoding="unicode")).host_devices == 1
    assert guest_facts("<domain/>").machine == ""
