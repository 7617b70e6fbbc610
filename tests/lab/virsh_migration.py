"""The command that migrates a domain live without NovaCron: what our own way is measured against.

It asks libvirt for the same: peer to peer, TLS for memory and disks with the destination's name
checked, the definition moved along. Builds command lines only; whoever runs one has a relay open.
"""

from __future__ import annotations

from msgspec import Struct

from tests.lab.nodes import LightNode


class VirshMigration(Struct, frozen=True, kw_only=True):
    """One migration. ``relay_uri`` is the destination's libvirtd as the source's reaches it.

    ``copied``: the targets (`vda`) of the disks that the destination has an empty volume for.
    ``shared``: a disk is on storage of both. libvirt cannot see that a directory of the lab is
    shared, whatever the disk's cache mode, so it has to be told. ``expected_name``: whom the
    destination's QEMU has to be, if not the destination's node.
    """

    domain: str
    source: LightNode
    destination: LightNode
    relay_uri: str
    copied: tuple[str, ...] = ()
    shared: bool = False
    expected_name: str = ""

    def command(self) -> tuple[str, ...]:
        copies = ("--copy-storage-all", "--migrate-disks", ",".join(self.copied))
        return (
            *("virsh", "-c", self.source.libvirt_uri, "migrate", "--live", "--p2p"),
            *("--persistent", "--undefinesource"),
            *("--tls", "--tls-destination", self.expected_name or self.destination.name),
            *("--migrateuri", f"tcp://{self.destination.address}"),
            *("--listen-address", self.destination.address),
            *(copies if self.copied else ()),
            *(("--unsafe",) if self.shared else ()),
            *("--domain", self.domain, "--desturi", self.relay_uri),
        )
