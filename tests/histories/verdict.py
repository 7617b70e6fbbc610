"""What in a history cannot be, told with the attempts that show it."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from tests.histories.record import Attempt, Kind

# A violation is told by so many attempts at most.
TOLD_MAX = 30


class Violation(Struct, frozen=True):
    """``kind`` is one of few sentences; ``lines`` tell a person how it is seen."""

    kind: str
    name: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        about = f" ({self.name})" if self.name else ""
        return "\n".join((f"{self.kind}{about}:", *(f"  {line}" for line in self.lines)))


def violation(kind: str, name: str, attempts: Iterable[Attempt]) -> Violation:
    return Violation(kind, name, tuple(told(each) for each in list(attempts)[:TOLD_MAX]))


def told(attempt: Attempt) -> str:
    """Return an attempt in one line."""
    asked = [attempt.kind.value, attempt.name, attempt.value]
    asked += [f"if {attempt.if_match}"] if attempt.if_match else []
    asked += [f"key {attempt.key}"] if attempt.key else []
    asked += [f"at least {attempt.min_revision}"] if attempt.min_revision else []
    answer = [attempt.outcome.value, str(attempt.status or ""), attempt.code]
    answer += ["replayed"] if attempt.replayed else []
    if attempt.seen is not None:
        answer.append(f"{attempt.seen.id} {attempt.seen.value} {attempt.seen.etag}")
    if attempt.kind is Kind.LIST:
        answer += [f"{len(page.seen)} VMs at {page.revision}" for page in attempt.pages]
    answer += [f"revision {attempt.revision}"] if attempt.revision else []
    times = f"{attempt.invoked_ns / 1e9:.4f}–{attempt.returned_ns / 1e9:.4f} s"
    who = f"#{attempt.operation} client {attempt.client} at {attempt.replica}"
    return f"{times} {who}: {_joined(asked)} → {_joined(answer)}"


def _joined(words: list[str]) -> str:
    return " ".join(word for word in words if word)
