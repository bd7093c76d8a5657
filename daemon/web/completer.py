"""What all generating routes share: the model and its text codec, readiness, limits, answers under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from daemon.web.access import HttpOptions
from daemon.web.answers import Answers, AnswerSource, Ask
from daemon.web.http_errors import HttpFailure, invalid, status_of
from daemon.web.openai_models import MAX_ANSWERS, SamplingBody
from daemon.web.service import MeshService, ServedModel
from daemon.web.telemetry import Telemetry
from daemon.web.text import TextCodec
from hexmesh.errors import HexmeshError, InvalidInput, NotReady
from hexmesh.metrics import Outcome
from hexmesh.wire.data import SamplingParams

_QUICK_CHARACTERS = 4096
"""Texts up to this length are tokenized in place; longer ones in a thread, so that the loop stays free."""
_SERVICE_GRACE_S = 10.0
"""How long after a request's deadline the service may take to say so itself."""
_SMALLEST_TOP_P = 1e-6
"""OpenAI takes top_p 0 and means the likeliest token alone, which any tiny value gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a route adds to a body: the request's name and arrival, and the route's defaults."""

    request_id: str
    arrived_s: float
    """On the performance counter."""
    n: int = 1
    max_tokens: int | None
    default_max_tokens: int | None
    """None: all that fit into the model's context."""
    default_temperature: float
    n_logprobs: int = -1
    n_prompt_logprobs: int = -1
    echo: bool = False


class Completer:
    """Turns checked requests into answers. Owns the text codec and the set of request ids under way."""

    def __init__(self, service: MeshService, telemetry: Telemetry, options: HttpOptions) -> None:
        self.service = service
        self.telemetry = telemetry
        self.options = options
        self._codec: tuple[str, TextCodec] | None = None
        self._loading = asyncio.Lock()
        self._under_way: set[str] = set()

    def model(self, name: str | None) -> ServedModel:
        """The mesh's model. Raises HttpFailure 404 when `name` is another's, NotReady while it is unknown."""
        model = self.service.model
        if name is not None and name != model.name:
            raise HttpFailure(
                404,
                f"the model {name[:200]!r} does not exist here; this mesh serves {model.name!r}",
                code="model_not_found",
                param="model",
            )
        return model

    def require_ready(self) -> None:
        """Raises NotReady with the blocker when this peer cannot route a request now."""
        readiness = self.service.readiness()
        if readiness.ready:
            return
        blocker = readiness.blocker
        if blocker is None:
            raise NotReady("this peer cannot route a request now", code="not_ready")
        raise NotReady(
            blocker.message,
            code=blocker.code,
            next_step=blocker.next_step,
            needed_bytes=blocker.needed_bytes,
            room_bytes=blocker.room_bytes,
        )

    async def codec(self) -> TextCodec:
        """The served model's text codec, loaded at its first use."""
        folder = self.service.model.folder
        async with self._loading:
            if self._codec is None or self._codec[0] != folder:
                try:
                    self._codec = (folder, await asyncio.to_thread(TextCodec.load, folder))
                except InvalidInput as error:
                    # Missing or broken files are this node's trouble; the client's request is in order.
                    raise NotReady(error.message, code=error.code, next_step=error.next_step) from error
            return self._codec[1]

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        codec = await self.codec()

        def encode_all() -> list[list[int]]:
            return [codec.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        is_quick = sum(map(len, texts)) <= _QUICK_CHARACTERS
        return encode_all() if is_quick else await asyncio.to_thread(encode_all)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """Token ids of a conversation. The template writes its special tokens itself."""
        codec = await self.codec()
        text = codec.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return (await self.encode([text], add_special_tokens=add_special_tokens))[0]

    def ask(self, body: SamplingBody, terms: Terms, prompts: list[list[int]]) -> Ask:
        """The whole request, checked against the model's limits. Raises HttpFailure 400."""
        self._check_prompts(prompts, n=terms.n)
        extra_stops = body.stop_token_ids or []
        self.check_tokens(extra_stops, param="stop_token_ids")
        self.check_tokens([token for token, _ in body.biases()], param="logit_bias")
        max_tokens = self._room_for(prompts, terms)
        if (body.min_tokens or 0) > max_tokens:
            raise invalid(f"min_tokens is over the {max_tokens} tokens to generate", param="min_tokens")
        ends = [] if body.ignore_eos else list(self.service.model.eos_token_ids)
        return Ask(
            request_id=terms.request_id,
            arrived_s=terms.arrived_s,
            prompts=prompts,
            n=terms.n,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=list(dict.fromkeys([*ends, *extra_stops])),
            extra_stop_token_ids=extra_stops,
            stop=body.stop_strings(),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            sampling=_sampling(body, terms),
            echo=terms.echo,
            n_prompt_logprobs=terms.n_prompt_logprobs,
            priority=body.priority or 0,
        )

    def check_tokens(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raises HttpFailure 400 for a token id that the model does not have."""
        vocab_size = self.service.model.vocab_size
        if token_ids and max(token_ids) >= vocab_size:
            raise invalid(
                f"token id {max(token_ids)} is not below the vocabulary's {vocab_size}", param=param
            )

    def _check_prompts(self, prompts: list[list[int]], *, n: int) -> None:
        if len(prompts) * n > MAX_ANSWERS:
            raise invalid(
                f"{len(prompts)} prompts times n={n} are more than {MAX_ANSWERS} answers", param="prompt"
            )
        if not prompts or not all(prompts):
            raise invalid("the prompt is empty", param="prompt")
        self.check_tokens([max(prompt) for prompt in prompts], param="prompt")

    def _room_for(self, prompts: list[list[int]], terms: Terms) -> int:
        limit = self.service.model.max_model_tokens
        longest = max(map(len, prompts))
        room = limit - longest
        wanted = terms.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            least = 1 if wanted is None else wanted
            raise HttpFailure(
                400,
                f"this model's context is {limit} tokens and the request needs {longest + least}: "
                f"{longest} in the prompt and {least} to generate",
                code="context_length_exceeded",
                param="prompt" if room < 1 else "max_tokens",
            )
        if wanted is not None:
            return wanted
        return room if terms.default_max_tokens is None else min(terms.default_max_tokens, room)

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts requests that fail before their answers begin."""
        try:
            yield
        except HexmeshError as error:
            self.telemetry.count_request(_outcome_of(error))
            raise

    @asynccontextmanager
    async def answers(self, ask: Ask) -> AsyncIterator[Answers]:
        """The answers to `ask`, measured. Raises HttpFailure 409 while a request of the same id runs here."""
        if ask.request_id in self._under_way:
            raise HttpFailure(
                409,
                f"request {ask.request_id!r} is under way on this peer",
                code="request_id_in_use",
                next_step="use a fresh X-Request-Id, or none",
            )
        codec = await self.codec()
        timeout_s = self.options.timeout_s
        meter = self.telemetry.request(
            arrived_s=ask.arrived_s, n_prompt_tokens=ask.n_prompt_tokens, n_answers=ask.n_answers
        )
        sources = [
            AnswerSource(ask, index, codec, meter).pieces(self.service, timeout_s=timeout_s)
            for index in range(ask.n_answers)
        ]
        outcome: Outcome = "failed"
        self._under_way.add(ask.request_id)
        try:
            deadline_s = time.monotonic() + timeout_s + _SERVICE_GRACE_S
            async with Answers(ask, sources, deadline_s=deadline_s) as answers:
                yield answers
            outcome = answers.outcome
        except HexmeshError as error:
            outcome = _outcome_of(error)
            raise
        except (asyncio.CancelledError, GeneratorExit, ConnectionError):
            outcome = "cancelled"
            raise
        finally:
            self._under_way.discard(ask.request_id)
            meter.end(outcome)


def seed_of(request_id: str) -> int:
    """The seed that a request id stands for: the same on every peer, so a retry elsewhere draws alike."""
    return int.from_bytes(sha256(request_id.encode()).digest()[:8], "big") >> 1


def _sampling(body: SamplingBody, terms: Terms) -> SamplingParams:
    """How to draw. Without a seed of its own a request gets the one that its id names."""
    return SamplingParams(
        temperature=terms.default_temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else max(body.top_p, _SMALLEST_TOP_P),
        top_k=min(max(body.top_k or 0, 0), 2**31 - 1),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.biases(),
        seed=seed_of(terms.request_id) if body.seed is None else body.seed % 2**63,
        n_logprobs=terms.n_logprobs,
    )


def _outcome_of(error: HexmeshError) -> Outcome:
    match status_of(error):
        case 499:
            return "cancelled"
        case 429 | 503:
            return "refused"
        case status if status < 500:
            return "invalid"
        case _:
            return "failed"
