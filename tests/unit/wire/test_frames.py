"""Framing: any chunking gives the same frames, and a frame over a limit is refused after those before it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.wire.frames import Frame, FrameDecoder, FrameLimits, FrameTooLarge, frame_parts

Parts = tuple[bytes, bytes]
SMALL = FrameLimits(header_bytes=1000, payload_bytes=2000)

frames_strategy = st.lists(
    st.tuples(
        st.binary(max_size=200), st.one_of(st.binary(max_size=200), st.integers(0, 300_000).map(bytes))
    ),
    max_size=6,
)


def on_the_wire(frames: list[Parts]) -> bytes:
    return b"".join(bytes(part) for header, payload in frames for part in frame_parts(header, payload))


def shown(frames: list[Frame]) -> list[Parts]:
    return [(bytes(frame.header), bytes(frame.payload)) for frame in frames]


def feed_in_chunks(decoder: FrameDecoder, stream: bytes, cuts: list[int]) -> list[Frame]:
    edges = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    chunks = [stream[start:stop] for start, stop in itertools.pairwise(edges)]
    return [frame for chunk in chunks for frame in decoder.feed(chunk)]


@settings(deadline=None)
@given(frames_strategy, st.lists(st.integers(0, 10**6), max_size=12))
def test_frames_survive_any_chunking(frames: list[Parts], cuts: list[int]) -> None:
    decoder = FrameDecoder()

    received = feed_in_chunks(decoder, on_the_wire(frames), cuts)

    assert shown(received) == frames
    assert decoder.is_between_frames


@settings(deadline=None)
@given(frames_strategy, st.integers(1, 100_000))
def test_frames_survive_receiving_into_the_lent_buffer(frames: list[Parts], most: int) -> None:
    decoder = FrameDecoder()
    rest = on_the_wire(frames)
    received: list[Frame] = []
    while rest:
        buffer = decoder.get_buffer()
        n_bytes = min(len(buffer), len(rest), most)
        assert n_bytes > 0
        buffer[:n_bytes] = rest[:n_bytes]
        rest = rest[n_bytes:]
        received.extend(decoder.advance(n_bytes))

    assert shown(received) == frames


@given(frames_strategy, st.integers(1, 500))
def test_a_cut_stream_gives_whole_frames_only(frames: list[Parts], n_missing: int) -> None:
    stream = on_the_wire(frames)
    kept = stream[: max(0, len(stream) - n_missing)]
    decoder = FrameDecoder()

    received = shown(list(decoder.feed(kept)))

    assert received == frames[: len(received)]
    assert decoder.is_between_frames == (on_the_wire(frames[: len(received)]) == kept)


@pytest.mark.parametrize(("header", "payload"), [(b"h" * 1001, b""), (b"", b"p" * 2001)])
@pytest.mark.parametrize("chunk", [1, 7, 100_000])
def test_oversize_is_refused_after_the_frames_before_it(header: bytes, payload: bytes, chunk: int) -> None:
    stream = on_the_wire([(b"fine", b"x"), (header, payload)])
    decoder = FrameDecoder(SMALL)
    received: list[Frame] = []

    def receive_all() -> None:
        for start in range(0, len(stream), chunk):
            for frame in decoder.feed(stream[start : start + chunk]):
                received.append(frame)

    with pytest.raises(FrameTooLarge, match=r"of (1001|2001) bytes is over the limit of (1000|2000)"):
        receive_all()

    assert shown(received) == [(b"fine", b"x")]


def test_oversize_is_refused_by_its_lengths_alone() -> None:
    lengths = on_the_wire([(b"", b"p" * 2001)])[:8]

    with pytest.raises(FrameTooLarge):
        list(FrameDecoder(SMALL).feed(lengths))


def test_the_sender_refuses_oversize_too() -> None:
    with pytest.raises(FrameTooLarge):
        frame_parts(b"h" * 1001, b"", SMALL)


def test_limits_are_inclusive() -> None:
    frames = [(b"h" * 1000, b"p" * 2000)]

    assert shown(list(FrameDecoder(SMALL).feed(on_the_wire(frames)))) == frames


def test_large_payload_is_received_in_place_and_belongs_to_the_receiver() -> None:
    payload = np.arange(1_000_000, dtype=np.float32)
    stream = memoryview(b"".join(bytes(part) for part in frame_parts(b"h", memoryview(payload))))
    decoder = FrameDecoder()
    first = list(decoder.feed(stream[: 100 * 1024]))
    lent = decoder.get_buffer()

    assert first == []
    assert len(lent) == len(stream) - 100 * 1024

    (frame,) = decoder.feed(stream[100 * 1024 :])
    list(decoder.feed(b"\0" * 8))
    tensor = np.frombuffer(frame.payload, dtype=np.float32)

    assert not frame.payload.readonly
    assert tensor.flags.aligned
    assert np.array_equal(tensor, payload)


def test_the_payload_is_not_copied_on_the_way_out() -> None:
    payload = bytearray(10)

    assert frame_parts(b"h", payload)[1] is payload


def test_a_claimed_length_costs_no_memory_until_bytes_arrive() -> None:
    lengths = (0).to_bytes(4, "big") + (256 * 1024 * 1024).to_bytes(4, "big")
    decoders = [FrameDecoder() for _ in range(400)]  # 100 GiB, if it were touched

    for decoder in decoders:
        assert list(decoder.feed(lengths)) == []
