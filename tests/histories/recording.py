"""Makes one history: clients at work on a cell, two faults meanwhile, and a last look at all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.histories.cell import CellStatus
from tests.histories.clients import BASE, Board, Client, Plan, tls_context
from tests.histories.faults import FaultDriver, pair_of
from tests.histories.https import NeverSent, NoAnswer, Wire
from tests.histories.record import Freshness, Head, HistoryLog, Kind

CLIENTS = 16
NAMES = 32
# Operations that were refused for the moment do not count in the verdict; 2,000 have to be left.
OPERATIONS = 2200
# Between the faults, and before the first and after the last.
CALM_S = 1.5
# With two faults a history takes 20 s on a machine that has nothing else to do.
RECORDING_LIMIT_S = 240.0
CLEANING_TRIES = 50
POLL_S = 0.05


class TooSlow(Exception):
    """The clients have not come to their end in time."""


def record(status: Callable[[], CellStatus], seed: int, path: Path) -> None:
    """Record one history to a new file. Raises CellSick, TooSlow."""
    rng = random.Random(seed)
    found = status()
    urls = {replica.name: replica.url for replica in found.replicas}
    tls, token = tls_context(found.ca), found.read_token()

    def wire() -> Wire:
        return Wire(urls, tls, token)

    run = f"{seed}-{time.time_ns() // 1_000_000:x}"
    board = Board(run, tuple(f"h{run}-{number:02}" for number in range(NAMES)))
    head = Head(seed=seed, clients=CLIENTS, names=board.names, replicas=tuple(urls))
    log = HistoryLog(path, head)
    clients = [
        Client(number, board, wire(), log, random.Random(f"{seed} {number}"))
        for number in range(CLIENTS)
    ]
    driver = FaultDriver(status, wire(), rng)
    driver.wait_until_well()
    with ThreadPoolExecutor(CLIENTS) as threads:
        working = [threads.submit(client.run) for client in clients]
        try:
            _disturb(driver, seed, log, rng)
            _await_operations(board)
        finally:
            board.stop.set()
    for each in working:
        each.result()
    board.stop.clear()
    _look_at_all(Client(CLIENTS, board, wire(), log, rng), board, tuple(urls))
    log.close()
    _clean(wire(), run)


def _disturb(driver: FaultDriver, seed: int, log: HistoryLog, rng: random.Random) -> None:
    for blow in pair_of(seed):
        time.sleep(CALM_S * rng.uniform(0.5, 1.5))
        for fault in driver.strike(blow):
            log.add(fault)
    time.sleep(CALM_S)


def _await_operations(board: Board) -> None:
    deadline = time.monotonic() + RECORDING_LIMIT_S
    while board.operations < OPERATIONS:
        if time.monotonic() > deadline:
            raise TooSlow(f"{board.operations} operations in {RECORDING_LIMIT_S:.0f} s")
        time.sleep(POLL_S)


def _look_at_all(client: Client, board: Board, replicas: tuple[str, ...]) -> None:
    """Read every VM at every replica: what was acknowledged is there."""
    for replica in replicas:
        client.do(Plan(kind=Kind.LIST, freshness=Freshness.LATEST), replica)
        for name in board.names:
            client.do(Plan(kind=Kind.GET, name=name, freshness=Freshness.LATEST), replica)


def _clean(wire: Wire, run: str) -> None:
    """Delete the history's VMs; what cannot be deleted now is in nobody's way."""
    for _ in range(CLEANING_TRIES):
        if not _deleted(wire, run):
            break
        time.sleep(POLL_S)
    wire.close()


def _deleted(wire: Wire, run: str) -> int:
    """Ask every replica to delete what is there; return how many VMs were found."""
    found = 0
    for replica in wire.replicas():
        try:
            answer = wire.ask(replica, "GET", f"{BASE}?label=run%3D{run}&limit=500", {}, None, 5.0)
            items = answer.body["items"] if answer.status == 200 else []
            found = max(found, len(items))
            for item in items:
                wire.ask(replica, "DELETE", f"{BASE}/{item['id']}", {}, None, 5.0)
        except (NeverSent, NoAnswer):
            continue
    return found
