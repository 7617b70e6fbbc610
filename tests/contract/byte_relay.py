"""A relay of bytes between two unix sockets that a test can make slow, and break at will.

It stands for the two processes of a real relay: libvirtd of a source connects to it, and it to the
destination's. One connection is its whole life.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

_PIECE_BYTES = 65536


class ByteRelay:
    def __init__(self, path: Path, target: Path) -> None:
        self._target = target
        self._broken = False
        self._passing = threading.Event()
        self._passing.set()
        self._ends: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        threading.Thread(target=self._serve, name="byte-relay", daemon=True).start()

    def hold_replies(self) -> None:
        """Keep what the target answers from now on, until it breaks."""
        self._passing.clear()

    def end(self) -> None:
        """Break the connection, with all that is held; does nothing the second time."""
        self._broken = True
        self._passing.set()
        for each in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with self._listener:
            try:
                source, _ = self._listener.accept()
            except OSError:
                return
        with source, socket.socket(socket.AF_UNIX) as target:
            target.connect(str(self._target))
            self._ends = [source, target]
            back = threading.Thread(target=self._pass_on, args=(target, source), daemon=True)
            back.start()
            self._pass_on(source, target, held=False)
            back.join()

    def _pass_on(self, one: socket.socket, other: socket.socket, *, held: bool = True) -> None:
        with contextlib.suppress(OSError):
            while piece := one.recv(_PIECE_BYTES):
                if held:
                    self._passing.wait()
                if self._broken:
                    break
                other.sendall(piece)
        self.end()
