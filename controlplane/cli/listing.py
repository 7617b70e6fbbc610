"""Lists and single objects, fetched and shown in every format: told, as names, or as sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from controlplane.cli.client import BASE, Query, decode
from controlplane.cli.invocation import Invocation
from controlplane.cli.output import Format, Output, Table
from controlplane.cli.views import Reference

View = TypeVar("View")


def show_list(
    invocation: Invocation,
    output: Output,
    collection: str,
    query: Query,
    kind: type[View],
    tabulate: Callable[[Sequence[View]], Table],
    at_most: int | None = None,
) -> None:
    """Fetch a collection, or its first items, and print it; raises what the client raises."""
    listing = invocation.client.collect(f"{BASE}/{collection}", query, at_most)
    if output.form is Format.JSON:
        output.listing(listing)
    elif output.form is Format.NAME:
        references = [decode(item, Reference) for item in listing.items]
        output.names([each.name or each.id for each in references])
    else:
        output.table(tabulate([decode(item, kind) for item in listing.items]))


def show_one(
    invocation: Invocation,
    output: Output,
    path: str,
    kind: type[View],
    describe: Callable[[View], list[tuple[str, str]]],
) -> None:
    """Fetch one object and print it; raises what the client raises."""
    answer = invocation.client.get(path)
    if output.form is Format.JSON:
        output.json(answer.body)
    elif output.form is Format.NAME:
        reference = answer.decode(Reference)
        output.names([reference.name or reference.id])
    else:
        output.description(describe(answer.decode(kind)))


def label_query(labels: Sequence[tuple[str, str]]) -> Query:
    return tuple(("label", f"{key}={value}") for key, value in labels)
