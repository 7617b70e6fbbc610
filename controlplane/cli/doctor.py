"""`novacron doctor`: what is wrong with a cell, or soon will be, and what to do about it.

Looks, and changes nothing: it asks the control plane, and tries the ports that users and agents
need from where it runs. What only a node can see, `novacron-agent doctor` tells there.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import click
import msgspec
from cryptography import x509
from msgspec import Struct

from controlplane.cli.client import BASE, Client, decode, path_of
from controlplane.cli.invocation import Invocation, output_option, pass_invocation
from controlplane.cli.output import Format
from controlplane.cli.views import AdmissionView, ClusterView, NodeView, UsageView
from shared.addresses import host_and_port
from shared.findings import Finding, Verdict, failed, lines, warning, well, worst

CONNECT_LIMIT_S = 3.0
# A replica's certificate is renewed by its operator, who may be away for a while.
CERTIFICATE_WARNING = timedelta(days=30)
# A node's agent renews its certificate with half of seven days left.
ADMISSION_WARNING = timedelta(days=2)
# Samples come ten seconds apart; a clock that is further off than a minute spoils certificates
# that were just made, and histories.
CLOCK_WARNING, CLOCK_FAILED = timedelta(seconds=30), timedelta(minutes=2)


class Seen(Struct, frozen=True, kw_only=True):
    """What the control plane tells; ``at`` is when, by the clock of where this runs."""

    at: datetime
    cluster: ClusterView
    nodes: tuple[NodeView, ...]
    admissions: tuple[AdmissionView, ...]
    usage: tuple[UsageView, ...]


@click.command()
@output_option
@pass_invocation
def doctor(invocation: Invocation, form: str | None) -> None:
    """Look for what is wrong with the cell, or soon will be, and say what to do.

    Ends with status 1 when something has failed.
    """
    output = invocation.output(form)
    seen = _look(invocation.client, invocation.terminal.now())
    findings = [*examine(seen), *_try_replicas(seen)]
    if output.form is Format.JSON:
        output.json(msgspec.json.encode({"findings": findings}))
    else:
        for line in lines(findings):
            output.line(line)
    if worst(findings) is Verdict.FAILED:
        raise click.exceptions.Exit(1)


def _look(client: Client, now: datetime) -> Seen:
    cluster = client.get_as(ClusterView, path_of("cluster"))
    nodes = client.collect(f"{BASE}/nodes").items
    admissions = client.collect(f"{BASE}/admissions").items
    usage = client.collect(f"{BASE}/metrics", (("kind", "node"),)).items
    return Seen(
        at=now,
        cluster=cluster,
        nodes=tuple(decode(each, NodeView) for each in nodes),
        admissions=tuple(decode(each, AdmissionView) for each in admissions),
        usage=tuple(decode(each, UsageView) for each in usage),
    )


def examine(seen: Seen) -> Iterator[Finding]:
    """Return what follows from what the control plane tells; pure."""
    yield from _control_plane(seen.cluster)
    yield from _nodes(seen)
    yield from _cpu_models(seen.nodes)
    yield from _admissions(seen)
    yield from _clocks(seen)


def _control_plane(cluster: ClusterView) -> Iterator[Finding]:
    if cluster.leader is None:
        yield failed("leader", "nobody leads", "look at the replicas' logs, and at etcd's members")
    else:
        yield well("leader", f"{cluster.leader.replica} leads")
    versions = sorted({replica.version for replica in cluster.replicas})
    if len(versions) > 1:
        yield warning(
            "releases",
            f"replicas run {' and '.join(versions)}",
            "finish the upgrade (playbook upgrade), then novacron cluster finalize-upgrade",
        )
    elif cluster.upgrade_pending:
        blockers = "; ".join(each.message for each in cluster.upgrade_blockers)
        yield warning(
            "releases",
            f"the upgrade is not finalized{': ' if blockers else ''}{blockers}",
            "novacron cluster finalize-upgrade, once the new release has proven itself",
        )
    else:
        yield well("releases", f"{len(cluster.replicas)} replicas run {', '.join(versions)}")
    for member in cluster.members:
        if not member.reachable:
            yield failed(
                f"etcd at {member.endpoint}", member.problem or "does not answer", "start it again"
            )
        elif member.alarms:
            yield failed(
                f"etcd at {member.endpoint}",
                f"has the alarm {', '.join(member.alarms)}",
                "novacron cluster repair-store",
            )
    if cluster.members and all(m.reachable and not m.alarms for m in cluster.members):
        yield well("etcd", f"{len(cluster.members)} members answer; {cluster.store.detail}")


def _nodes(seen: Seen) -> Iterator[Finding]:
    versions = {replica.version for replica in seen.cluster.replicas}
    healthy = 0
    for node in seen.nodes:
        findings = list(_node(node, versions))
        healthy += not findings
        yield from findings
    if healthy:
        yield well("nodes", f"{healthy} of {len(seen.nodes)} are heard and have what they need")


def _node(node: NodeView, versions: set[str]) -> Iterator[Finding]:
    subject = f"node {node.name}"
    if node.state != "ready":
        yield failed(
            subject,
            f"is {node.state}",
            f"look there: novacron-agent doctor, journalctl -u novacron-agent (at {node.address})",
        )
    if node.inventory is None:
        return
    if node.inventory.virtualization != "kvm":
        yield warning(
            subject,
            "has no KVM: its guests run under emulation, many times slower",
            "switch virtualization on in its firmware, and load kvm_intel or kvm_amd",
        )
    version = str(node.inventory.versions.get("agent", ""))
    if version and version not in versions:
        yield warning(
            subject, f"runs agent {version}", "upgrade it (playbook upgrade, --tags agent)"
        )
    if node.inventory.migration is None or not node.inventory.migration.tls:
        yield failed(
            subject,
            "no guest can move from or to there: its QEMU has no certificates",
            "novacron-agent doctor, there",
        )


def _cpu_models(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    models: dict[str, list[str]] = {}
    for node in nodes:
        if node.inventory is not None and node.inventory.cpu.model:
            models.setdefault(node.inventory.cpu.model, []).append(node.name)
    if len(models) > 1:
        detail = "; ".join(f"{model} on {', '.join(names)}" for model, names in models.items())
        yield warning(
            "CPU models",
            f"they differ: {detail}",
            "guests move only where their CPU's features are: novacron vm explain VM tells",
        )
    elif models:
        yield well("CPU models", f"all nodes have {next(iter(models))}")


def _admissions(seen: Seen) -> Iterator[Finding]:
    soon = seen.at + ADMISSION_WARNING
    fine = 0
    for each in seen.admissions:
        if each.revoked_at is not None:
            continue
        if not each.approved:
            yield warning(
                f"node {each.name}", "waits for approval", f"novacron node approve {each.name}"
            )
        elif each.expires_at is not None and each.expires_at < seen.at:
            yield failed(
                f"node {each.name}",
                f"its certificate ended at {each.expires_at:%Y-%m-%d %H:%M} UTC",
                "make a join token (novacron node join-token), and run novacron-agent join there",
            )
        elif each.expires_at is not None and each.expires_at < soon:
            yield warning(
                f"node {each.name}",
                f"its certificate ends at {each.expires_at:%Y-%m-%d %H:%M} UTC",
                "its agent should have renewed it: journalctl -u novacron-agent, there",
            )
        else:
            fine += 1
    if fine:
        yield well("nodes' certificates", f"{fine} are good and renewed in time")


def _clocks(seen: Seen) -> Iterator[Finding]:
    """Nodes' samples carry the dates of their own clocks; those of silent nodes say nothing."""
    ready = {node.id: node.name for node in seen.nodes if node.state == "ready"}
    exact = 0
    for each in seen.usage:
        if each.as_of is None or each.object not in ready:
            continue
        off = each.as_of - seen.at
        if abs(off) < CLOCK_WARNING:
            exact += 1
            continue
        say = failed if abs(off) >= CLOCK_FAILED else warning
        where = "ahead of" if off > timedelta() else "behind"
        yield say(
            f"node {ready[each.object]}",
            f"its clock, or its latest sample, is {abs(off).total_seconds():.0f} s {where} here",
            "timedatectl set-ntp true, there and here; an agent that sends no samples says why",
        )
    if exact:
        yield well("clocks", f"those of {exact} nodes agree with this one")


def _try_replicas(seen: Seen) -> Iterator[Finding]:
    for replica in seen.cluster.replicas:
        address = urlsplit(replica.url)
        assert address.hostname is not None, "a replica's URL names a machine"
        subject = f"replica {replica.name}"
        yield _api_port(subject, address.hostname, address.port or 443, seen.at)
        yield _agents_port(subject, replica.agent_address)


def _api_port(subject: str, name: str, port: int, now: datetime) -> Finding:
    # The API was asked with all due care before; this looks at what is shown, whatever it is.
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((name, port), CONNECT_LIMIT_S) as connection,
            blind.wrap_socket(connection, server_hostname=name) as link,
        ):
            der = link.getpeercert(binary_form=True)
    except OSError as error:
        return failed(
            subject, f"port {port} of {name}: {error.strerror or error}", "is it running, and open?"
        )
    assert der is not None, "a server shows a certificate"
    ends_at = _end_of(der)
    detail = f"its certificate ends at {ends_at:%Y-%m-%d %H:%M} UTC"
    if ends_at < now + CERTIFICATE_WARNING:
        say = failed if ends_at < now else warning
        return say(subject, detail, "playbook rotate_certificates")
    return well(subject, f"answers at {name}:{port}; {detail}")


def _agents_port(subject: str, address: str) -> Finding:
    try:
        socket.create_connection(host_and_port(address), CONNECT_LIMIT_S).close()
    except OSError as error:
        return warning(
            subject,
            f"{address}: {error.strerror or error}",
            "agents need it: open it between nodes and replicas",
        )
    return well(subject, f"takes agents at {address}")


def _end_of(der: bytes) -> datetime:
    return x509.load_der_x509_certificate(der).not_valid_after_utc
