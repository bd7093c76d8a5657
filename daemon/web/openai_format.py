"""How OpenAI's objects look: whole replies, event-stream chunks, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from daemon.web.answers import Ask, Piece, Usage
from daemon.web.detokenizer import PlacedToken
from daemon.web.http_errors import error_object
from daemon.web.replies import WholeAnswer
from daemon.web.text import TextCodec
from hexmesh.errors import HexmeshError
from hexmesh.wire.data import ScoredToken

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What stays the same in all objects of one reply."""

    reply_id: str
    created_s: int
    model: str
    fingerprint: str | None
    codec: TextCodec
    ask: Ask
    has_prompt_logprobs: bool
    has_token_ids: bool
    has_usage: bool
    """A stream ends with a chunk that has no choices and the usage."""
    has_running_usage: bool
    """Every chunk of a stream carries the usage so far."""

    @property
    def has_logprobs(self) -> bool:
        return self.ask.sampling.n_logprobs >= 0

    def prompt_fields(self, answers: list[WholeAnswer], index: int) -> dict[str, Any]:
        """What vLLM's clients find about the prompt of answer `index`, where they asked for it."""
        fields: dict[str, Any] = {}
        if self.has_prompt_logprobs:
            scores = answers[index - index % self.ask.n].scores
            fields["prompt_logprobs"] = [None, *(self._scored(one) for one in scores)]
        if self.has_token_ids:
            fields["prompt_token_ids"] = self.ask.prompt_of(index)
        return fields

    def answer_fields(self, answer: WholeAnswer) -> dict[str, Any]:
        """The same for the answer itself."""
        return {"token_ids": answer.token_ids} if self.has_token_ids else {}

    def _scored(self, score: ScoredToken) -> dict[str, dict[str, Any]]:
        """The likeliest tokens and the prompt's own, by token id."""
        named = [(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top, start=1)]
        own = (score.token_id, score.logprob, score.rank)
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.codec.token_text(token)}
            for token, logprob, rank in (*named, own)
        }

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class _Events:
    """The event stream that both OpenAI formats share; they differ in `_kind` and in what a choice holds."""

    stream_type = "text/event-stream; charset=utf-8"
    keep_alive = b": keep-alive\n\n"
    _kind = ""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def end(self, usage: Usage) -> bytes:
        if not self._frame.has_usage:
            return _DONE
        return _event({**self._frame.envelope(self._kind, []), "usage": usage.as_json()}) + _DONE

    def failure(self, error: HexmeshError) -> bytes:
        """The SDKs raise on an event with `error`; they stop reading at [DONE]."""
        return _event(error_object(error)) + _DONE

    def _chunk(self, choice: dict[str, Any], usage: Usage) -> bytes:
        chunk = self._frame.envelope(self._kind, [choice])
        if self._frame.has_usage:
            chunk["usage"] = usage.as_json() if self._frame.has_running_usage else None
        return _event(chunk)


class ChatFormat(_Events):
    """`chat.completion` and `chat.completion.chunk`."""

    _kind = "chat.completion.chunk"

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self._begun: set[int] = set()

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.placed),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            | self._frame.answer_fields(answer)
            for answer in answers
        ]
        envelope = self._frame.envelope("chat.completion", choices)
        return envelope | self._frame.prompt_fields(answers, 0) | {"usage": usage.as_json()}

    def piece(self, piece: Piece, usage: Usage) -> bytes:
        """The role goes out with the first text, as clients take the first chunk for a token."""
        chunks = b""
        is_mute_end = piece.finish_reason is not None and piece.index not in self._begun
        if piece.text or (piece.placed and self._frame.has_logprobs) or is_mute_end:
            delta = {"content": piece.text}
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                delta = {"role": "assistant", **delta}
            chunks += self._chunk(
                {
                    "index": piece.index,
                    "delta": delta,
                    "logprobs": self._logprobs(piece.placed),
                    "finish_reason": None,
                },
                usage,
            )
        if piece.finish_reason is not None:
            chunks += self._chunk(
                {
                    "index": piece.index,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": piece.finish_reason,
                    "stop_reason": piece.stop_reason,
                },
                usage,
            )
        return chunks

    def _logprobs(self, placed: list[PlacedToken]) -> dict[str, Any] | None:
        if not self._frame.has_logprobs:
            return None
        return {"content": [self._token_logprobs(one) for one in placed]}

    def _token_logprobs(self, placed: PlacedToken) -> dict[str, Any]:
        token = placed.token
        top = [self._logprob(token_id, logprob) for token_id, logprob in token.top]
        return {**self._logprob(token.token_id, token.logprob), "top_logprobs": top}

    def _logprob(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        codec = self._frame.codec
        return {
            "token": codec.token_text(token_id),
            "logprob": logprob,
            "bytes": list(codec.token_bytes(token_id)),
        }


class CompletionFormat(_Events):
    """`text_completion`, whole and as chunks."""

    _kind = "text_completion"

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": answer.index,
                "text": answer.text,
                "logprobs": self._logprobs(answer.placed),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            | self._frame.prompt_fields(answers, answer.index)
            | self._frame.answer_fields(answer)
            for answer in answers
        ]
        return {**self._frame.envelope(self._kind, choices), "usage": usage.as_json()}

    def piece(self, piece: Piece, usage: Usage) -> bytes:
        chunks = b""
        if piece.text or (piece.placed and self._frame.has_logprobs):
            chunks += self._chunk(
                {
                    "index": piece.index,
                    "text": piece.text,
                    "logprobs": self._logprobs(piece.placed),
                    "finish_reason": None,
                },
                usage,
            )
        if piece.finish_reason is not None:
            chunks += self._chunk(
                {
                    "index": piece.index,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": piece.finish_reason,
                    "stop_reason": piece.stop_reason,
                },
                usage,
            )
        return chunks

    def _logprobs(self, placed: list[PlacedToken]) -> dict[str, Any] | None:
        if not self._frame.has_logprobs:
            return None
        text = self._frame.codec.token_text
        return {
            "tokens": [text(one.token.token_id) for one in placed],
            "token_logprobs": [one.token.logprob for one in placed],
            "top_logprobs": [self._top(one) for one in placed],
            "text_offset": [one.text_offset for one in placed],
        }

    def _top(self, placed: PlacedToken) -> dict[str, float | None] | None:
        """The likeliest tokens and, as OpenAI has it, always the drawn one; a prompt's first token has none."""
        if placed.token.logprob is None:
            return None
        text = self._frame.codec.token_text
        top: dict[str, float | None] = {}
        for token_id, logprob in placed.token.top:
            top.setdefault(text(token_id), logprob)
        top.setdefault(text(placed.token.token_id), placed.token.logprob)
        return top


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
