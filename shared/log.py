"""Structured logs: fields in the journal where systemd keeps one, else JSON lines on stderr.

In the journal every field of ours is called ``NOVACRON_…``, so that ``journalctl NOVACRON_VM=vm-…``
finds all that was said of one VM. Secrets never reach a log call; control characters never reach a
terminal, since JSON and journalctl escape them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cysystemd import journal

_STDERR_FD = 2
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record with what was handed over as ``extra``, and the whole chain of causes."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class JournalHandler(logging.Handler):
    """Hands a record to journald, with what was handed over as ``extra`` in fields of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            journal.send(**journal_entry(record))
        except Exception:
            self.handleError(record)


def journal_entry(record: logging.LogRecord) -> dict[str, str]:
    """Return a record as journald's fields: systemd.journal-fields(7)."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + JsonFormatter().formatException(record.exc_info)
    entry = {
        "MESSAGE": message,
        "PRIORITY": str(_priority(record.levelno)),
        # Else the journal shows the interpreter's name.
        "SYSLOG_IDENTIFIER": Path(sys.argv[0]).name,
        "NOVACRON_LOGGER": record.name,
    }
    for key, value in _fields(record).items():
        nested = isinstance(value, dict | list | tuple)
        text = msgspec.json.encode(value, enc_hook=str).decode() if nested else str(value)
        entry[f"NOVACRON_{key.upper()}"] = text
    return entry


# Its messages are JSON lines already, made without a detour on the request's path.
ACCESS_LOGGER = "access"


def set_up_logging(level: str, environ: Mapping[str, str]) -> None:
    """Log from ``level`` on, to the journal when ``environ`` says that stderr leads there."""
    root = logging.getLogger()
    root.handlers[:] = [JournalHandler() if _is_journal(environ) else _stderr(JsonFormatter())]
    set_log_level(level)
    access = logging.getLogger(ACCESS_LOGGER)
    access.handlers[:] = [_stderr(logging.Formatter("%(message)s"))]
    access.propagate = False
    # Their information is about themselves; what goes wrong is still told.
    for chatty in ("asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def set_log_level(level: str) -> None:
    """Log from ``level`` on."""
    logging.getLogger().setLevel(level.upper())


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what was handed over with a record as ``extra``."""
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}


def _priority(level: int) -> int:
    """Return syslog's number for a level of Python's."""
    for least, priority in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4)):
        if level >= least:
            return priority
    return 6 if level >= logging.INFO else 7


def _is_journal(environ: Mapping[str, str]) -> bool:
    """Tell whether stderr is journald's, as systemd.exec(5) has programs find out."""
    told = os.fstat(_STDERR_FD)
    return environ.get("JOURNAL_STREAM") == f"{told.st_dev}:{told.st_ino}"


def _stderr(formatter: logging.Formatter) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    return handler
