"""POST /generate: text in, text and tokens out, without OpenAI's ceremony. Greedy unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from daemon.web.access import ARRIVED_S, REQUEST_ID, Route
from daemon.web.answers import Piece, Usage
from daemon.web.completer import Completer, Terms
from daemon.web.http_errors import error_object
from daemon.web.openai_models import GenerateBody, parse_body
from daemon.web.replies import WholeAnswer, reply_stream, reply_whole
from hexmesh.errors import HexmeshError

_DEFAULT_TOKENS = 128


class GenerateRoute:
    """The handler over one `Completer`."""

    def __init__(self, completer: Completer) -> None:
        self._completer = completer

    def routes(self) -> list[Route]:
        return [Route("POST", "/generate", "api", self.generate)]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        completer = self._completer
        with completer.counting_refusals():
            body = parse_body(GenerateBody, await request.read())
            completer.require_ready()
            if isinstance(body.prompt, str):
                prompts = await completer.encode([body.prompt], add_special_tokens=True)
            else:
                prompts = [body.prompt]
            terms = Terms(
                request_id=request[REQUEST_ID],
                arrived_s=request[ARRIVED_S],
                max_tokens=body.max_tokens,
                default_max_tokens=_DEFAULT_TOKENS,
                default_temperature=0.0,
            )
            ask = completer.ask(body, terms, prompts)
        look = LineFormat(terms.request_id)
        if body.stream:
            return await reply_stream(request, completer.answers(ask), look, completer.options)
        return await reply_whole(completer.answers(ask), look)


class LineFormat:
    """One JSON object a line: one for each token, with the text that it completes, and one for the end."""

    stream_type = "application/x-ndjson; charset=utf-8"
    keep_alive = b""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._finish_reason: str | None = None

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> dict[str, Any]:
        (answer,) = answers
        return {
            "request_id": self._request_id,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "usage": usage.as_json(),
        }

    def piece(self, piece: Piece, usage: Callable[[], Usage]) -> bytes:
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
        if piece.token_id is None and not piece.text:
            return b""
        return _line({"text": piece.text, "token_id": piece.token_id, "index": max(piece.n_tokens - 1, 0)})

    def end(self, usage: Usage) -> bytes:
        return _line({"finish_reason": self._finish_reason, "usage": usage.as_json()})

    def failure(self, error: HexmeshError) -> bytes:
        return _line(error_object(error))


def _line(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value) + b"\n"
