"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shared import durable_files


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_new_file_never_replaces_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "key"
    durable_files.write_new(path, b"first", 0o400)

    with pytest.raises(FileExistsError):
        durable_files.write_new(path, b"second", 0o400)

    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["key"]


def test_one_in_the_place_of_another_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "key"
    durable_files.replace(path, b"first", 0o400)
    durable_files.replace(path, b"second", 0o640)

    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["key"]


def test_what_cannot_be_put_there_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()

    with pytest.raises(OSError, match="directory"):
        durable_files.replace(tmp_path / "key", b"", 0o400)

    assert names(tmp_path) == ["key"]


@pytest.mark.parametrize("put", [durable_files.write_new, durable_files.replace])
def test_the_mode_is_as_asked_for_whatever_the_umask(tmp_path: Path, put: object) -> None:
    assert callable(put)
    before = os.umask(0o777)
    try:
        put(tmp_path / "a", b"", 0o644)
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
