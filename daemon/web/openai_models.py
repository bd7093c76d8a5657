"""Bodies of the generating routes: what is accepted, in which ranges, and what is refused by name.

Unknown fields are accepted and logged. Parameters that we know and do not support pass when they ask for
nothing (null or the neutral value) and are refused otherwise: none is ignored that would change the answer.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon.web.http_errors import HttpFailure, invalid, unsupported
from hexmesh.wire.data import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS

log = logging.getLogger("hexmesh.http")

MAX_ANSWERS = 128
"""Most sequences of one request: prompts times n."""
MAX_STOP_STRINGS = 64

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]

_END_TOKENS = 64
"""How many of a request's stop tokens are left to the model's own ends."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "length_penalty": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "cache_salt": (),
}
"""Known and not supported: the values, beside null, with which the answer is what it would be without.

Only fields that a body does not declare are looked up here: `n`, for one, in /generate."""

_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "stop": f"a string or a list of at most {MAX_STOP_STRINGS} strings, none of them empty",
    "content": "a string or a list of {'type': 'text', 'text': ...} parts",
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def extra_fields(self) -> dict[str, Any]:
        return self.model_extra or {}


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(_Body):
    """What /v1/completions, /v1/chat/completions and /generate share."""

    top_p: Unit | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Unit | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS - _END_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    priority: Priority | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def biases(self) -> list[tuple[int, float]]:
        """Token ids and what is added to their logits. Raises HttpFailure 400 for a key that is no id."""
        biases = self.logit_bias or {}
        for key in biases:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise invalid(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        return [(int(key), bias) for key, bias in biases.items()]


class OpenAiBody(SamplingBody):
    """What the two OpenAI routes share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Logprobs | None = None
    return_token_ids: bool | None = None

    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def n_prompt_logprobs(self) -> int:
        return -1 if self.prompt_logprobs is None else self.prompt_logprobs

    def wants_running_usage(self) -> bool:
        return self.wants_usage() and bool(self.stream_options and self.stream_options.continuous_usage_stats)


Prompt = str | list[str] | list[TokenId] | list[list[TokenId]]


class CompletionBody(OpenAiBody):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None

    def n_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    def n_prompt_logprobs(self) -> int:
        """-1, or how many of the likeliest tokens are wanted at each position of the prompt."""
        echoed = self.n_logprobs() if self.echo else -1
        return max(super().n_prompt_logprobs(), echoed)


class ContentPart(_Body):
    type: str
    text: str | None = None


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatBody(OpenAiBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def n_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


class GenerateBody(SamplingBody):
    prompt: str | list[TokenId]


class TokenizeBody(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[TokenId]


class TokenBody(_Body):
    """A join token to make: how long it lives and how often it may be used."""

    ttl_s: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    uses: Annotated[int, Field(ge=1, le=10_000)] = 1


class TokenIdBody(_Body):
    id: Annotated[str, Field(min_length=1, max_length=64)]


class NodeBody(_Body):
    """A node by its name, its id or the beginning of it."""

    node: Annotated[str, Field(min_length=1, max_length=256)]


class ReplanBody(_Body):
    reason: Annotated[str, Field(min_length=1, max_length=200)] = "operator"


class LeaveBody(_Body):
    forget: bool = False


class NodeOrderBody(_Body):
    """An operator's order to a node. What runs longer than `deadline_s` on a drained one is handed over."""

    node: Annotated[str, Field(min_length=1, max_length=256)]
    deadline_s: Annotated[float, Field(ge=0, le=3600)] = 60.0


AnyBody = TypeVar("AnyBody", bound=_Body)


def parse_body(shape: type[AnyBody], raw: bytes) -> AnyBody:
    """The body as `shape`. Raises HttpFailure 400 that names the first wrong field."""
    try:
        body = shape.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from None
    extra = body.extra_fields()
    refuse_unsupported(extra)
    unknown = sorted(set(extra) - set(_NEUTRAL))
    if unknown:
        log.debug("fields ignored route=%s names=%s", shape.__name__, unknown)
    if isinstance(body, OpenAiBody):
        _check_combinations(body)
    return body


def refuse_unsupported(fields: dict[str, Any]) -> None:
    """Raises `unsupported_parameter` for the first field that asks for what we cannot do."""
    for name, value in fields.items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise unsupported(name)


def _check_combinations(body: OpenAiBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream: true only", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid(
            "prompt_logprobs goes with whole replies only, not with stream", param="prompt_logprobs"
        )
    if body.stream and body.return_token_ids:
        raise invalid(
            "return_token_ids goes with whole replies only, not with stream", param="return_token_ids"
        )
    if isinstance(body, CompletionBody) and body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens 0 goes with echo only", param="max_tokens")
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: true only", param="top_logprobs")


def _refusal(error: ValidationError) -> HttpFailure:
    """Pydantic's first error in OpenAI's words; the input is never echoed."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    path = first["loc"]
    for depth, step in enumerate(path):
        if step in _EXPECTED:
            param = _dotted(path[: depth + 1])
            what = "is missing, it must be" if first["type"] == "missing" else "must be"
            return invalid(f"{param} {what} {_EXPECTED[str(step)]}", param=param)
    param = _dotted(path)
    if not param:
        return invalid("the body must be a JSON object", code="invalid_json")
    return invalid(f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=param)


def _dotted(path: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`; pydantic's names of union members left out."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isidentifier() and step not in ("int", "float", "str", "bool"):
            text += f".{step}" if text else step
    return text
