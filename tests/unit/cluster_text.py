"""Reads clusters from text, so that a scheduler test is a file that people can read.

    settings cpu_overcommit=4 memory_reserve_mib=512      first line, optional
    node n1 cpus=8 memory=16384 [state=silent] [cordon=WHY] [labels=zone:a,…] [networks=lan,…]
            [artefacts=k,…] [pools=default:100:80,san:100:80:shared,…] [inventory=none]
            [migration=tls|plain|none] [virt=kvm] [qemu=7.2.0]
    vm db-1 on=n1 vcpus=2 memory=4096 [power=stopped] [disks=default:20] [apart=web!] [with=db]
            [moving=n2] [left=n3]
    move db-1                                                  a VM that runs, to another node
    place web-1 vcpus=… memory=… [labels=…] [networks=…] [kernel=k] …          a new VM
      -> n2                                                it goes there, and the next line sees it
      -> none                                              or nowhere, and every node is listed
      n1: insufficient_memory cordoned

Groups: ``apart`` is anti-affinity, ``with`` is affinity; ``!`` makes the rule hard.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from controlplane.scheduler.request import SchedulerSettings
from controlplane.scheduler.snapshot import Snapshot, build_snapshot
from shared.model import (
    Attempt,
    AttemptState,
    BootSpec,
    CpuFacts,
    DiskSpec,
    GroupRule,
    Inventory,
    MigrationFacts,
    NicSpec,
    Node,
    NodeState,
    PlacementSpec,
    PoolFacts,
    Power,
    VersionFacts,
    Vm,
    VmSpec,
    VmStatus,
)
from shared.moves import Leftover, MigrationClaim, MigrationStage

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
Options = dict[str, str]


@dataclass
class Case:
    """One VM to place, the node it should go to, and why it cannot go to the others.

    ``source`` is where it runs, if it is to move.
    """

    vm: Vm
    source: Node | None = None
    node: str | None = None
    reasons: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class ClusterText:
    settings: SchedulerSettings
    nodes: list[Node]
    vms: list[Vm]
    cases: list[Case]

    def vm(self, name: str) -> Vm:
        return next(vm for vm in self.vms if vm.name == name)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def snapshot(self) -> Snapshot:
        return build_snapshot(self.nodes, self.vms, self.settings)


def read_cluster(path: Path) -> ClusterText:
    """Read a cluster and its cases; raises ValueError with the line that is wrong."""
    cluster = ClusterText(SchedulerSettings(), [], [], [])
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        try:
            _read_line(cluster, words)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path.name}:{number}: {line.strip()!r}: {error}") from error
    return cluster


def make_node(name: str, **options: str) -> Node:
    """Make a node record from the words of a ``node`` line; its id is ``node-NAME``."""
    return Node(
        id=f"node-{name}",
        name=name,
        labels=_pairs(options.get("labels", "")),
        created_at=EPOCH,
        updated_at=EPOCH,
        state=NodeState(options.get("state", "ready")),
        state_since=EPOCH,
        cordoned="cordon" in options,
        cordon_reason=options.get("cordon", ""),
        boot_id="boot-1",
        inventory=None if options.get("inventory") == "none" else _inventory(options),
    )


def make_vm(name: str, **options: str) -> Vm:
    """Make a VM record from the words of a ``vm`` or ``place`` line; its id is ``vm-NAME``."""
    power = Power(options.get("power", "running"))
    spec = VmSpec(
        vcpus=int(options["vcpus"]),
        memory_mib=int(options["memory"]),
        power=power,
        boot=BootSpec(kernel=options.get("kernel", "kernel")),
        disks=tuple(
            DiskSpec(name=f"d{i}", pool=pool, size_gib=int(size))
            for i, (pool, size) in enumerate(d.split(":") for d in _words(options.get("disks", "")))
        ),
        nics=tuple(NicSpec(network=network) for network in _words(options.get("networks", ""))),
        placement=PlacementSpec(
            node_labels=_pairs(options.get("labels", "")),
            affinity=_rules(options.get("with", "")),
            anti_affinity=_rules(options.get("apart", "")),
        ),
    )
    return Vm(
        id=f"vm-{name}",
        name=name,
        created_at=EPOCH,
        updated_at=EPOCH,
        spec=spec,
        domain_name=f"vm-{name}",
        domain_uuid="",
        status=_status(options, power),
    )


def _read_line(cluster: ClusterText, words: list[str]) -> None:
    kind, *rest = words
    if kind == "->":
        cluster.cases[-1].node = None if rest[0] == "none" else rest[0]
    elif kind.endswith(":"):
        cluster.cases[-1].reasons[kind[:-1]] = rest
    elif kind == "settings":
        figures = {k: float(v) for k, v in _options(rest).items()}
        cluster.settings = SchedulerSettings(
            cpu_overcommit=figures.get("cpu_overcommit", 4.0),
            memory_overcommit=figures.get("memory_overcommit", 1.0),
            memory_reserve_mib=int(figures.get("memory_reserve_mib", 512)),
        )
    elif kind == "node":
        cluster.nodes.append(make_node(rest[0], **_options(rest[1:])))
    elif kind == "vm":
        cluster.vms.append(make_vm(rest[0], **_options(rest[1:])))
    elif kind == "place":
        cluster.cases.append(Case(make_vm(rest[0], **_options(rest[1:]))))
    elif kind == "move":
        vm = cluster.vm(rest[0])
        assert vm.status.node is not None, "it runs somewhere"
        cluster.cases.append(Case(vm, cluster.node(vm.status.node.removeprefix("node-"))))
    else:
        raise ValueError(f"no such line: {kind}")


def _options(words: list[str]) -> Options:
    return dict(word.split("=", 1) for word in words)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split(":", 1) for word in _words(text))


def _rules(text: str) -> tuple[GroupRule, ...]:
    return tuple(GroupRule(group=w.rstrip("!"), hard=w.endswith("!")) for w in _words(text))


def _inventory(options: Options) -> Inventory:
    pools = [pool.split(":") for pool in _words(options.get("pools", ""))]
    return Inventory(
        cpus=int(options["cpus"]),
        memory_mib=int(options["memory"]),
        cpu=CpuFacts(model="test"),
        pools=tuple(
            PoolFacts(
                name=name, capacity_gib=float(capacity), free_gib=float(free), shared=bool(shared)
            )
            for name, capacity, free, *shared in pools
        ),
        networks=tuple(_words(options.get("networks", ""))),
        artefacts=tuple(_words(options.get("artefacts", "kernel"))),
        versions=VersionFacts(
            agent="0", libvirt="9.0.0", qemu=options.get("qemu", "7.2.0"), kernel="6.1"
        ),
        virtualization=options.get("virt", "kvm"),
        migration=_migration(options.get("migration", "tls")),
    )


def _migration(able: str) -> MigrationFacts | None:
    if able == "none":
        return None
    return MigrationFacts(address="192.0.2.1", relay="192.0.2.1:8445", tls=able == "tls")


def _status(options: Options, power: Power) -> VmStatus:
    if "on" not in options:
        return VmStatus()
    node = f"node-{options['on']}"
    ended = power is Power.STOPPED
    state = AttemptState(options.get("attempt", "ended" if ended else "running"))
    attempt = Attempt(
        generation=1,
        node=f"node-{options.get('runs_on', options['on'])}",
        boot_id="boot-1",
        state=state,
        permitted_at=EPOCH,
    )
    return VmStatus(
        node=node,
        generation=2 if "moving" in options else 1,
        attempt=attempt,
        migration=_claim(options),
        leftovers=tuple(
            Leftover(node=f"node-{name}", generation=1) for name in _words(options.get("left", ""))
        ),
    )


def _claim(options: Options) -> MigrationClaim | None:
    """A claim for which a generation was given out; every disk is copied."""
    if "moving" not in options:
        return None
    disks = _words(options.get("disks", ""))
    return MigrationClaim(
        operation="op-1",
        stage=MigrationStage.TRANSFER,
        source=f"node-{options['on']}",
        source_generation=1,
        destination=f"node-{options['moving']}",
        generation=2,
        boot_id="boot-1",
        copied=tuple(f"d{number}" for number in range(len(disks))),
    )
