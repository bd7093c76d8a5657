"""A streamed response that is written to at once, from the call that brings the data, without waiting.

What the client does not read yet lies in its connection's buffer. A client that takes nothing for too long, or
leaves too much unread, is cut off; others never wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import hdrs, web

from daemon.web.access import REQUEST_ID, HttpOptions

log = logging.getLogger("hexmesh.http")

MAX_UNREAD_BYTES = 2**20
"""Of one client. A token is some 250 bytes, with twenty log-probabilities some 3,000."""


class StreamWriter:
    """A response that is opened by its first byte, so that early failures keep their status code.

    aiohttp writes its head and its end. The chunks between go straight to the transport: its own way there takes a
    coroutine and several joins for each.
    """

    def __init__(self, request: web.Request, content_type: str, options: HttpOptions) -> None:
        self._request = request
        self._options = options
        self._response = web.StreamResponse(
            headers={"Content-Type": content_type, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._is_chunked = False
        self._transport: asyncio.WriteTransport | None = None
        """Once open, until the client is gone."""
        self._early: list[bytes] = []
        """What came before the response was open."""
        now_s = time.monotonic()
        self._sent_s = now_s
        self._n_sent_bytes = 0
        self._n_taken_bytes = 0
        self._taken_s = now_s

    @property
    def is_open(self) -> bool:
        return self._response.prepared

    @property
    def rest_s(self) -> float:
        """How long nothing need be looked after."""
        silent_s = time.monotonic() - self._sent_s
        return min(max(0.0, self._options.keep_alive_s - silent_s), self._options.write_timeout_s)

    def send(self, data: bytes) -> None:
        """Queue data for the client."""
        if not data:
            return
        transport = self._transport
        if transport is None:
            self._early.append(data)
            return
        if transport.is_closing():
            return  # its handler is about to be cancelled
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        transport.write(data)
        self._sent_s = time.monotonic()
        self._n_sent_bytes += len(data)
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self._cut_off(f"it left {MAX_UNREAD_BYTES} bytes unread")

    async def look(self, keep_alive: bytes) -> None:
        """Open the response if there is something to send; break a long silence; give up who has stopped reading."""
        now_s = time.monotonic()
        if now_s - self._sent_s >= self._options.keep_alive_s:
            self._sent_s = now_s
            self.send(keep_alive)
        if self._early and not self.is_open:
            await self._open()
        if self._transport is not None:
            self._check_reading(self._transport, now_s)

    async def close(self) -> web.StreamResponse:
        """Send what is left and end the response. Raises ConnectionError when the client is gone or does not read."""
        if not self.is_open:
            await self._open()
        try:
            async with asyncio.timeout(self._options.write_timeout_s):
                await self._response.write_eof()
        except TimeoutError:
            self._cut_off("it stopped reading")
            raise ConnectionAbortedError("the client stopped reading") from None
        return self._response

    async def _open(self) -> None:
        await self._response.prepare(self._request)
        self._is_chunked = self._response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"
        self._transport = self._request.transport
        early, self._early = self._early, []
        for data in early:
            self.send(data)

    def _check_reading(self, transport: asyncio.WriteTransport, now_s: float) -> None:
        n_unread_bytes = transport.get_write_buffer_size()
        n_taken_bytes = self._n_sent_bytes - n_unread_bytes
        if not n_unread_bytes or n_taken_bytes > self._n_taken_bytes:
            self._n_taken_bytes, self._taken_s = n_taken_bytes, now_s
        elif now_s - self._taken_s >= self._options.write_timeout_s:
            self._cut_off(f"it read nothing for {self._options.write_timeout_s:.0f} s")

    def _cut_off(self, reason: str) -> None:
        """Its connection's end cancels the handler, which leaves the sequences."""
        log.info("client cut off request=%s reason=%s", self._request[REQUEST_ID], reason)
        if self._transport is not None:
            self._transport.abort()
