"""`novacron events`: history as the control plane tells it, oldest first, without gaps."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import click
import msgspec

from controlplane.cli import output as out
from controlplane.cli.client import BASE, Query, decode
from controlplane.cli.errors import ApiProblem
from controlplane.cli.follow import follow as follow_events
from controlplane.cli.invocation import Invocation, output_option, pass_invocation
from controlplane.cli.output import Format, Output
from controlplane.cli.views import EventView, Page

EVENTS = f"{BASE}/events"
# A screen of them, and the API's default for a page.
TAIL = 50


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option(
    "--object", "objects", metavar="NAME", multiple=True, help="Only about this VM, node or id."
)
@click.option(
    "--kind",
    "kinds",
    metavar="KIND",
    multiple=True,
    help="Only such as vm.running, or vm.* for all.",
)
@click.option("--since", default="", metavar="ID", help="All after this event.")
@output_option
@pass_invocation
def events(
    invocation: Invocation,
    follow: bool,
    objects: tuple[str, ...],
    kinds: tuple[str, ...],
    since: str,
    form: str | None,
) -> None:
    """Show what happened: the last events, or all after --since."""
    query: Query = (*(("object", each) for each in objects), *(("kind", each) for each in kinds))
    show_events(invocation, invocation.output(form), query, since=since, follow=follow)


def show_events(
    invocation: Invocation, output: Output, query: Query, *, since: str, follow: bool
) -> None:
    """Print events after ``since``, or the last ones; then, if asked to, those that come.

    JSON is a list, and one event a line while following.
    """
    seen, revision = _history(invocation, query, since)
    if output.form is Format.JSON and not follow:
        output.json(msgspec.json.encode(Page(tuple(seen), None, revision)))
        return
    for event in seen:
        _print(output, event)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for event in follow_events(invocation, query, revision):
                _print(output, event)


def _history(invocation: Invocation, query: Query, since: str) -> tuple[Sequence[msgspec.Raw], str]:
    """Return what there is after ``since``, or the end of it, and the revision it is up to."""
    if since:
        return _walk(invocation, (*query, ("since", since)), None)
    try:
        page = invocation.client.get_as(Page[msgspec.Raw], EVENTS, (*query, ("last", TAIL)))
    except ApiProblem as error:
        if all(fault.pointer != "/last" for fault in error.problem.errors):
            raise
        # A control plane of 0.1 does not know the parameter: its history is read from the start.
        return _walk(invocation, query, TAIL)
    return page.items, page.revision


def _walk(
    invocation: Invocation, query: Query, at_most: int | None
) -> tuple[Sequence[msgspec.Raw], str]:
    """Read a list to its end and return the last of it, and its revision."""
    seen: deque[msgspec.Raw] = deque(maxlen=at_most)
    revision = ""
    for page in invocation.client.pages(EVENTS, query):
        seen += page.items
        revision = page.revision
    return tuple(seen), revision


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
