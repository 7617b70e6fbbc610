"""Bytes both ways between a local socket and the encrypted link, until both directions have ended.

On the link each direction is a row of frames, two bytes of length and as many of data; an empty
frame ends it. So an end is told apart from a cut, and neither side depends on how a TLS library
closes one direction only. Memory is bounded: what cannot be written is not read. Once one direction
has ended, the other has a limited time. Standard library only, since relay processes use it.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections import deque

_HEADER = struct.Struct("!H")
# A frame fills one TLS record.
DATA_BYTES_MAX = 16384 - _HEADER.size
END = _HEADER.pack(0)
# For each direction; a few records keep the link busy, and libvirt's messages are smaller.
WAITING_MAX = 8


class Pump:
    """Runs once; the sockets are the caller's to close."""

    def __init__(self, local: socket.socket, link: ssl.SSLSocket, linger_limit_s: float) -> None:
        self._local = local
        self._link = link
        self._linger_limit_s = linger_limit_s
        self._frames: deque[bytes] = deque()  # for the link
        self._pieces: deque[bytes] = deque()  # for the local socket
        self._partial = b""  # of a frame
        self._local_ended = False
        self._link_ended = False
        self._local_shut = False
        # What TLS waits for besides: either way of it may need the other one.
        self._tls_events = 0

    def run(self) -> str:
        """Relay, and return how it ended."""
        self._local.setblocking(False)
        self._link.setblocking(False)
        deadline_s: float | None = None
        while not self._is_over():
            if deadline_s is None and (self._local_ended or self._link_ended):
                deadline_s = time.monotonic() + self._linger_limit_s
            if deadline_s is not None and time.monotonic() > deadline_s:
                return "one direction ended, and the other did not in time"
            if not self._move():
                self._wait(deadline_s)
        return "both directions ended"

    def _is_over(self) -> bool:
        waiting = self._frames or self._pieces
        return self._local_ended and self._link_ended and not waiting

    def _move(self) -> bool:
        """Do what can be done without waiting; returns whether that was anything."""
        self._tls_events = 0
        moved = [self._read_link(), self._write_local(), self._read_local(), self._write_link()]
        return any(moved)

    def _wait(self, deadline_s: float | None) -> None:
        local, link = 0, self._tls_events
        if self._reads_local():
            local |= select.POLLIN
        if self._pieces:
            local |= select.POLLOUT
        poll = select.poll()
        # Nothing to wait for means not to look: a hang-up is told whether asked for or not.
        if local:
            poll.register(self._local, local)
        if link:
            poll.register(self._link, link)
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        poll.poll(None if left_s is None else left_s * 1000 + 1)

    def _reads_local(self) -> bool:
        return not self._local_ended and len(self._frames) < WAITING_MAX

    def _read_local(self) -> bool:
        if not self._reads_local():
            return False
        try:
            data = self._local.recv(DATA_BYTES_MAX)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._frames.append(_HEADER.pack(len(data)) + data)
        else:
            self._end_local()
        return True

    def _write_link(self) -> bool:
        if not self._frames:
            return False
        try:
            # What TLS could not send must be offered again unchanged: so frame by frame.
            sent = self._link.send(self._frames[0])
        except ssl.SSLWantReadError:
            self._tls_events |= select.POLLIN
            return False
        except ssl.SSLWantWriteError:
            self._tls_events |= select.POLLOUT
            return False
        except OSError:
            self._lose_link()
            return True
        _drop(self._frames, sent)
        return True

    def _read_link(self) -> bool:
        """TLS may hold data that no socket tells of: this reads until it has none, or room ends."""
        if self._link_ended or len(self._pieces) >= WAITING_MAX:
            return False
        try:
            data = self._link.recv(DATA_BYTES_MAX + _HEADER.size)
        except ssl.SSLWantReadError:
            self._tls_events |= select.POLLIN
            return False
        except ssl.SSLWantWriteError:
            self._tls_events |= select.POLLOUT
            return False
        except OSError:
            data = b""
        if data:
            self._take_frames(data)
        else:
            self._lose_link()
        return True

    def _take_frames(self, data: bytes) -> None:
        data = self._partial + data
        while len(data) >= _HEADER.size and not self._link_ended:
            (length,) = _HEADER.unpack_from(data)
            end = _HEADER.size + length
            if len(data) < end:
                break
            if length:
                self._pieces.append(data[_HEADER.size : end])
            else:
                self._link_ended = True
            data = data[end:]
        self._partial = data

    def _write_local(self) -> bool:
        if self._pieces:
            try:
                sent = self._local.send(self._pieces[0])
            except BlockingIOError:
                return False
            except OSError:
                self._lose_local()
                return True
            _drop(self._pieces, sent)
            return True
        if self._link_ended and not self._local_shut:
            self._local_shut = True
            try:
                self._local.shutdown(socket.SHUT_WR)
            except OSError:
                self._lose_local()
            return True
        return False

    def _end_local(self) -> None:
        if not self._local_ended:
            self._local_ended = True
            self._frames.append(END)

    def _lose_local(self) -> None:
        """Nobody reads the local socket any more: tell the other end, and stop."""
        self._pieces.clear()
        self._link_ended = True
        self._end_local()

    def _lose_link(self) -> None:
        """Nobody is at the other end: what came whole is still delivered."""
        self._frames.clear()
        self._link_ended = True
        self._local_ended = True


def _drop(chunks: deque[bytes], count: int) -> None:
    """Forget the first ``count`` bytes of the first chunk."""
    if count == len(chunks[0]):
        chunks.popleft()
    else:
        chunks[0] = chunks[0][count:]
