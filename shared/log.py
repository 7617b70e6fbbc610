"""Structured logs: one JSON object a line on stderr, for journald and people with ``jq``.

Secrets never reach a log call; control characters never reach a terminal, since JSON escapes them.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import msgspec

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
        line.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


# Its messages are JSON lines already, made without a detour on the request's path.
ACCESS_LOGGER = "access"


def set_up_logging(level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_handler(JsonFormatter())]
    root.setLevel(level.upper())
    access = logging.getLogger(ACCESS_LOGGER)
    access.handlers[:] = [_handler(logging.Formatter("%(message)s"))]
    access.propagate = False
    # Their information is about themselves; what goes wrong is still told.
    for chatty in ("asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _handler(formatter: logging.Formatter) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    return handler
