"""How things look: tables, descriptions, and figures for people.

Figures are rounded here and nowhere else: IEC units, relative ages. JSON is what the API sent,
indented, never re-rendered.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from datetime import datetime

import click
import msgspec
from msgspec import Struct

from controlplane.cli.terminal import Terminal
from controlplane.cli.views import Listing

NOTHING = "-"
_GAP = "   "
_MIB = 1024 * 1024
_IEC = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_AGES = ((86400 * 2, 86400, "d"), (3600 * 2, 3600, "h"), (60 * 2, 60, "m"), (0, 1, "s"))
_COLOURS = {
    "green": ("running", "ready", "succeeded", "done", "yes", "fits"),
    "yellow": ("pending", "starting", "stopping", "deleting", "paused", "cancelling", "cordoned"),
    "red": ("crashed", "failed", "silent", "no", "unreachable"),
}
_COLOUR_OF = {word: colour for colour, words in _COLOURS.items() for word in words}


class Format(enum.StrEnum):
    TABLE = "table"
    JSON = "json"
    NAME = "name"


class Table(Struct, frozen=True):
    """Columns and rows of finished text; cells whose column is in ``states`` get a colour."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    states: tuple[str, ...] = ("STATE",)


class Output:
    """Prints in the format that was asked for."""

    def __init__(self, terminal: Terminal, form: Format) -> None:
        self._terminal = terminal
        self.form = form

    def table(self, table: Table) -> None:
        self._terminal.print(render_table(table, coloured=self._terminal.coloured))

    def description(self, fields: Sequence[tuple[str, str]]) -> None:
        """Print labelled values, one a line; lines of one value are aligned below each other."""
        width = max(len(label) for label, _ in fields) + 1
        for label, value in fields:
            head = f"{label}:".ljust(width + 1)
            text = ("\n" + " " * (width + 1)).join(map(printable, value.split("\n")))
            self._terminal.print((head + self._tint(text)).rstrip())

    def json(self, body: bytes | msgspec.Raw) -> None:
        text = msgspec.json.format(bytes(body), indent=2)
        self._terminal.print(text.decode())

    def listing(self, listing: Listing) -> None:
        self.json(msgspec.json.encode(listing))

    def names(self, names: Sequence[str]) -> None:
        if names:
            self._terminal.print("\n".join(names))

    def line(self, text: str) -> None:
        self._terminal.print(text)

    def _tint(self, text: str) -> str:
        return tint(text) if self._terminal.coloured else text


def render_table(table: Table, *, coloured: bool = False) -> str:
    """Return the table with columns as wide as their widest cell, and no trailing blanks."""
    rows = [tuple(map(printable, row)) for row in table.rows]
    lines = (table.columns, *rows)
    assert all(len(line) == len(table.columns) for line in lines), "a row has every column"
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    painted = [i for i, name in enumerate(table.columns) if coloured and name in table.states]
    rendered = [_render_line(table.columns, widths, ())]
    rendered += [_render_line(row, widths, painted) for row in rows]
    return "\n".join(rendered)


def tint(text: str) -> str:
    """Return ``text`` in the colour of the state that it is, or as it is."""
    colour = _COLOUR_OF.get(text.split(",")[0].split(" ")[0].lower())
    return click.style(text, fg=colour) if colour else text


def size(size_bytes: float | None) -> str:
    """Return bytes in the largest IEC unit that leaves at least 1, to three figures."""
    if size_bytes is None:
        return NOTHING
    value = float(size_bytes)
    for unit in _IEC:
        if abs(value) < 1024 or unit == _IEC[-1]:
            break
        value /= 1024
    shown = f"{value:.0f}" if value >= 99.95 or value == int(value) else f"{value:.1f}"
    return f"{shown} {unit}"


def mebibytes(memory_mib: float | None) -> str:
    return NOTHING if memory_mib is None else size(memory_mib * _MIB)


def rate(bytes_per_s: float | None) -> str:
    return NOTHING if bytes_per_s is None else f"{size(round(bytes_per_s))}/s"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def age(since: datetime | None, now: datetime) -> str:
    """Return how long ago ``since`` was, in its largest sensible unit."""
    if since is None:
        return NOTHING
    seconds = max(0, int((now - since).total_seconds()))
    for least, length, unit in _AGES:
        if seconds >= least:
            return f"{seconds // length}{unit}"
    raise AssertionError("the last row fits every age")


def stamp(at: datetime | None) -> str:
    """Return a time as RFC 3339 in UTC, to the second."""
    return NOTHING if at is None else at.strftime("%Y-%m-%dT%H:%M:%SZ")


def labels(values: dict[str, str]) -> str:
    return ",".join(f"{key}={values[key]}" for key in sorted(values)) or NOTHING


def printable(text: str) -> str:
    """Return text without control characters: what a guest or a peer sent may not move a cursor."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _render_line(cells: Sequence[str], widths: Sequence[int], painted: Sequence[int]) -> str:
    padding: Callable[[int], str] = lambda i: " " * (widths[i] - len(cells[i]))  # noqa: E731
    texts = [(tint(c) if i in painted else c) + padding(i) for i, c in enumerate(cells)]
    return _GAP.join(texts).rstrip()
