"""A request's answers as text, piece by piece, while the mesh generates their tokens.

`Answers` runs all sequences of a request side by side. Pieces are made and handed on in the call that brings the
tokens: no task is switched for a token. Leaving the block stops whatever still runs: a finished stop string, a
failed sibling and a client that went away end there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec

from daemon.web.detokenizer import AnswerText, PlacedToken, StopScanner
from daemon.web.service import GenerationPart, GenerationRequest, MeshService
from daemon.web.telemetry import RequestMeter
from daemon.web.text import TextCodec
from hexmesh.errors import TimedOut
from hexmesh.wire.data import FinishReason, SampledToken, SamplingParams, ScoredToken

_SERVICE_GRACE_S = 10.0
"""How long after a request's deadline the service may take to say so itself."""


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


class Piece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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
    scores: list[ScoredToken] = []
    """Of the prompt's tokens after the first; all in the first piece."""
    stop_reason: str | int | None = None
    """The stop string or extra stop token that ended the answer; None for the model's own end."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in the cache."""

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answers:
    """All answers to one request, under way from `begin` until the block is left."""

    def __init__(
        self, ask: Ask, service: MeshService, codec: TextCodec, meter: RequestMeter, *, timeout_s: float
    ) -> None:
        self.ask = ask
        self._service = service
        self._deadline_s = time.monotonic() + timeout_s + _SERVICE_GRACE_S
        self._timeout_s = timeout_s
        self._meter = meter
        self._answers = [_Answer(self, index, codec, meter) for index in range(ask.n_answers)]
        self._stops: list[Callable[[], None]] = []
        self._take: Callable[[Piece], None] | None = None
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self._finish_reasons: list[FinishReason] = []

    def usage(self) -> Usage:
        """Token counts up to now."""
        return Usage(
            self.ask.n_prompt_tokens, sum(answer.n_tokens for answer in self._answers), self._n_cached()
        )

    @property
    def outcome(self) -> FinishReason:
        """How finished answers ended, taken together: "length" when one or more were cut off."""
        return "length" if "length" in self._finish_reasons else "stop"

    @property
    def are_complete(self) -> bool:
        return len(self._finish_reasons) == len(self._answers)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_all()
        self._meter.cached(self._n_cached())

    def begin(self, take: Callable[[Piece], None]) -> None:
        """Have all answers generated; `take` gets each piece at once, and must not wait.

        Raises what the service raises when it cannot start them.
        """
        self._take = take
        for index, answer in enumerate(self._answers):
            request = self.ask.request_of(index, timeout_s=self._timeout_s)
            self._stops.append(self._service.generate(request, answer))

    async def wait(self, limit_s: float | None = None) -> bool:
        """True once all answers are complete; False at the first piece, and whenever `limit_s` went by.

        Raises what the service failed with, TimedOut past the deadline, and Closed after a cancel.
        """
        left_s = self._deadline_s - time.monotonic()
        wait_s = left_s if limit_s is None else min(left_s, limit_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        if self._failure is not None:
            raise self._failure
        if self.are_complete:
            return True
        self._news.clear()
        if time.monotonic() >= self._deadline_s:
            raise TimedOut("the request's deadline passed", code="deadline_exceeded")
        return False

    def take(self, piece: Piece) -> None:
        """Hand a piece on."""
        assert self._take is not None
        is_first = piece.n_tokens <= 1
        self._take(piece)
        if piece.finish_reason is not None:
            self._finish_reasons.append(piece.finish_reason)
        if is_first or self.are_complete:
            self._news.set()

    def fail(self, error: Exception) -> None:
        """One failed answer fails the request."""
        self._failure = self._failure or error
        self._stop_all()
        self._news.set()

    def stop(self, index: int) -> None:
        """Have an answer generated no further."""
        if index < len(self._stops):
            self._stops[index]()

    def _stop_all(self) -> None:
        for index in range(len(self._answers)):
            self.stop(index)

    def _n_cached(self) -> int:
        """A prompt's answers share its KV: what the least lucky of them found was there before."""
        n = self.ask.n
        known = [
            [one.n_cached for one in self._answers[at : at + n]] for at in range(0, len(self._answers), n)
        ]
        return sum(min((found for found in one if found is not None), default=0) for one in known)


class _Answer:
    """One answer: the service's tokens made text, ended by its tokens, its length or a stop string."""

    def __init__(self, answers: Answers, index: int, codec: TextCodec, meter: RequestMeter) -> None:
        ask = answers.ask
        self._answers = answers
        self._ask = ask
        self._index = index
        self._meter = meter
        self.n_tokens = 0
        self.n_cached: int | None = None
        """None before the first token."""
        self._stop_reason: str | int | None = None
        self._is_over = False
        self._prompt = ask.prompt_of(index)
        self._scores: list[ScoredToken] = []
        self._is_open = not ask.echo and not ask.scores_prompt(index)
        """Whether all is told that comes before the first token."""
        before = [] if ask.echo else self._prompt
        self._text = AnswerText(
            codec.stream(before, skip_special_tokens=ask.skip_special_tokens),
            StopScanner(ask.stop, include=ask.include_stop),
            places=ask.sampling.n_logprobs >= 0,
        )

    def take(self, part: GenerationPart) -> None:
        """One piece a token and one for the end."""
        if self._is_over:
            return
        try:
            self._take(part)
        except Exception as error:
            # The edge between one request and all others: whoever awaits this request's answers gets to see it.
            self._is_over = True
            self._answers.fail(error)

    def fail(self, error: Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self._answers.fail(error)

    def _take(self, part: GenerationPart) -> None:
        if part.scores:
            self._scores += part.scores
            return
        if self.n_cached is None:
            self.n_cached = min(part.n_cached, len(self._prompt))
        if not self._is_open:
            self._is_open = True
            self._answers.take(self._first_piece())
        if self._ask.max_tokens == 0:
            self._end("length")
            return
        self._meter.add_tokens(self._index, len(part.tokens))
        for token in part.tokens:
            self._answers.take(self._piece(token, is_end=self._is_end(token, part)))
            if self._text.matched_stop is not None:
                self._stop_reason = self._text.matched_stop
                self._end("stop")
                return
        if part.finish_reason is not None:
            self._end(part.finish_reason)

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

    def _end(self, finish_reason: FinishReason) -> None:
        self._is_over = True
        self._answers.stop(self._index)
        self._answers.take(
            Piece(
                index=self._index,
                text=self._text.finish(),
                token_id=None,
                placed=self._text.take_placed(is_last=True),
                n_tokens=self.n_tokens,
                finish_reason=finish_reason,
                stop_reason=self._stop_reason,
            )
        )

    def _is_end(self, token: SampledToken, part: GenerationPart) -> bool:
        return (
            part.finish_reason == "stop"
            and token is part.tokens[-1]
            and token.token_id in self._ask.stop_token_ids
        )

    def _piece(self, token: SampledToken, *, is_end: bool) -> Piece:
        self.n_tokens += 1
        if is_end and token.token_id in self._ask.extra_stop_token_ids:
            self._stop_reason = token.token_id
        # The token that ends an answer is counted and not shown.
        may_stop = self.n_tokens > self._ask.min_tokens
        text = "" if is_end and not self._ask.include_stop else self._text.push(token, may_stop=may_stop)
        return Piece(
            index=self._index,
            text=text,
            token_id=token.token_id,
            placed=self._text.take_placed(is_last=False),
            n_tokens=self.n_tokens,
        )
