"""What vouches for a node, on its disk: keys and certificates of agent and QEMU, whom it trusts.

The agent's key and certificate are in one file, so that they are replaced together or not at all.
QEMU has its own directory with names of its choosing; its key stays the same for as long as the
node does, so that each file there is good beside every earlier one.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct

from agent.config import AgentConfig
from agent.relay_node import own_certificate, relay_files
from shared import durable_files
from shared.admission import Issued
from shared.errors import ConfigInvalid, FieldError

KEY_MODE = 0o600
# QEMU's group, which the directory passes on, reads its key.
QEMU_KEY_MODE = 0o640
PUBLIC_MODE = 0o644
# By the names that libvirt hands to QEMU, which is server and client of migrations.
QEMU_KEYS = ("server-key.pem", "client-key.pem")
QEMU_CERTIFICATES = ("server-cert.pem", "client-cert.pem")
QEMU_CA = "ca-cert.pem"
QEMU_TLS_FILES = (*QEMU_KEYS, *QEMU_CERTIFICATES, QEMU_CA)


class Validity(Struct, frozen=True):
    begins_at: datetime
    ends_at: datetime


class IdentityFiles:
    """Reads and replaces them where the configuration says that they are."""

    def __init__(self, config: AgentConfig) -> None:
        self._tls = config.tls
        self._qemu = config.hypervisor.qemu_tls_dir

    @property
    def are_own(self) -> bool:
        """Whether this agent replaces them; else whoever wrote them does."""
        return self._tls.certificate == self._tls.key and self._tls.peers_ca is not None

    def check_own(self) -> None:
        """Raise ConfigInvalid unless this agent may replace them."""
        if not self.are_own:
            message = (
                "an agent that joins keeps key and certificate in one file: give certificate and "
                "key the same path, and peers_ca one of its own"
            )
            raise ConfigInvalid("of TLS", (FieldError("/tls", "not_joinable", message),))

    def validity(self) -> Validity:
        """Return from when until when the certificate is good. Raises ConfigInvalid."""
        found = own_certificate(relay_files(self._tls))
        return Validity(_time(found["notBefore"]), _time(found["notAfter"]))

    def qemu_key(self) -> str:
        """Return the key of this node's QEMU; empty while there is none. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return (self._qemu / QEMU_KEYS[0]).read_text(encoding="ascii")
        return ""

    def replace(self, key: str, qemu_key: str, issued: Issued) -> None:
        """Write what was issued for these keys. Raises OSError.

        Whom to trust comes first: what the new certificates lead to is checked by it.
        """
        self.check_own()
        assert self._tls.peers_ca is not None, "it was checked"
        write(self._tls.ca, issued.ca, PUBLIC_MODE)
        write(self._tls.peers_ca, issued.peers_ca, PUBLIC_MODE)
        for name in QEMU_KEYS:
            write(self._qemu / name, qemu_key, QEMU_KEY_MODE)
        write(self._qemu / QEMU_CA, issued.qemu_ca, PUBLIC_MODE)
        for name in QEMU_CERTIFICATES:
            write(self._qemu / name, issued.qemu_certificate, PUBLIC_MODE)
        write(self._tls.certificate, issued.certificate + key, KEY_MODE)


def _time(text: object) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(text)), UTC)


def write(path: Path, text: str, mode: int) -> None:
    """Put ``text`` at ``path``; what is so already is left alone."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_text(encoding="ascii") == text:
            return
    # An operator may run this as root, for an agent that is not: it owns its directories.
    owner_uid = path.parent.stat().st_uid if os.geteuid() == 0 else -1
    durable_files.replace(path, text.encode("ascii"), mode, owner_uid=owner_uid)
