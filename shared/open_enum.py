"""Enums whose decoder survives a newer writer."""

from __future__ import annotations

import enum


class OpenEnum(enum.StrEnum):
    """An enum whose decoder survives a newer writer: an unknown value becomes UNKNOWN."""

    @classmethod
    def _missing_(cls, value: object) -> OpenEnum | None:
        unknown: OpenEnum | None = cls.__members__.get("UNKNOWN")
        return unknown
