"""What systemd is told, on a socket as it makes one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.systemd import Systemd


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return the socket that a service of type ``notify`` is given."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.setblocking(False)
        # libsystemd reads it by itself.
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield listening


def _received(told: socket.socket) -> list[str]:
    lines = []
    with contextlib.suppress(BlockingIOError):
        while True:
            lines.append(told.recv(1024).decode())
    return lines


def test_a_service_tells_that_it_serves_and_that_it_ends(told: socket.socket) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": told.getsockname()})
    systemd.serving("answers at https://r1:8443")
    systemd.ending()
    assert _received(told) == ["STATUS=answers at https://r1:8443", "READY=1", "STOPPING=1"]


async def test_signs_of_life_come_while_the_loop_turns(told: socket.socket) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": told.getsockname(), "WATCHDOG_USEC": "20000"})
    living = asyncio.ensure_future(systemd.stay_alive())
    signs: list[str] = []
    while len(signs) < 3:
        await asyncio.sleep(0)
        signs += _received(told)
    living.cancel()
    assert set(signs) == {"WATCHDOG=1"}


@pytest.mark.parametrize("usec", [None, "", "0", "soon"])
async def test_without_a_watchdog_there_are_no_signs_and_no_end(
    told: socket.socket, usec: str | None
) -> None:
    environ = {"NOTIFY_SOCKET": told.getsockname()}
    if usec is not None:
        environ["WATCHDOG_USEC"] = usec
    living = asyncio.ensure_future(Systemd(environ).stay_alive())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not living.done()
    living.cancel()
    assert _received(told) == []


def test_under_no_service_manager_nothing_is_sent(told: socket.socket) -> None:
    systemd = Systemd({})
    systemd.serving("serves")
    systemd.ending()
    assert _received(told) == []
