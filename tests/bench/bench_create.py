"""The create gate: from the API request to the guest running, against `virsh create`.

Both make the same domain on the same node, one after the other, in an order that alternates. Our
side is a client's: HTTPS request, then a long poll until the operation has succeeded; it includes
placement, two fenced commits, the disk, the definition and the start. virsh's side is the process
`virsh create` with the XML that our own domain had; its disk is made before the clock starts.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from lxml import etree
from msgspec import Struct

from shared.model import BootSpec, DiskSpec, NicSpec, VmSpec
from tests.bench.bootstrap import upper_bound
from tests.bench.result import BenchResult, figure
from tests.lab.api import LabApi
from tests.lab.cluster import Lab, LabPlan

PAIRS = 34
WARM_UP_PAIRS = 2
EXTRA_MAX_MS = 250.0
MEMORY_MIB = 192
VIRSH_NAME = "bench-virsh"
VIRSH_UUID = "5f0c1d52-51c6-4bb5-9b1c-6e6f76616301"


class VmBody(Struct, frozen=True, kw_only=True):
    name: str
    spec: VmSpec


def run() -> list[BenchResult]:
    """Measure with and without a disk, and hold both differences against the gate."""
    with Lab(LabPlan(nodes=1)) as lab:
        return [
            *_measure(lab, "create", disks=()),
            *_measure(lab, "create_with_disk", disks=(DiskSpec(name="root", size_gib=1),)),
        ]


def _measure(lab: Lab, name: str, disks: tuple[DiskSpec, ...]) -> list[BenchResult]:
    api = lab.api()
    uri = lab.state().nodes[0].libvirt_uri
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="novacron-bench-") as folder:
        xml = Path(folder) / "domain.xml"
        _write_xml(api, uri, disks, xml)
        for number in range(WARM_UP_PAIRS + PAIRS):
            if number % 2:
                theirs.append(_virsh_ms(uri, xml))
                ours.append(_novacron_ms(api, disks))
            else:
                ours.append(_novacron_ms(api, disks))
                theirs.append(_virsh_ms(uri, xml))
        _virsh(uri, "vol-delete", "--pool", "default", f"{VIRSH_NAME}.qcow2", check=False)
    api.close()
    extra = [o - t for o, t in zip(ours, theirs, strict=True)][WARM_UP_PAIRS:]
    bound = upper_bound(extra)
    gate = f"at most {EXTRA_MAX_MS:.0f} (95 % upper bound of the median of {PAIRS} pairs)"
    return [
        figure(f"{name}.novacron_median", statistics.median(ours[WARM_UP_PAIRS:]), "ms"),
        figure(f"{name}.virsh_median", statistics.median(theirs[WARM_UP_PAIRS:]), "ms"),
        figure(f"{name}.extra_median", statistics.median(extra), "ms"),
        BenchResult(
            name=f"{name}.extra",
            value=round(bound, 1),
            unit="ms",
            gate=gate,
            holds=bound <= EXTRA_MAX_MS,
        ),
    ]


def _novacron_ms(api: LabApi, disks: tuple[DiskSpec, ...]) -> float:
    began_s = time.monotonic()
    ended = api.wait(api.create_vm(_body(disks)))
    took_ms = (time.monotonic() - began_s) * 1000
    assert ended.state == "succeeded", f"the create ended {ended.state}: {ended.error}"
    api.wait(api.delete_vm("bench"))
    return took_ms


def _virsh_ms(uri: str, xml: Path) -> float:
    began_s = time.monotonic()
    _virsh(uri, "create", str(xml))
    took_ms = (time.monotonic() - began_s) * 1000
    _virsh(uri, "destroy", VIRSH_NAME)
    return took_ms


def _write_xml(api: LabApi, uri: str, disks: tuple[DiskSpec, ...], path: Path) -> None:
    """Let NovaCron make the domain once, and keep its XML under another name and disk."""
    api.wait(api.create_vm(_body(disks)))
    vm = api.vm("bench")
    tree = etree.fromstring(_virsh(uri, "dumpxml", "--inactive", vm.id).encode())
    _text(tree, "./name").text = VIRSH_NAME
    _text(tree, "./uuid").text = VIRSH_UUID
    for address in tree.findall("./devices/interface/mac"):
        address.set("address", "52:00:00:00:be:0c")
    for source in tree.findall("./devices/disk/source"):
        directory = Path(source.get("file", "")).parent
        _virsh(uri, *("vol-create-as", "default", f"{VIRSH_NAME}.qcow2", "1G", "--format", "qcow2"))
        source.set("file", str(directory / f"{VIRSH_NAME}.qcow2"))
    path.write_bytes(etree.tostring(tree))
    api.wait(api.delete_vm("bench"))


def _text(tree: etree._Element, path: str) -> etree._Element:
    found = tree.find(path)
    assert found is not None, f"a domain has {path}"
    return found


def _body(disks: tuple[DiskSpec, ...]) -> VmBody:
    return VmBody(
        name="bench",
        spec=VmSpec(
            vcpus=1,
            memory_mib=MEMORY_MIB,
            boot=BootSpec(kernel="tiny-kernel", initrd="tiny-initrd", cmdline="console=ttyS0"),
            disks=disks,
            nics=(NicSpec(network="lan"),),
        ),
    )


def _virsh(uri: str, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["virsh", "-c", uri, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"virsh {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
