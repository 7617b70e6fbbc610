"""`novacron events`: history as the control plane tells it, oldest first, without gaps."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import click
import msgspec

from controlplane.cli import output as out
from controlplane.cli.client import BASE, Query, decode
from controlplane.cli.errors import ApiProblem, Exit, Unreachable
from controlplane.cli.invocation import Invocation, output_option, pass_invocation
from controlplane.cli.output import Format, Output
from controlplane.cli.views import EventView, Page

TAIL = 50
FOLLOW_PERIOD_S = 1.0


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--object", "about", metavar="NAME", help="Only about this VM, node or id.")
@click.option("--kind", help="Only of this kind, such as vm.running.")
@click.option("--since", default="", metavar="ID", help="All after this event.")
@output_option
@pass_invocation
def events(
    invocation: Invocation,
    follow: bool,
    about: str | None,
    kind: str | None,
    since: str,
    form: str | None,
) -> None:
    """Show what happened: the last events, or all after --since."""
    query: list[tuple[str, str | int]] = []
    if about is not None:
        query.append(("object", about))
    if kind is not None:
        query.append(("kind", kind))
    show_events(invocation, invocation.output(form), tuple(query), since=since, follow=follow)


def show_events(
    invocation: Invocation, output: Output, query: Query, *, since: str, follow: bool
) -> None:
    """Print events after ``since``, or the last ones; then, if asked to, those that come.

    JSON is a list, and one event a line while following.
    """
    pages = _Pages(invocation, query, since)
    seen: deque[msgspec.Raw] = deque(pages.read(), maxlen=None if since else TAIL)
    if output.form is Format.JSON and not follow:
        output.json(msgspec.json.encode(Page(tuple(seen), None, pages.revision)))
        return
    for event in seen:
        _print(output, event)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(invocation, output, pages)


class _Pages:
    """Reads on from the last event that was read."""

    def __init__(self, invocation: Invocation, query: Query, since: str) -> None:
        self._invocation = invocation
        self._query = query
        self._since = since
        self.revision = ""

    def read(self) -> Iterator[msgspec.Raw]:
        """Yield every event that is there and was not read yet."""
        since: Query = (("since", self._since),) if self._since else ()
        for page in self._invocation.client.pages(f"{BASE}/events", (*self._query, *since)):
            self.revision = page.revision
            for item in page.items:
                yield item
                self._since = decode(item, EventView).id
            if not page.items:
                # Nothing that matches happened up to here: no need to look through it again.
                self._since = page.revision


def _follow(invocation: Invocation, output: Output, pages: _Pages) -> None:
    while True:
        invocation.terminal.sleep(FOLLOW_PERIOD_S)
        try:
            for event in pages.read():
                _print(output, event)
        except (Unreachable, ApiProblem) as error:
            if error.exit_with() is not Exit.UNREACHABLE:
                raise
            invocation.terminal.tell(f"{error}; trying again")


def _print(output: Output, raw: msgspec.Raw) -> None:
    event = decode(raw, EventView)
    if output.form is Format.JSON:
        output.line(bytes(raw).decode())
    elif output.form is Format.NAME:
        output.line(event.id)
    else:
        data = msgspec.json.encode(event.data).decode() if event.data else ""
        words = (out.stamp(event.at), event.kind, event.object, f"by {event.by}", data)
        output.line(out.printable("  ".join(word for word in words if word)))
