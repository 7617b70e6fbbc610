"""What of a configuration a running daemon takes over when it is asked to (SIGHUP).

The file is read as at a start: what is wrong with it changes nothing, and is logged. So is what
cannot change while the daemon runs: it goes on with what it was started with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from msgspec import Struct
from msgspec.structs import fields, replace

from shared.errors import ConfigInvalid

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Struct)


class Reload(Generic[C]):
    def __init__(
        self, running: C, load: Callable[[], C], changeable: Mapping[str, Callable[[C], None]]
    ) -> None:
        """``changeable``: for each entry of the configuration that may change, what takes it."""
        self._running = running
        self._load = load
        self._changeable = changeable

    def __call__(self) -> None:
        """Read the configuration again, and take over what has changed."""
        try:
            new = self._load()
        except ConfigInvalid as error:
            log.error("the configuration is not taken over: %s", error)
            return
        names = [entry.name for entry in fields(type(new))]
        changed = [name for name in names if getattr(new, name) != getattr(self._running, name)]
        fixed = [name for name in changed if name not in self._changeable]
        for name in changed:
            if name in self._changeable:
                self._changeable[name](new)
                self._running = replace(self._running, **{name: getattr(new, name)})
                log.info("%s is taken over", name)
        if fixed:
            log.warning(
                "%s cannot change while it runs: restart it for that", ", ".join(sorted(fixed))
            )
