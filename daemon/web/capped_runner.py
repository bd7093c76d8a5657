"""aiohttp's runner with a bound on connections, so that strangers cannot take all of the daemon's descriptors.

At the bound a new connection takes the place of the oldest one on which no request runs; where requests run on
all of them, it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from aiohttp import web


class CappedRunner(web.AppRunner):
    """An AppRunner; `serving` marks a request's connection as one that must not be closed for another."""

    def __init__(self, app: web.Application, *, max_connections: int, **options: Any) -> None:
        super().__init__(app, **options)
        self._max_connections = max_connections
        self._busy: set[Any] = set()

    @contextmanager
    def serving(self, request: web.Request) -> Iterator[None]:
        """While entered, the request's connection is spared."""
        self._busy.add(request.protocol)
        try:
            yield
        finally:
            self._busy.discard(request.protocol)

    @property
    def server(self) -> Any:
        """What makes the protocol of a new connection, and is asked for one by the listening site."""
        server = super().server
        return None if server is None else lambda: self._welcome(server)

    def _welcome(self, server: web.Server) -> asyncio.Protocol:
        connections = [one for one in server.connections if one.transport is not None]
        if len(connections) >= self._max_connections:
            idle = next((one for one in connections if one not in self._busy), None)
            if idle is None:
                return _Refusal()
            idle.force_close()
        return cast(Callable[[], asyncio.Protocol], server)()


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()
