"""Logs: one JSON object a line, whatever is logged."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from shared.log import JsonFormatter, set_up_logging


def formatted(message: str, *args: object, **fields: Any) -> dict[str, Any]:
    record = logging.LogRecord("a.logger", logging.WARNING, "file", 1, message, args, None)
    record.__dict__.update(fields)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def test_a_record_is_one_line_with_what_was_handed_over() -> None:
    line = formatted("%s is\n\x1b[31mred", "it", vm="vm-1", where=object)

    assert line["message"] == "it is\n\x1b[31mred"
    assert (line["level"], line["logger"], line["vm"]) == ("warning", "a.logger", "vm-1")
    assert line["at"].endswith("+00:00")
    assert "class 'object'" in line["where"]


def test_the_chain_of_causes_is_told() -> None:
    try:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("effect") from cause
    except ValueError:
        line = formatted("it broke", exc_info=sys.exc_info())

    assert "KeyError: 'cause'" in line["exception"]
    assert "ValueError: effect" in line["exception"]


def test_there_is_one_handler_however_often_it_is_set_up() -> None:
    for level in ("info", "debug"):
        set_up_logging(level)

    root = logging.getLogger()
    assert root.level == logging.DEBUG
    assert len(root.handlers) == 1
    assert isinstance(root.handlers[0].formatter, JsonFormatter)
