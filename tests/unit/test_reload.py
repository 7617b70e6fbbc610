"""A configuration that is read again by a running daemon."""

from __future__ import annotations

import logging

import pytest
from msgspec import Struct

from shared.errors import ConfigInvalid, FieldError
from shared.reload import Reload


class Config(Struct, frozen=True):
    log_level: str = "info"
    listen: str = "0.0.0.0:1"


def reload_to(new: Config | ConfigInvalid) -> list[str]:
    """Return which log levels were taken over."""
    taken: list[str] = []

    def load() -> Config:
        if isinstance(new, ConfigInvalid):
            raise new
        return new

    Reload(Config(), load, {"log_level": lambda config: taken.append(config.log_level)})()
    return taken


def test_what_may_change_is_taken_over_and_what_may_not_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert reload_to(Config("debug", "0.0.0.0:2")) == ["debug"]

    assert [record.getMessage() for record in caplog.records] == [
        "log_level is taken over",
        "listen cannot change while it runs: restart it for that",
    ]


def test_what_has_not_changed_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert reload_to(Config()) == []

    assert not caplog.records


def test_what_is_wrong_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    invalid = ConfigInvalid("agent.toml", (FieldError("/log_level", "invalid", "must be info"),))

    assert reload_to(invalid) == []
    assert "/log_level: must be info" in caplog.text


def test_each_time_it_is_compared_with_what_is_so_now() -> None:
    levels, taken = iter(["debug", "info", "info"]), list[str]()
    reload = Reload(
        Config(), lambda: Config(next(levels)), {"log_level": lambda c: taken.append(c.log_level)}
    )
    for _ in range(3):
        reload()

    assert taken == ["debug", "info"]
