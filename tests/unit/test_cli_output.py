"""controlplane.cli.output: figures and tables for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controlplane.cli.output import Table, age, percent, printable, render_table, size

NOW = datetime(2026, 11, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (190.2 * 1024**3, "190 GiB"),
        (2.0**70, "1024 EiB"),
    ],
)
def test_sizes_are_iec(size_bytes: float | None, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (86400 * 41, "41d")],
)
def test_ages_are_relative(seconds: int, text: str) -> None:
    assert age(NOW - timedelta(seconds=seconds), NOW) == text


def test_percent_keeps_what_is_small() -> None:
    assert (percent(0.24), percent(95.4), percent(None)) == ("0.2", "95", "-")


def test_colour_does_not_move_columns() -> None:
    table = Table(("NAME", "STATE", "NODE"), (("a", "Running", "n1"), ("bcd", "Pending", "-")))

    plain, coloured = render_table(table), render_table(table, coloured=True)

    assert "\x1b[32mRunning\x1b[0m" in coloured
    stripped = coloured
    for code in ("\x1b[32m", "\x1b[33m", "\x1b[0m"):
        stripped = stripped.replace(code, "")
    assert stripped == plain
    assert plain.splitlines()[1] == "a      Running   n1"


def test_text_of_others_moves_no_cursor() -> None:
    assert printable("a\x1b[2Jb\n") == "a�[2Jb�"
