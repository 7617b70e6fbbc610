"""Whatever a client's request becomes can be handed to the replica that leads."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import get_args

from controlplane import services
from controlplane.commands.draft import Command
from controlplane.commands.forwarded import Forwardable
from controlplane.commands.terms import OnTerms


def test_every_command_of_a_service_may_leave_its_process() -> None:
    used = {
        kind
        for module in pkgutil.iter_modules(services.__path__, f"{services.__name__}.")
        for kind in vars(importlib.import_module(module.name)).values()
        if inspect.isclass(kind)
        and kind.__module__.startswith("controlplane.commands.")
        and hasattr(kind, "decide")
    }

    assert used - {Command, OnTerms} == set(get_args(Forwardable))
