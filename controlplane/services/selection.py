"""Label filters of lists: ``key=value`` terms, all of which must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def carries(labels: Mapping[str, str], terms: Sequence[str]) -> bool:
    """Tell whether the labels hold every term; a term was checked to have the form key=value."""
    return all(_holds(labels, term) for term in terms)


def _holds(labels: Mapping[str, str], term: str) -> bool:
    key, _, value = term.partition("=")
    return labels.get(key) == value
