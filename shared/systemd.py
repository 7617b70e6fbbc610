"""What this process tells systemd: that it serves, that its event loop turns, that it ends.

systemd's protocol is sd_notify(3), its watchdog sd_watchdog_enabled(3). Under no service manager
there is nobody to tell, and nothing is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cysystemd.daemon import Notification, notify

# systemd's own advice: a sign of life every half of the time that it waits for one.
_SIGNS_PER_TIMEOUT = 2


class Systemd:
    """The service manager of this process, as its environment names it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._listens = "NOTIFY_SOCKET" in environ
        self._watchdog_s = _watchdog_s(environ)

    def serving(self, status: str) -> None:
        """Tell that this process does what it is for; ``status`` is a line for people."""
        self._tell(Notification.STATUS, status)
        self._tell(Notification.READY)

    def ending(self) -> None:
        """Tell that this process ends by itself, in order."""
        self._tell(Notification.STOPPING)

    async def stay_alive(self) -> None:
        """Give signs of life for as long as the event loop turns, until cancelled.

        It has to be run on the loop that does the work: one that stands still gives none, and
        systemd starts the process anew.
        """
        while self._watchdog_s is not None:
            self._tell(Notification.WATCHDOG)
            await asyncio.sleep(self._watchdog_s / _SIGNS_PER_TIMEOUT)
        await asyncio.Event().wait()

    def _tell(self, what: Notification, value: str | None = None) -> None:
        if not self._listens:
            return
        if value is None:
            notify(what)
        else:
            notify(what, value)


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Return how long systemd waits for a sign of life; None when it does not."""
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() and int(text) > 0 else None
