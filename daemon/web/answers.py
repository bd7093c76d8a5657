"""A request's answers as text, piece by piece, while the mesh generates their tokens.

`Answers` runs all sequences of a request side by side. Leaving it closes the service's generators, which
cancels whatever still runs: a finished stop string, a failed sibling and a client that went away end there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec

from daemon.web.detokenizer import AnswerText, PlacedToken, StopScanner
from daemon.web.http_errors import CANCELLED
from daemon.web.service import GenerationPart, GenerationRequest, MeshService
from daemon.web.telemetry import RequestMeter
from daemon.web.text import TextCodec
from hexmesh.errors import Closed, HexmeshError, TimedOut
from hexmesh.wire.data import FinishReason, SampledToken, SamplingParams, ScoredToken

_QUEUED_PIECES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A checked generation request: prompts as tokens, n answers to each, those of the first prompt first."""

    request_id: str
    arrived_s: float
    """On the performance counter."""
    prompts: list[list[int]]
    n: int = 1
    max_tokens: int
    """0: nothing is generated, the prompts are only scored or echoed."""
    min_tokens: int = 0
    """Until an answer has as many, nothing ends it but its length."""
    stop_token_ids: list[int]
    """All tokens that end an answer, the model's own end included unless it is ignored."""
    extra_stop_token_ids: list[int]
    """Those of them that the request named."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    sampling: SamplingParams
    echo: bool = False
    """Answers begin with their prompt."""
    n_prompt_logprobs: int = -1
    """0 or more: prompts are scored, with as many of the likeliest tokens at each position."""
    priority: int = 0
    """Lower comes first."""

    @property
    def n_answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def prompt_of(self, index: int) -> list[int]:
        """The prompt that answer `index` answers."""
        return self.prompts[index // self.n]

    def scores_prompt(self, index: int) -> bool:
        """Whether answer `index` brings its prompt's scores: the first answer's, or all that show them."""
        return self.n_prompt_logprobs >= 0 and (self.echo or index % self.n == 0)

    def request_of(self, index: int, *, timeout_s: float) -> GenerationRequest:
        """What the service is asked for answer `index`."""
        return GenerationRequest(
            request_id=self.request_id,
            sequence=f"{self.request_id}-{index}",
            prompt=self.prompt_of(index),
            max_tokens=max(1, self.max_tokens),  # computing a prompt draws a token, wanted or not
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            sampling=msgspec.structs.replace(self.sampling, choice=index % self.n),
            timeout_s=timeout_s,
            n_prompt_logprobs=self.n_prompt_logprobs if self.scores_prompt(index) else -1,
            priority=self.priority,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one token, or the end, added to answer `index`."""

    index: int
    text: str
    token_id: int | None
    """None in the last piece, which only ends the answer, and in the first, where the prompt is echoed or scored."""
    placed: list[PlacedToken]
    """Tokens, not named before, whose text has begun to show: the ones to show log-probabilities of."""
    n_tokens: int
    """Tokens of this answer so far."""
    finish_reason: FinishReason | None = None
    scores: list[ScoredToken] = field(default_factory=list)
    """Of the prompt's tokens after the first; all in the first piece."""
    stop_reason: str | int | None = None
    """The stop string or extra stop token that ended the answer; None for the model's own end."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


class Answers:
    """All answers to one request, under way between entering and leaving."""

    def __init__(
        self, ask: Ask, sources: Sequence[AsyncGenerator[Piece, None]], *, deadline_s: float
    ) -> None:
        """`deadline_s` is on the monotonic clock."""
        self.ask = ask
        self._sources = sources
        self._deadline_s = deadline_s
        self._queue: asyncio.Queue[Piece | HexmeshError] = asyncio.Queue(_QUEUED_PIECES)
        self._pumps: list[asyncio.Task[None]] = []
        self._group = asyncio.TaskGroup()
        self._n_tokens = [0] * len(sources)
        self._finish_reasons: list[FinishReason] = []

    @property
    def usage(self) -> Usage:
        """Token counts up to now."""
        return Usage(self.ask.n_prompt_tokens, sum(self._n_tokens))

    @property
    def outcome(self) -> FinishReason:
        """How finished answers ended, taken together: "length" when one or more were cut off."""
        return "length" if "length" in self._finish_reasons else "stop"

    async def __aenter__(self) -> Answers:
        await self._group.__aenter__()
        self._pumps = [self._group.create_task(self._pump(source)) for source in self._sources]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pump in self._pumps:
            pump.cancel()
        # The error is not handed on: the group would wrap what the body raised into an ExceptionGroup.
        await self._group.__aexit__(None, None, None)

    async def pieces(self, silence_s: float | None = None) -> AsyncGenerator[Piece | None, None]:
        """Pieces of all answers in the order they come, to the end; None for every `silence_s` without one.

        Raises what the service raised, TimedOut past the deadline, and Closed after a cancel.
        """
        n_open = len(self._sources)
        while n_open:
            item = await self._next(silence_s)
            if isinstance(item, HexmeshError):
                raise item
            if item is not None:
                self._n_tokens[item.index] = item.n_tokens
                if item.finish_reason is not None:
                    n_open -= 1
                    self._finish_reasons.append(item.finish_reason)
            yield item

    async def _next(self, silence_s: float | None) -> Piece | HexmeshError | None:
        left_s = self._deadline_s - time.monotonic()
        is_deadline = silence_s is None or left_s <= silence_s
        try:
            async with asyncio.timeout(left_s if is_deadline else silence_s):
                return await self._queue.get()
        except TimeoutError:
            if is_deadline:
                raise TimedOut("the request's deadline passed", code="deadline_exceeded") from None
            return None

    async def _pump(self, source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await self._queue.put(piece)
        except HexmeshError as error:
            await self._queue.put(error)


class AnswerSource:
    """One answer: the service's tokens made text, ended by its tokens, its length or a stop string."""

    def __init__(self, ask: Ask, index: int, codec: TextCodec, meter: RequestMeter) -> None:
        self._ask = ask
        self._index = index
        self._meter = meter
        self._n_tokens = 0
        self._stop_reason: str | int | None = None
        self._prompt = ask.prompt_of(index)
        self._scores: list[ScoredToken] = []
        self._is_open = not ask.echo and not ask.scores_prompt(index)
        """Whether all is told that comes before the first token."""
        before = [] if ask.echo else self._prompt
        self._text = AnswerText(
            codec.stream(before, skip_special_tokens=ask.skip_special_tokens),
            StopScanner(ask.stop, include=ask.include_stop),
        )

    async def pieces(self, service: MeshService, *, timeout_s: float) -> AsyncGenerator[Piece, None]:
        """One piece a token and one for the end. Raises Closed when the service ends without a reason."""
        async with aclosing(
            service.generate(self._ask.request_of(self._index, timeout_s=timeout_s))
        ) as parts:
            async for part in parts:
                if part.scores:
                    self._scores += part.scores
                    continue
                if not self._is_open:
                    self._is_open = True
                    yield self._first_piece()
                if self._ask.max_tokens == 0:
                    yield self._last_piece("length")
                    return
                self._meter.add_tokens(self._index, len(part.tokens))
                for token in part.tokens:
                    yield self._piece(token, is_end=self._is_end(token, part))
                    if self._text.matched_stop is not None:
                        self._stop_reason = self._text.matched_stop
                        yield self._last_piece("stop")
                        return
                if part.finish_reason is not None:
                    yield self._last_piece(part.finish_reason)
                    return
        raise Closed("the request was cancelled", code=CANCELLED)

    def _is_end(self, token: SampledToken, part: GenerationPart) -> bool:
        return (
            part.finish_reason == "stop"
            and token is part.tokens[-1]
            and token.token_id in self._ask.stop_token_ids
        )

    def _piece(self, token: SampledToken, *, is_end: bool) -> Piece:
        self._n_tokens += 1
        if is_end and token.token_id in self._ask.extra_stop_token_ids:
            self._stop_reason = token.token_id
        # The token that ends an answer is counted and not shown.
        may_stop = self._n_tokens > self._ask.min_tokens
        text = "" if is_end and not self._ask.include_stop else self._text.push(token, may_stop=may_stop)
        return Piece(
            index=self._index,
            text=text,
            token_id=token.token_id,
            placed=self._text.take_placed(is_last=False),
            n_tokens=self._n_tokens,
        )

    def _first_piece(self) -> Piece:
        return Piece(
            index=self._index,
            text=self._text.echo(self._echoed()) if self._ask.echo else "",
            token_id=None,
            placed=self._text.take_placed(is_last=False),
            n_tokens=0,
            scores=self._scores,
        )

    def _echoed(self) -> list[SampledToken]:
        """The prompt, with log-probabilities where answers have them."""
        n_top = self._ask.sampling.n_logprobs
        first = SampledToken(token_id=self._prompt[0])
        if n_top < 0:
            return [first, *(SampledToken(token_id=token) for token in self._prompt[1:])]
        scored = (
            SampledToken(token_id=one.token_id, logprob=one.logprob, top=one.top[:n_top])
            for one in self._scores
        )
        return [first, *scored]

    def _last_piece(self, finish_reason: FinishReason) -> Piece:
        return Piece(
            index=self._index,
            text=self._text.finish(),
            token_id=None,
            placed=self._text.take_placed(is_last=True),
            n_tokens=self._n_tokens,
            finish_reason=finish_reason,
            stop_reason=self._stop_reason,
        )
