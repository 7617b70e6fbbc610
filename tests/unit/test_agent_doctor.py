"""What `novacron-agent doctor` sees on its node."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent import doctor
from agent.identity_files import QEMU_TLS_FILES, Validity
from shared.findings import Verdict

BORN = datetime(2026, 11, 1, tzinfo=UTC)
VALIDITY = Validity(BORN, BORN + timedelta(days=7))


@pytest.mark.parametrize(
    ("after", "verdict", "says"),
    [
        (timedelta(days=-2), Verdict.FAILED, "set the clock"),
        (timedelta(days=1), Verdict.OK, ""),
        (timedelta(days=6), Verdict.WARNING, "the agent's log"),
        (timedelta(days=7), Verdict.FAILED, "novacron-agent join"),
    ],
)
def test_a_certificate_is_judged_by_this_nodes_clock(
    after: timedelta, verdict: Verdict, says: str
) -> None:
    found = doctor.certificate(VALIDITY, BORN + after, renews=True)

    assert found.verdict is verdict
    assert says in found.remedy


def test_a_certificate_that_nobody_renews_says_so() -> None:
    found = doctor.certificate(VALIDITY, BORN + timedelta(days=6), renews=False)

    assert "nobody renews it" in found.remedy


def test_qemus_files_are_all_there_and_their_key_is_not_everybodys(tmp_path: Path) -> None:
    def verdicts() -> list[Verdict]:
        return [each.verdict for each in doctor.qemu_files(tmp_path)]

    (missing,) = doctor.qemu_files(tmp_path)
    assert missing.verdict is Verdict.FAILED
    assert "server-key.pem" in missing.detail
    for name in QEMU_TLS_FILES:
        (tmp_path / name).touch(0o640)
    assert verdicts() == [Verdict.OK]
    (tmp_path / "client-key.pem").chmod(0o644)
    assert verdicts() == [Verdict.OK, Verdict.FAILED]


def test_kvm_is_there_or_not(tmp_path: Path) -> None:
    assert doctor.kvm(tmp_path).verdict is Verdict.OK
    assert doctor.kvm(tmp_path / "kvm").verdict is Verdict.WARNING


def test_libvirt_takes_connections_or_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        refused = doctor.libvirt(path)
        assert refused.verdict is Verdict.FAILED
        assert "refused" in refused.detail
        listening.listen()
        assert doctor.libvirt(path).verdict is Verdict.OK
