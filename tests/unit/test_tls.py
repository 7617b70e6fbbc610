"""shared.tls: who a certificate speaks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigInvalid, Unauthenticated
from shared.tls import Identity, Role, identity_among, load_material, parse_identity

AGENT = "novacron://k3f9q2/agent/n1"


def test_an_identity_reads_back_as_it_was_written() -> None:
    identity = Identity("k3f9q2", Role.REPLICA, "r1.east")

    assert parse_identity(str(identity)) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "novacron://k3f9q2/agent",
        "novacron://k3f9q2/agent/",
        "novacron://k3f9q2/agent/n1/",
        "novacron://k3f9q2/agent/n1\n",
        "novacron://k3f9q2/agent/../replica",
        "novacron://k3f9q2/agent/N1",
        "novacron://k3f9q2/agent/n1-",
        f"novacron://k3f9q2/agent/{'n' * 64}",
        "novacron://k3f9q2/admin/n1",
        "novacron://k3f9q/agent/n1",
        "novacron://k3f9qz/agent/n1",
        "https://k3f9q2/agent/n1",
        " novacron://k3f9q2/agent/n1",
    ],
)
def test_anything_else_is_nobody(uri: str) -> None:
    with pytest.raises(Unauthenticated):
        parse_identity(uri)


def test_one_identity_is_found_among_other_names() -> None:
    found = identity_among([b"n1", "localhost", AGENT.encode(), "127.0.0.1", "https://elsewhere"])

    assert found == Identity("k3f9q2", Role.AGENT, "n1")


@pytest.mark.parametrize("names", [[], ["n1"], [AGENT, AGENT.replace("agent", "replica")]])
def test_none_or_two_identities_are_refused(names: list[str]) -> None:
    with pytest.raises(Unauthenticated):
        identity_among(names)


def test_an_identity_that_does_not_parse_is_not_passed_over() -> None:
    with pytest.raises(Unauthenticated):
        identity_among(["novacron://k3f9q2/admin/root"])


def test_every_fault_of_the_files_is_told_at_once(tmp_path: Path) -> None:
    not_pem = tmp_path / "ca.crt"
    not_pem.write_text("hello")

    with pytest.raises(ConfigInvalid) as caught:
        load_material(not_pem, tmp_path / "missing.crt", tmp_path / "missing.key")

    assert [(e.pointer, e.code) for e in caught.value.errors] == [
        ("/tls/ca", "not_pem"),
        ("/tls/certificate", "unreadable"),
        ("/tls/key", "unreadable"),
    ]
