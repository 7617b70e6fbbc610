"""From one CA to the next without a moment in which somebody is not trusted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from controlplane import pki
from controlplane.cell_files import CellFiles, Rotation
from shared.clock import SystemClock
from shared.errors import ValidationFailed

REPLICA, MEMBER = "replicas/r1/controlplane", "members/m1/etcd"
AUTHORITIES = {REPLICA: "ca", MEMBER: "etcd-ca"}


@pytest.fixture
def cell(tmp_path: Path) -> CellFiles:
    files = CellFiles(tmp_path / "cell", SystemClock(), random.Random(1))
    files.ensure_cell()
    _add(files)
    return files


def _add(files: CellFiles) -> None:
    files.add_replica("r1", "10.0.0.1")
    files.add_member("m1", "10.0.0.1")


def _is_trusted(files: CellFiles, leaf: bytes, authority: str) -> bool:
    """Tell whether the file of a CA vouches for a certificate."""
    certificate = x509.load_pem_x509_certificate(leaf)
    for pem in pki.split((files.root / f"{authority}.crt").read_bytes()):
        try:
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(pem))
        except (InvalidSignature, ValueError):
            continue
        return True
    return False


def _leaves(files: CellFiles) -> dict[str, bytes]:
    return {stem: (files.root / f"{stem}.crt").read_bytes() for stem in AUTHORITIES}


def _trusts(files: CellFiles, leaves: dict[str, bytes]) -> set[bool]:
    return {_is_trusted(files, leaf, AUTHORITIES[stem]) for stem, leaf in leaves.items()}


@pytest.mark.parametrize("times", [1, 2], ids=["once", "each step twice"])
def test_old_and_new_are_trusted_until_the_end(cell: CellFiles, times: int) -> None:
    old = _leaves(cell)
    _step(cell, Rotation.BEGIN, times)
    assert _trusts(cell, old) == {True}
    cell.reissue(AUTHORITIES)
    _add(cell)
    assert _trusts(cell, _leaves(cell)) == {True}
    _step(cell, Rotation.SWITCH, times)
    assert _trusts(cell, old) == {True}
    cell.reissue(AUTHORITIES)
    _add(cell)
    new = _leaves(cell)
    assert _trusts(cell, new) == {True}
    _step(cell, Rotation.END, times)
    assert _trusts(cell, new) == {True}
    assert _trusts(cell, old) == {False}
    assert not list(cell.root.glob("*.new.key"))
    # Whoever was cut off here runs all of it again: that begins nothing.
    for step in (Rotation.BEGIN, Rotation.SWITCH, Rotation.END):
        cell.rotate(step)
    assert _trusts(cell, new) == {True}
    assert _trusts(cell, old) == {False}
    _step(cell, Rotation.DONE, times)
    cell.rotate(Rotation.BEGIN)
    assert len(pki.split((cell.root / "ca.crt").read_bytes())) == 2


def _step(cell: CellFiles, step: Rotation, times: int) -> None:
    for _ in range(times):
        cell.rotate(step)


def test_one_that_was_cut_off_in_its_switch_is_run_again(cell: CellFiles) -> None:
    cell.rotate(Rotation.BEGIN)
    key = cell.root / "ca.new.key"
    kept = key.read_bytes()
    cell.rotate(Rotation.SWITCH)
    # The certificates were written, the key was not yet in its place.
    old_key = pki.key_pem(pki.new_key())
    (cell.root / "ca.key").chmod(0o600)
    (cell.root / "ca.key").write_bytes(old_key)
    key.write_bytes(kept)
    cell.rotate(Rotation.SWITCH)
    authority = pki.load_authority(cell.root / "ca.crt", cell.root / "ca.key")
    assert pki.key_pem(authority.key) == kept


def test_a_step_whose_time_has_not_come_is_refused(cell: CellFiles) -> None:
    with pytest.raises(ValidationFailed, match="begin first"):
        cell.rotate(Rotation.SWITCH)
    cell.rotate(Rotation.BEGIN)
    with pytest.raises(ValidationFailed, match="switch first"):
        cell.rotate(Rotation.END)
