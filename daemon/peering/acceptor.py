"""The listening socket: hands over each connection that comes, and survives a lack of file descriptors."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

_log = logging.getLogger("hexmesh.peers")

_ACCEPTS_A_TURN = 16
_PAUSE_S = 0.1


class Acceptor:
    """Owns a listening, non-blocking socket until it is closed."""

    def __init__(self, listener: socket.socket, welcome: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._welcome = welcome
        self._loop = asyncio.get_running_loop()
        self._listen()

    def close(self) -> None:
        """Accept nobody any more; a new connection is refused from now on."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no file descriptors: leave the rest in the kernel's queue for a while
                _log.error("cannot accept reason=%s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(_PAUSE_S, self._listen)
                return
            self._welcome(sock)
