"""The OpenAI-compatible routes: chat and text completions, models, tokenize, detokenize, cancel."""

from __future__ import annotations

import json
import time
from contextlib import AbstractAsyncContextManager
from typing import Any

from aiohttp import web

from daemon.web.access import ARRIVED_S, REQUEST_ID, Route
from daemon.web.answers import Answers, Ask
from daemon.web.completer import Completer, Terms
from daemon.web.http_errors import HttpFailure, invalid, unsupported
from daemon.web.openai_format import ChatFormat, CompletionFormat, Frame
from daemon.web.openai_models import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Message,
    OpenAiBody,
    Prompt,
    TokenizeBody,
    parse_body,
)
from daemon.web.replies import ReplyFormat, reply_stream, reply_whole
from daemon.web.service import ServedModel

_DEFAULT_TEMPERATURE = 1.0
_DEFAULT_COMPLETION_TOKENS = 16
_CHAT_PREFIX, _TEXT_PREFIX = "chatcmpl-", "cmpl-"


class OpenAiRoutes:
    """Handlers over one `Completer`."""

    def __init__(self, completer: Completer) -> None:
        self._completer = completer

    def routes(self) -> list[Route]:
        return [
            Route("POST", "/v1/chat/completions", "api", self.chat_completions),
            Route("POST", "/v1/completions", "api", self.completions),
            Route("GET", "/v1/models", "api", self.models),
            Route("GET", "/v1/models/{model_id:.+}", "api", self.one_model),
            Route("POST", "/v1/cancel/{request_id:.+}", "api", self.cancel),
            Route("POST", "/tokenize", "api", self.tokenize),
            Route("POST", "/detokenize", "api", self.detokenize),
        ]

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        completer = self._completer
        with completer.counting_refusals():
            body = parse_body(ChatBody, await request.read())
            messages = plain_messages(body.messages)
            model = completer.model(body.model)
            completer.require_ready()
            prompt = await completer.encode_chat(
                messages,
                add_generation_prompt=body.add_generation_prompt is not False,
                add_special_tokens=bool(body.add_special_tokens),
                variables=body.chat_template_kwargs or {},
            )
            terms = Terms(
                request_id=request[REQUEST_ID],
                arrived_s=request[ARRIVED_S],
                n=body.n or 1,
                max_tokens=body.max_completion_tokens or body.max_tokens,
                default_max_tokens=None,
                default_temperature=_DEFAULT_TEMPERATURE,
                n_logprobs=body.n_logprobs(),
                n_prompt_logprobs=body.n_prompt_logprobs(),
            )
            ask = completer.ask(body, terms, [prompt])
        frame = await self._frame(_CHAT_PREFIX, body, model, ask)
        return await self._reply(request, body, completer.answers(ask), ChatFormat(frame))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        completer = self._completer
        with completer.counting_refusals():
            body = parse_body(CompletionBody, await request.read())
            model = completer.model(body.model)
            completer.require_ready()
            prompts = await self._prompts(
                body.prompt, add_special_tokens=body.add_special_tokens is not False
            )
            terms = Terms(
                request_id=request[REQUEST_ID],
                arrived_s=request[ARRIVED_S],
                n=body.n or 1,
                max_tokens=body.max_tokens,
                default_max_tokens=_DEFAULT_COMPLETION_TOKENS,
                default_temperature=_DEFAULT_TEMPERATURE,
                n_logprobs=body.n_logprobs(),
                n_prompt_logprobs=body.n_prompt_logprobs(),
                echo=bool(body.echo),
            )
            ask = completer.ask(body, terms, prompts)
        frame = await self._frame(_TEXT_PREFIX, body, model, ask)
        return await self._reply(request, body, completer.answers(ask), CompletionFormat(frame))

    async def models(self, request: web.Request) -> web.Response:
        """The mesh's model, exactly while this peer can route requests to it."""
        is_ready = self._completer.service.readiness().ready
        data = [model_object(self._completer.service.model)] if is_ready else []
        return web.json_response({"object": "list", "data": data})

    async def one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["model_id"].rstrip("/")
        if not self._completer.service.readiness().ready:
            raise HttpFailure(
                404,
                f"the model {name[:200]!r} is not served just now",
                code="model_not_found",
                param="model",
                next_step="GET /ready says why",
            )
        return web.json_response(model_object(self._completer.model(name)))

    async def cancel(self, request: web.Request) -> web.Response:
        """Takes the X-Request-Id as well as the id of the reply."""
        named = request.match_info["request_id"].rstrip("/")
        request_id = named.removeprefix(_CHAT_PREFIX).removeprefix(_TEXT_PREFIX)
        if not self._completer.service.cancel(request_id):
            raise HttpFailure(
                404, f"no request {request_id[:200]!r} is under way here", code="request_not_found"
            )
        return web.json_response({"id": request_id, "cancelled": True})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = parse_body(TokenizeBody, await request.read())
        model = self._completer.model(body.model)
        tokens = await self._tokens(body)
        return web.json_response(
            {"count": len(tokens), "max_model_len": model.max_model_tokens, "tokens": tokens}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = parse_body(DetokenizeBody, await request.read())
        self._completer.model(body.model)
        self._completer.check_tokens(body.tokens, param="tokens")
        codec = await self._completer.codec()
        return web.json_response({"prompt": codec.decode(body.tokens, skip_special_tokens=False)})

    async def _tokens(self, body: TokenizeBody) -> list[int]:
        match body:
            case TokenizeBody(prompt=str() as prompt, messages=None):
                add_special_tokens = body.add_special_tokens is not False
                return (await self._completer.encode([prompt], add_special_tokens=add_special_tokens))[0]
            case TokenizeBody(prompt=None, messages=list() as messages):
                return await self._completer.encode_chat(
                    plain_messages(messages),
                    add_generation_prompt=body.add_generation_prompt is not False,
                    add_special_tokens=bool(body.add_special_tokens),
                    variables=body.chat_template_kwargs or {},
                )
            case _:
                raise invalid("give either prompt or messages", param="prompt")

    async def _prompts(self, prompt: Prompt, *, add_special_tokens: bool) -> list[list[int]]:
        if isinstance(prompt, str):
            return await self._completer.encode([prompt], add_special_tokens=add_special_tokens)
        texts = [part for part in prompt if isinstance(part, str)]
        if texts:
            return await self._completer.encode(texts, add_special_tokens=add_special_tokens)
        one = [part for part in prompt if isinstance(part, int)]
        return [one] if one else [part for part in prompt if isinstance(part, list)]

    async def _frame(self, prefix: str, body: OpenAiBody, model: ServedModel, ask: Ask) -> Frame:
        return Frame(
            reply_id=prefix + ask.request_id,
            created_s=int(time.time()),
            model=model.name,
            fingerprint=self._completer.service.status().plan_id,
            codec=await self._completer.codec(),
            ask=ask,
            has_prompt_logprobs=body.prompt_logprobs is not None,
            has_token_ids=bool(body.return_token_ids),
            has_usage=body.wants_usage(),
            has_running_usage=body.wants_running_usage(),
        )

    async def _reply(
        self,
        request: web.Request,
        body: OpenAiBody,
        opening: AbstractAsyncContextManager[Answers],
        look: ReplyFormat,
    ) -> web.StreamResponse:
        if body.stream:
            return await reply_stream(request, opening, look, self._completer.options)
        return await reply_whole(opening, look)


def model_object(model: ServedModel) -> dict[str, Any]:
    """Exactly the fields that clients know; some break on others."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "hexmesh",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_tokens,
        "permission": [],
    }


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content as one text, tool arguments as objects.

    Raises HttpFailure 400 for content that is not text.
    """
    return [_plain_message(message, f"messages[{n}]") for n, message in enumerate(messages)]


def _plain_message(message: Message, path: str) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        for n, part in enumerate(message.content):
            if part.type not in ("text", "input_text") or part.text is None:
                raise unsupported(
                    f"{path}.content[{n}]", f"of type {part.type!r} is not text, the only supported type"
                )
        plain["content"] = "\n".join(part.text or "" for part in message.content)
    if message.content is None and not message.tool_calls:
        raise invalid(f"{path}.content is missing", param=f"{path}.content")
    if message.tool_calls:
        plain["tool_calls"] = [_with_argument_object(call) for call in message.tool_calls]
    return plain


def _with_argument_object(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates want the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
