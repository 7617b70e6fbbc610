"""Domain XML: what is written down, and that nothing hostile gets in or is let in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from agent.domain_xml import (
    METADATA_NAMESPACE,
    DomainLayout,
    DomainMetadata,
    build_domain_xml,
    read_metadata,
)
from agent.hypervisor import DomainDefinition
from shared.errors import HypervisorError
from shared.ids import mac_address
from shared.model import BootSpec, DiskSpec, NicSpec, VmSpec

VM_ID = "vm-abcdef00000000000000000001"

# Every element that a definition may lead to.
ALLOWED = frozenset(
    {
        f"{{{METADATA_NAMESPACE}}}vm",
        "acpi",
        "apic",
        "backend",
        "clock",
        "cmdline",
        "console",
        "controller",
        "cpu",
        "devices",
        "disk",
        "domain",
        "driver",
        "feature",
        "features",
        "initrd",
        "interface",
        "kernel",
        "log",
        "mac",
        "memballoon",
        "memory",
        "metadata",
        "model",
        "name",
        "on_crash",
        "on_poweroff",
        "on_reboot",
        "os",
        "panic",
        "rng",
        "serial",
        "source",
        "stats",
        "target",
        "title",
        "type",
        "uuid",
        "vcpu",
    }
)


def definition(
    *, title: str = "web-1", tenant: str = "default", cmdline: str = "quiet", vm_id: str = VM_ID
) -> DomainDefinition:
    spec = VmSpec(
        vcpus=2,
        memory_mib=512,
        boot=BootSpec(kernel="k", initrd="i", cmdline=cmdline),
        disks=(DiskSpec(name="root", size_gib=1), DiskSpec(name="data", size_gib=2)),
        nics=(NicSpec(network="lan"), NicSpec(network="wan", mac="02:00:00:00:00:01")),
    )
    return DomainDefinition(
        vm_id=vm_id,
        name=VM_ID,
        uuid="6f1e0c7e-5d0b-5b8e-9d0a-6e6f76616372",
        title=title,
        tenant=tenant,
        generation=42,
        spec=spec,
    )


def layout(initrd_path: str | None = "/artefacts/i", domain_type: str = "qemu") -> DomainLayout:
    return DomainLayout(
        domain_type=domain_type,
        machine="pc-q35-7.2",
        cpu_model="qemu64",
        kernel_path="/artefacts/k",
        initrd_path=initrd_path,
        disk_paths=("/pool/a.qcow2", "/pool/b.qcow2"),
        bridges=("br-lan", "br-wan"),
        console_log_path="/console/x.log",
    )


def test_everything_that_matters_is_pinned() -> None:
    root = etree.fromstring(build_domain_xml(definition(), layout(domain_type="kvm")))
    assert root.get("type") == "kvm"
    assert root.findtext("memory") == "512"
    assert root.findtext("vcpu") == "2"
    (kind,) = root.findall("./os/type")
    assert kind.get("machine") == "pc-q35-7.2"
    assert root.findtext("./os/kernel") == "/artefacts/k"
    assert root.findtext("./os/initrd") == "/artefacts/i"
    assert root.findtext("./os/cmdline") == "quiet"
    (cpu,) = root.findall("cpu")
    assert (cpu.get("mode"), cpu.get("match")) == ("custom", "exact")
    assert cpu.findtext("model") == "qemu64"
    assert cpu.xpath("./feature[@policy='disable']/@name") == ["svm", "vmx"]
    ends = [root.findtext(tag) for tag in ("on_poweroff", "on_reboot", "on_crash")]
    assert ends == ["destroy", "restart", "destroy"]
    assert root.find("./devices/graphics") is None
    (log,) = root.findall("./devices/serial/log")
    assert (log.get("file"), log.get("append")) == ("/console/x.log", "on")


def test_disks_and_nics_keep_their_order() -> None:
    root = etree.fromstring(build_domain_xml(definition(), layout()))
    assert root.xpath("./devices/disk/source/@file") == ["/pool/a.qcow2", "/pool/b.qcow2"]
    assert root.xpath("./devices/disk/target/@dev") == ["vda", "vdb"]
    assert root.xpath("./devices/disk/driver/@type") == ["qcow2", "qcow2"]
    assert root.xpath("./devices/disk/driver/@discard") == ["unmap", "unmap"]
    assert root.xpath("./devices/interface/source/@bridge") == ["br-lan", "br-wan"]
    macs = root.xpath("./devices/interface/mac/@address")
    assert macs == [mac_address(VM_ID, 0), "02:00:00:00:00:01"]


def test_what_is_not_asked_for_is_not_there() -> None:
    root = etree.fromstring(build_domain_xml(definition(cmdline=""), layout(initrd_path=None)))
    assert root.find("./os/initrd") is None
    assert root.find("./os/cmdline") is None


@given(title=st.text(), tenant=st.text(), cmdline=st.text(), vm_id=st.text(min_size=1))
def test_no_text_becomes_markup(title: str, tenant: str, cmdline: str, vm_id: str) -> None:
    wanted = definition(title=title, tenant=tenant, cmdline=cmdline, vm_id=vm_id)
    try:
        xml = build_domain_xml(wanted, layout())
    except HypervisorError:
        # Control characters: XML cannot hold them.
        return
    root = etree.fromstring(xml)
    assert {element.tag for element in root.iter()} <= ALLOWED
    assert len(root.findall("./devices/disk")) == 2
    assert read_metadata(xml) == DomainMetadata(vm_id, 42)


def test_control_characters_are_refused() -> None:
    with pytest.raises(HypervisorError):
        build_domain_xml(definition(title="a\x00b"), layout())


def test_metadata_comes_back_from_the_document_and_from_the_bare_element() -> None:
    xml = build_domain_xml(definition(), layout())
    assert read_metadata(xml) == DomainMetadata(VM_ID, 42)
    assert read_metadata('<vm id="vm-1" generation="7" tenant="default"/>') == DomainMetadata(
        "vm-1", 7
    )


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "no xml",
        "<domain/>",
        "<domain><metadata/></domain>",
        '<domain><metadata><vm id="vm-1" generation="1"/></metadata></domain>',
        '<domain><metadata><vm xmlns="urn:other" id="vm-1" generation="1"/></metadata></domain>',
        f'<domain><vm xmlns="{METADATA_NAMESPACE}" id="vm-1" generation="1"/></domain>',
        '<vm id="" generation="1"/>',
        '<vm generation="1"/>',
        '<vm id="vm-1"/>',
        '<vm id="vm-1" generation=""/>',
        '<vm id="vm-1" generation="-1"/>',
        '<vm id="vm-1" generation="1.5"/>',
        '<vm id="vm-1" generation="\u0661"/>',
        '<vm id="vm-1" generation="9999999999999999999999"/>',
    ],
)
def test_what_is_not_ours_is_foreign(xml: str) -> None:
    assert read_metadata(xml) is None


def test_entities_are_not_resolved() -> None:
    secret = "<!DOCTYPE vm [<!ENTITY e SYSTEM 'file:///etc/hostname'>]>"
    found = read_metadata(f'{secret}<vm id="vm-1" generation="1">&e;</vm>')
    assert found in (None, DomainMetadata("vm-1", 1))
    laughs = "".join(
        f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" if n else "<!ENTITY l0 'ha'>" for n in range(10)
    )
    bomb = f'<!DOCTYPE vm [{laughs}]><vm id="&l9;" generation="1"/>'
    assert read_metadata(bomb) is None


def test_outsized_and_deep_documents_are_refused() -> None:
    padding = " " * (2 * 1024 * 1024)
    assert read_metadata(f'<vm id="vm-1" generation="1">{padding}</vm>') is None
    deep = "<a>" * 10_000 + "</a>" * 10_000
    assert read_metadata(f'<vm id="vm-1" generation="1">{deep}</vm>') is None


@given(st.text())
def test_reading_never_raises(xml: str) -> None:
    read_metadata(xml)
