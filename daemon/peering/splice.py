"""Two connections joined byte by byte: what a relay does, and how an end of a circuit becomes a socket here.

Each direction holds one buffer at most, so a slow reader slows its writer and nothing piles up. A turn moves a
bounded number of bytes and then lets the loop go on with others, so circuits share a relay evenly.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

BUFFER_BYTES = 64 * 1024
TURN_BYTES = 256 * 1024
IDLE_S = 600.0
"""Channels of a living pair of nodes are quiet for long, so only what was forgotten is ended."""
LINGER_S = 5.0
"""After one side ended, how long the other may go on."""

_BLOCKED = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError)


class Splice:
    """Owns two connected, non-blocking sockets until `on_end`, which is called once; TLS ones have shaken hands.

    `to_one` and `to_other` are sent before what is passed on. Made inside a running loop.
    """

    def __init__(
        self,
        one: socket.socket,
        other: socket.socket,
        on_end: Callable[[Splice], None],
        *,
        to_one: bytes = b"",
        to_other: bytes = b"",
        idle_s: float = IDLE_S,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = (one, other)
        self._on_end = on_end
        self._idle_s = idle_s
        self.n_bytes = 0
        """Passed on in both directions."""
        self._seen_bytes = 0
        self._is_over = False
        self._flows = (_Flow(self, one, other, to_other), _Flow(self, other, one, to_one))
        self._timer = self._loop.call_later(idle_s, self._look)
        for flow in self._flows:  # TLS may have decrypted bytes that no selector will tell of
            self._loop.call_soon(flow.turn)

    @property
    def is_over(self) -> bool:
        return self._is_over

    def close(self) -> None:
        """End both connections now."""
        if self._is_over:
            return
        self._is_over = True
        self._timer.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())
            sock.close()
        self._on_end(self)

    def flow_ended(self) -> None:
        """One side said end-of-file and the other has been told."""
        if all(flow.is_done for flow in self._flows):
            self.close()
        else:
            self._timer.cancel()
            self._timer = self._loop.call_later(LINGER_S, self.close)

    def _look(self) -> None:
        if self.n_bytes == self._seen_bytes:
            self.close()
            return
        self._seen_bytes = self.n_bytes
        self._timer = self._loop.call_later(self._idle_s, self._look)


class _Flow:
    """One direction. It waits for its source or for its destination, never for both."""

    def __init__(self, splice: Splice, src: socket.socket, dst: socket.socket, first: bytes) -> None:
        self._splice = splice
        self._src = src
        self._dst = dst
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._waiting = memoryview(first)
        self._has_ended = False
        self.is_done = False

    def turn(self) -> None:
        """Move bytes until nothing moves or the turn is used up."""
        n_left = TURN_BYTES
        while n_left > 0 and not self._splice.is_over and not self.is_done:
            try:
                n_moved = self._move()
            except OSError:
                self._splice.close()
                return
            if n_moved is None:
                return
            n_left -= n_moved
        if not self._splice.is_over and not self.is_done:
            self._loop.call_soon(self.turn)

    def _move(self) -> int | None:
        """Write what waits, else read; the bytes written, or None when one side is not ready."""
        if len(self._waiting):
            return self._write()
        if self._has_ended:
            self._pass_on_end()
            return 0
        try:
            n_bytes = self._src.recv_into(self._buffer)
        except _BLOCKED:
            self._loop.remove_writer(self._dst.fileno())
            self._loop.add_reader(self._src.fileno(), self.turn)
            return None
        self._has_ended = n_bytes == 0
        self._waiting = self._buffer[:n_bytes]
        return 0

    def _write(self) -> int | None:
        try:
            n_bytes = self._dst.send(self._waiting)
        except _BLOCKED:
            self._loop.remove_reader(self._src.fileno())
            self._loop.add_writer(self._dst.fileno(), self.turn)
            return None
        self._waiting = self._waiting[n_bytes:]
        self._splice.n_bytes += n_bytes
        return n_bytes

    def _pass_on_end(self) -> None:
        self.is_done = True
        self._loop.remove_reader(self._src.fileno())
        self._loop.remove_writer(self._dst.fileno())
        socket.socket.shutdown(self._dst, socket.SHUT_WR)  # SSLSocket's own would end reading as well
        self._splice.flow_ended()
