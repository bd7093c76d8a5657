"""Event-stream chunks made from a prepared frame are, to the byte, those made as a whole; and refusals' headers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hexmesh
from daemon.web.answers import Ask, Piece, Usage
from daemon.web.http_errors import error_response
from daemon.web.openai_format import ChatFormat, CompletionFormat, Frame
from daemon.web.text import TextCodec
from hexmesh.errors import Busy, HexmeshError, NotReady
from hexmesh.wire.data import SamplingParams

CODEC = TextCodec.load(Path(hexmesh.__file__).parent / "assets" / "model")
ASK = Ask(
    request_id="x",
    arrived_s=0.0,
    prompts=[[1]],
    max_tokens=4,
    stop_token_ids=[],
    extra_stop_token_ids=[],
    sampling=SamplingParams(),
)
FRAME = Frame(
    reply_id="cmpl-x",
    created_s=1_700_000_000,
    model="tiny",
    fingerprint="plan-7",
    codec=CODEC,
    ask=ASK,
    has_prompt_logprobs=False,
    has_token_ids=False,
    has_usage=False,
    has_running_usage=False,
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['"\0"', '"\\u0000"', "\\", '\\"\\u0000\\"']
)


def piece(index: int, text: str) -> Piece:
    return Piece(index=index, text=text, token_id=5, placed=[], n_tokens=3)


def usage() -> Usage:
    return Usage(3, 4)


@given(NAMES, NAMES.filter(bool), st.integers(0, 3), st.booleans())
def test_a_token_of_a_completion(name: str, text: str, index: int, has_usage: bool) -> None:
    frame = dataclasses.replace(FRAME, reply_id=name, model=name, fingerprint=name, has_usage=has_usage)
    look = CompletionFormat(frame)
    for said in ("first", text):
        choice = {"index": index, "text": said, "logprobs": None, "finish_reason": None}
        whole = frame.envelope("text_completion", [choice]) | ({"usage": None} if has_usage else {})
        assert look.piece(piece(index, said), usage) == b"data: " + msgspec.json.encode(whole) + b"\n\n"


@given(NAMES, NAMES.filter(bool), st.integers(0, 3), st.booleans())
def test_a_later_token_of_a_chat(name: str, text: str, index: int, has_usage: bool) -> None:
    frame = dataclasses.replace(FRAME, reply_id=name, model=name, fingerprint=name, has_usage=has_usage)
    look = ChatFormat(frame)
    assert b'"role":"assistant"' in look.piece(piece(index, "first"), usage)
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    whole = frame.envelope("chat.completion.chunk", [choice]) | ({"usage": None} if has_usage else {})
    assert look.piece(piece(index, text), usage) == b"data: " + msgspec.json.encode(whole) + b"\n\n"


@pytest.mark.parametrize(
    ("error", "retry_after", "should_retry"),
    [
        (Busy("full", code="queue_full", retry_after_s=7.2), "8", None),
        (NotReady("no plan", code="no_plan"), "2", None),
        (NotReady("leaving", code="leaving"), "2", None),
        (NotReady("too big", needed_bytes=2, room_bytes=1), "2", "false"),
    ],
)
def test_a_refusal_says_when_and_whether_to_come_back(
    error: HexmeshError, retry_after: str, should_retry: str | None
) -> None:
    headers = error_response(error).headers
    assert (headers["Retry-After"], headers.get("x-should-retry")) == (retry_after, should_retry)
