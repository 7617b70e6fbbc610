"""`novacron-agent doctor`: what on this node keeps its agent from working, and what to do about it.

Looks, and changes nothing. Run as root or as the agent's user; what only the running agent knows
(`novacron doctor` asks the control plane for it) is not looked at.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from agent.config import AgentConfig, TlsConfig
from agent.handshake import why_not
from agent.identity_files import QEMU_KEYS, QEMU_TLS_FILES, IdentityFiles, Validity
from agent.renewal import WORRY_AT
from shared.clock import SystemClock
from shared.errors import ConfigInvalid
from shared.findings import Finding, Verdict, failed, lines, warning, well, worst

KVM = Path("/dev/kvm")
# Both answer at once, or their machine is silent.
CONNECT_LIMIT_S = 3.0
JOIN = (
    "make a join token (novacron node join-token) and run novacron-agent join --token-file FILE "
    "--endpoint https://REPLICA:8443"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def diagnose(config: AgentConfig, _: argparse.Namespace) -> None:
    """Print what is found; ends the process with status 1 when something has failed."""
    findings = list(examine(config, SystemClock().now()))
    sys.stdout.write("\n".join(lines(findings)) + "\n")
    if worst(findings) is Verdict.FAILED:
        sys.exit(1)


def examine(config: AgentConfig, now: datetime) -> Iterator[Finding]:
    yield from identity(config, now)
    yield from qemu_files(config.hypervisor.qemu_tls_dir)
    yield kvm(KVM)
    yield libvirt(config.relay.libvirt_socket)
    for address in config.controlplane:
        yield replica(address, config.tls)


def identity(config: AgentConfig, now: datetime) -> Iterator[Finding]:
    """Whether the agent's certificate is there, good, and nobody else's to read."""
    files, key = IdentityFiles(config), config.tls.key
    try:
        mode = key.stat().st_mode
        validity = files.validity()
    except OSError as error:
        yield failed("certificate", f"{error.filename}: {error.strerror}", JOIN)
        return
    except ConfigInvalid as error:
        yield failed("certificate", str(error), JOIN)
        return
    yield certificate(validity, now, renews=files.are_own)
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        yield failed("key", f"{key} has mode {stat.S_IMODE(mode):04o}", f"chmod 0600 {key}")
    else:
        yield well("key", f"{key} has mode {stat.S_IMODE(mode):04o}")


def certificate(validity: Validity, now: datetime, *, renews: bool) -> Finding:
    ends = f"{validity.ends_at:%Y-%m-%d %H:%M} UTC"
    if now < validity.begins_at:
        begins = f"{validity.begins_at:%Y-%m-%d %H:%M} UTC"
        detail = f"it begins at {begins}, and this node's clock says {now:%Y-%m-%d %H:%M} UTC"
        return failed("certificate", detail, "set the clock (timedatectl set-ntp true)")
    if now >= validity.ends_at:
        detail = f"it ended at {ends}, and this node's clock says {now:%Y-%m-%d %H:%M} UTC"
        return failed("certificate", detail, f"if the clock is right, {JOIN}")
    if now >= validity.begins_at + WORRY_AT * (validity.ends_at - validity.begins_at):
        remedy = (
            "the agent's log says why it gets no new one"
            if renews
            else "nobody renews it: run novacron init for this node, or let it join"
        )
        return warning("certificate", f"it ends at {ends}", remedy)
    return well("certificate", f"good until {ends}")


def qemu_files(directory: Path) -> Iterator[Finding]:
    """Whether this node's QEMU can show who it is: without that no guest moves."""
    remedy = "let the node join (novacron-agent join), or see docs/install.md"
    try:
        missing = [name for name in QEMU_TLS_FILES if not (directory / name).exists()]
    except OSError as error:
        yield failed("QEMU's certificates", f"{directory}: {error.strerror}", remedy)
        return
    if missing:
        listed = ", ".join(missing)
        yield failed("QEMU's certificates", f"{directory} lacks {listed}", remedy)
        return
    yield well("QEMU's certificates", f"{directory} has them")
    for name in QEMU_KEYS:
        mode = (directory / name).stat().st_mode
        if mode & stat.S_IRWXO:
            path = directory / name
            yield failed("QEMU's key", f"everybody may read {path}", f"chmod 0640 {path}")


def kvm(device: Path) -> Finding:
    if device.exists():
        return well("KVM", f"{device} is there")
    return warning(
        "KVM",
        f"{device} is missing: guests run under emulation, many times slower",
        "switch virtualization on in the firmware, and load kvm_intel or kvm_amd",
    )


def libvirt(path: Path) -> Finding:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as local:
            local.settimeout(CONNECT_LIMIT_S)
            local.connect(os.fspath(path))
    except OSError as error:
        remedy = "systemctl status libvirtd; is the agent in group libvirt?"
        return failed("libvirt", f"{path}: {error.strerror or error}", remedy)
    return well("libvirt", f"{path} takes connections")


def replica(address: str, tls: TlsConfig) -> Finding:
    """Whether a replica takes this agent: the port is open, and both certificates are good."""
    reason = why_not(address, tls)
    if reason:
        remedy = "is it running, its port open from this node, and are both clocks right?"
        return failed("control plane", f"{address}: {reason}", remedy)
    return well("control plane", f"{address} takes this agent")
