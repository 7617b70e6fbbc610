"""Logs: one JSON object a line, or one entry of the journal, whatever is logged."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from shared.log import JournalHandler, JsonFormatter, journal_entry, set_up_logging


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
        set_up_logging(level, {})

    root = logging.getLogger()
    assert root.level == logging.DEBUG
    assert len(root.handlers) == 1
    assert isinstance(root.handlers[0].formatter, JsonFormatter)


def test_in_the_journal_a_record_has_fields_of_its_own() -> None:
    record = logging.LogRecord("agent.fence", logging.WARNING, "file", 1, "%s is", ("it",), None)
    record.__dict__.update(vm="vm-1", generation=7, where=Path("/x"), nodes=["n1"])

    entry = journal_entry(record)

    assert (entry["MESSAGE"], entry["PRIORITY"]) == ("it is", "4")
    assert (entry["NOVACRON_LOGGER"], entry["NOVACRON_VM"]) == ("agent.fence", "vm-1")
    assert (entry["NOVACRON_GENERATION"], entry["NOVACRON_WHERE"]) == ("7", "/x")
    assert entry["NOVACRON_NODES"] == '["n1"]'


def test_in_the_journal_the_chain_of_causes_is_part_of_the_message() -> None:
    try:
        raise KeyError("cause")
    except KeyError:
        record = logging.LogRecord("a", logging.ERROR, "file", 1, "it broke", (), sys.exc_info())

    entry = journal_entry(record)

    assert entry["PRIORITY"] == "3"
    assert entry["MESSAGE"].startswith("it broke\nTraceback")
    assert "KeyError: 'cause'" in entry["MESSAGE"]


def test_only_what_leads_to_the_journal_is_taken_for_it() -> None:
    stderr = os.fstat(2)
    journal = f"{stderr.st_dev}:{stderr.st_ino}"

    for environ, kind in (
        ({"JOURNAL_STREAM": journal}, JournalHandler),
        ({"JOURNAL_STREAM": "8:1"}, logging.StreamHandler),
        ({}, logging.StreamHandler),
    ):
        set_up_logging("info", environ)
        assert type(logging.getLogger().handlers[0]) is kind
