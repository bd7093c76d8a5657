"""Answers onto the wire: a loop for streams and one for whole replies; a `ReplyFormat` says how they look."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from daemon.web.access import REQUEST_ID, HttpOptions
from daemon.web.answers import Answers, Piece, Usage
from daemon.web.detokenizer import PlacedToken
from daemon.web.http_errors import internal_error
from hexmesh.errors import HexmeshError
from hexmesh.wire.data import FinishReason, ScoredToken

log = logging.getLogger("hexmesh.http")


@dataclass(slots=True)
class WholeAnswer:
    """One answer, complete."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    placed: list[PlacedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    scores: list[ScoredToken] = field(default_factory=list)
    """Of the prompt's tokens after the first, where they were asked for."""

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.placed += piece.placed
        self.scores += piece.scores
        if piece.token_id is not None:
            self.token_ids.append(piece.token_id)
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason


class ReplyFormat(Protocol):
    """The look of one route's replies. One object for each request."""

    stream_type: str
    """Content-Type of a stream."""
    keep_alive: bytes
    """What a stream says when there is nothing to say; may be empty."""

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> dict[str, Any]: ...

    def piece(self, piece: Piece, usage: Usage) -> bytes:
        """May be empty while there is nothing to show."""
        ...

    def end(self, usage: Usage) -> bytes: ...

    def failure(self, error: HexmeshError) -> bytes:
        """Ends a stream that broke."""
        ...


async def reply_whole(
    opening: AbstractAsyncContextManager[Answers], reply_format: ReplyFormat
) -> web.StreamResponse:
    """All answers in one JSON object, once they are complete."""
    async with opening as answers:
        wholes = [WholeAnswer(index) for index in range(answers.ask.n_answers)]
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                if piece is not None:
                    wholes[piece.index].add(piece)
        return web.json_response(reply_format.whole(wholes, answers.usage))


async def reply_stream(
    request: web.Request,
    opening: AbstractAsyncContextManager[Answers],
    reply_format: ReplyFormat,
    options: HttpOptions,
) -> web.StreamResponse:
    """Pieces as they come. A failure is raised while nothing was sent, and ends the stream later."""
    wire = _Wire(request, reply_format.stream_type, options.write_timeout_s)
    try:
        async with opening as answers, aclosing(answers.pieces(options.keep_alive_s)) as pieces:
            await _send_pieces(wire, pieces, answers, reply_format)
    except HexmeshError as error:
        if not wire.is_open:
            raise
        log.info("stream broke request=%s reason=%s", request[REQUEST_ID], error.one_line())
        await wire.send(reply_format.failure(error))
    except ConnectionError:
        raise
    except Exception:
        # The process edge: headers are out, so the middleware cannot tell the client any more.
        if not wire.is_open:
            raise
        log.exception("stream broke request=%s", request[REQUEST_ID])
        await wire.send(reply_format.failure(internal_error()))
    return await wire.close()


async def _send_pieces(
    wire: _Wire, pieces: AsyncGenerator[Piece | None, None], answers: Answers, reply_format: ReplyFormat
) -> None:
    async for piece in pieces:
        if piece is None:
            await wire.send(reply_format.keep_alive)
        else:
            await wire.send(reply_format.piece(piece, answers.usage))
    await wire.send(reply_format.end(answers.usage))


class _Wire:
    """A response that is opened by its first byte, so that early failures keep their status code."""

    def __init__(self, request: web.Request, content_type: str, write_timeout_s: float) -> None:
        self._request = request
        self._write_timeout_s = write_timeout_s
        self._response = web.StreamResponse(
            headers={"Content-Type": content_type, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    @property
    def is_open(self) -> bool:
        return self._response.prepared

    async def send(self, data: bytes) -> None:
        """Raises ConnectionError when the client is gone or has stopped reading."""
        if not data:
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                if not self.is_open:
                    await self._response.prepare(self._request)
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionAbortedError("the client stopped reading") from None

    async def close(self) -> web.StreamResponse:
        if not self.is_open:
            await self._response.prepare(self._request)
        await self._response.write_eof()
        return self._response
