"""`./dev demo --simulated`: the same story in one process, without root, libvirt and etcd.

The cell (control plane, agents with simulated drivers, model etcd) runs on an event loop in a
thread of its own and serves the API on loopback; the story is told from the main thread, through
the same client and the same HTTP. What builds the cell is handed in, see ``Serve``.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from controlplane.cli.context import Context
from controlplane.cli.errors import CliError
from tests.lab.api import LabApi
from tests.lab.demo import tell, wait_for_the_end
from tests.lab.layout import LabError
from tests.lab.state import LabState, login_lines

Say = Callable[[str], None]
# Called with how to log in and the cell's directory, once every node is ready.
Ready = Callable[[Context, Path], None]
# Runs a cell with three nodes until the event is set, and has ended all of it when it returns.
Serve = Callable[[asyncio.Event, Ready], Awaitable[None]]

# The cell has no guest to boot and no disk to wait for.
READY_LIMIT_S = 30.0


def run_simulated(say: Say, serve: Serve, *, once: bool) -> int:
    """Run the cell, tell the story in it and, unless ``once``, keep it until Ctrl-C."""
    # Agents that look for a leader before there is one are no news here.
    logging.disable(logging.WARNING)
    cell = _CellThread(serve)
    cell.start()
    try:
        context, directory = cell.login()
        say("a control plane, three agents, a model of etcd and simulated guests in one process")
        api = LabApi(context)
        try:
            tell(api, lambda text: print(text, flush=True))
        finally:
            api.close()
        state = LabState(
            api=context.endpoints,
            ca=str(directory / "ca.crt"),
            token=str(directory / "admin.token"),
        )
        print(f"\n== Yours now: {context.endpoints[0]}", flush=True)
        for line in (*login_lines(state), "novacron vm ls", "novacron top"):
            print(f"  {line}", flush=True)
        if not once:
            print("It stays up until Ctrl-C.", flush=True)
            wait_for_the_end()
    except CliError as error:
        raise LabError(f"the API: {error}") from error
    finally:
        cell.end()
    return 0


class _CellThread:
    """An event loop in a thread; its failure is told to whoever waits for the login."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._outcome: queue.SimpleQueue[tuple[Context, Path] | BaseException] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="simulated cell")

    def start(self) -> None:
        self._thread.start()

    def login(self) -> tuple[Context, Path]:
        """Return how to log in once the cell is ready; raises LabError when it ended instead."""
        try:
            outcome = self._outcome.get(timeout=READY_LIMIT_S)
        except queue.Empty:
            raise LabError(f"the simulated cell is not ready after {READY_LIMIT_S:.0f} s") from None
        if isinstance(outcome, BaseException):
            raise LabError(f"the simulated cell failed: {outcome}") from outcome
        return outcome

    def end(self) -> None:
        """Let the cell end and wait for it."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # told in the main thread, which ends the process
            self._outcome.put(error)
        else:
            self._outcome.put(LabError("it ended by itself"))

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        await self._serve(self._stop, lambda *login: self._outcome.put(login))
