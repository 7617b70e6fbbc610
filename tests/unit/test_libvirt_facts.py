"""Whether QEMU finds what it encrypts migrations with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from agent.identity_files import QEMU_TLS_FILES
from agent.libvirt_facts import has_qemu_tls
from agent.libvirt_settings import LibvirtSettings


def _settings(directory: Path) -> LibvirtSettings:
    return LibvirtSettings(uri="qemu:///system", artefact_dir=directory, qemu_tls_dir=directory)


def test_every_file_has_to_be_there(tmp_path: Path) -> None:
    for name in QEMU_TLS_FILES:
        assert not has_qemu_tls(_settings(tmp_path))
        (tmp_path / name).touch()
    assert has_qemu_tls(_settings(tmp_path))


def test_what_may_not_be_looked_into_is_missing_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    # Nothing is closed to root, whom tests run as.
    monkeypatch.setattr(Path, "exists", refused)
    with caplog.at_level(logging.WARNING):
        assert not has_qemu_tls(_settings(tmp_path))
    assert f"{tmp_path}: the agent may not look into it" in caplog.text
    assert "0755" in caplog.text
