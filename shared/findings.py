"""What a doctor has found: one line for each thing that was looked at, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from msgspec import Struct


class Verdict(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


class Finding(Struct, frozen=True):
    """``remedy`` says what to do; empty where all is well."""

    verdict: Verdict
    subject: str
    detail: str
    remedy: str = ""


def well(subject: str, detail: str) -> Finding:
    return Finding(Verdict.OK, subject, detail)


def warning(subject: str, detail: str, remedy: str) -> Finding:
    return Finding(Verdict.WARNING, subject, detail, remedy)


def failed(subject: str, detail: str, remedy: str) -> Finding:
    return Finding(Verdict.FAILED, subject, detail, remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict among them; OK when there are none."""
    order = tuple(Verdict)
    return max((each.verdict for each in findings), key=order.index, default=Verdict.OK)


def lines(findings: Iterable[Finding]) -> list[str]:
    """Return findings as text for people."""
    told: list[str] = []
    for each in findings:
        told.append(f"{each.verdict:<8}{each.subject}: {each.detail}")
        if each.remedy:
            told.append(f"        {each.remedy}")
    return told
