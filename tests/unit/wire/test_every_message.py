"""Every message there is: it comes back as it was sent, and no bytes make a decoder raise anything unforeseen."""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.wire import codec
from hexmesh.wire.codec import Codec
from hexmesh.wire.control import CONTROL_MESSAGE
from hexmesh.wire.data import DATA_MESSAGE
from hexmesh.wire.facts import FACTS_MESSAGE
from hexmesh.wire.frames import FrameDecoder, FrameLimits, FrameTooLarge
from hexmesh.wire.notice import NOTICE_MESSAGE
from hexmesh.wire.peering import JOIN_LIMITS, PEERING_MESSAGE
from hexmesh.wire.trust import TRUST_MESSAGE
from hexmesh.wire.worker import WORKER_REPLY, WORKER_REQUEST
from tests.unit.wire.any_message import any_of, message_types

CODECS: dict[str, tuple[object, Codec[Any]]] = {
    "peer": (
        CONTROL_MESSAGE | DATA_MESSAGE | FACTS_MESSAGE | TRUST_MESSAGE | NOTICE_MESSAGE,
        Codec(CONTROL_MESSAGE | DATA_MESSAGE | FACTS_MESSAGE | TRUST_MESSAGE | NOTICE_MESSAGE, name="peer"),
    ),
    "peering": (PEERING_MESSAGE, codec.PEERING),
    "worker request": (WORKER_REQUEST, codec.WORKER_REQUESTS),
    "worker reply": (WORKER_REPLY, codec.WORKER_REPLIES),
}
KINDS = [
    pytest.param(name, kind, id=f"{name}-{kind.__name__}")
    for name, (union, _) in CODECS.items()
    for kind in message_types(union)
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_what_is_sent_is_what_arrives(name: str, kind: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(any_of(kind))

    assert CODECS[name][1].decode(codec.encode(message)) == message


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_a_message_with_some_bytes_changed_is_read_or_refused(name: str, data: st.DataObject) -> None:
    union, decoder = CODECS[name]
    sent = bytearray(codec.encode(data.draw(any_of(union))))
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))

    with contextlib.suppress(InvalidInput):
        decoder.decode(sent[: data.draw(st.integers(0, len(sent)))])


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_noise_is_invalid_input_to_every_codec(name: str, noise: bytes) -> None:
    with pytest.raises(InvalidInput):
        CODECS[name][1].decode(noise)


def test_what_is_said_of_a_bad_message_is_short() -> None:
    with pytest.raises(InvalidInput) as refused:
        codec.PEERING.decode(msgspec.msgpack.encode({"type": "x" * 1_000_000}))

    assert len(refused.value.message) < 300


@settings(deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8))
def test_any_bytes_in_any_chunks_are_frames_or_too_large(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]

    assert received([stream[start:stop] for start, stop in itertools.pairwise(edges)]) == received([stream])


def received(chunks: list[bytes]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The frames, and whether one that is too large came after them."""
    decoder = FrameDecoder(FrameLimits(header_bytes=40, payload_bytes=60))
    frames = []
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                frames.append((bytes(frame.header), bytes(frame.payload)))
    except FrameTooLarge:
        return frames, True
    return frames, False


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_claimed_lengths_cost_a_stranger_more_than_they_cost_us(
    header_bytes: int, payload_bytes: int
) -> None:
    decoder = FrameDecoder(JOIN_LIMITS)
    tracemalloc.start()
    try:
        with contextlib.suppress(FrameTooLarge):
            list(decoder.feed(header_bytes.to_bytes(4, "big") + payload_bytes.to_bytes(4, "big") + b"x"))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 2 * JOIN_LIMITS.header_bytes
