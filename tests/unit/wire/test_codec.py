"""Codec: what is sent is what arrives; anything else is InvalidInput, never another exception."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.wire import codec
from hexmesh.wire.control import LEAST_BALLOT, Epoch
from hexmesh.wire.data import Generate, Generated, Row, SampledToken, SamplingParams, Step
from hexmesh.wire.frames import FrameDecoder
from hexmesh.wire.peering import JoinRequest, PeerHello
from hexmesh.wire.worker import DropStage, RunStep

EPOCH = Epoch(ballot=LEAST_BALLOT, n=1)
SAMPLING = SamplingParams(temperature=0.5, seed=2**63 - 1)
STEP = Step(
    epoch=EPOCH,
    cert=None,
    replica="r0",
    stage=1,
    step=7,
    driver="n",
    rows=[Row(start=0, n_tokens=3, blocks=[1, 2], sample=SAMPLING), Row(start=9, n_tokens=1, blocks=[])],
)
GENERATED = Generated(sequence="s", attempt=1, first=2, tokens=[SampledToken(token_id=5, logprob=-0.5)])

sampled = st.builds(
    SampledToken,
    token_id=st.integers(0, 2**31),
    logprob=st.none() | st.floats(allow_nan=False),
    top=st.lists(st.tuples(st.integers(0, 2**31), st.floats(allow_nan=False)), max_size=3),
)
generated = st.builds(
    Generated,
    sequence=st.text(max_size=30),
    attempt=st.integers(0, 2**62),
    first=st.integers(0, 2**31),
    tokens=st.lists(sampled, max_size=4),
    finish_reason=st.sampled_from([None, "stop", "length"]),
)
words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40)
hello = st.builds(
    PeerHello,
    protocol_version=st.integers(0, 2**31),
    hexmesh_version=words,
    node_id=words,
    boot=st.integers(0, 2**62),
    name=words,
    clock_unix_s=st.floats(allow_nan=False),
    channel=st.sampled_from(["control", "data", "probe"]),
    address=words,
)


@given(generated, st.binary(max_size=50))
def test_a_frame_carries_message_and_payload(message: Generated, payload: bytes) -> None:
    stream = b"".join(bytes(part) for part in codec.MEMBER.frame(message, payload))

    (frame,) = FrameDecoder().feed(stream)

    assert (codec.MEMBER.decode(frame.header), bytes(frame.payload)) == (message, payload)


@given(hello)
def test_hello_round_trip(message: PeerHello) -> None:
    assert codec.PEERING.decode(codec.encode(message)) == message


@pytest.mark.parametrize("message", [STEP, GENERATED])
def test_members_read_data_and_control_with_one_codec(message: Step | Generated) -> None:
    assert codec.MEMBER.decode(codec.encode(message)) == message


def test_worker_unions() -> None:
    request = RunStep(stage="s", step=1, rows=STEP.rows, sent_s=2.5)

    assert codec.WORKER_REQUESTS.decode(codec.encode(request)) == request
    with pytest.raises(InvalidInput, match="not a worker reply message"):
        codec.WORKER_REPLIES.decode(codec.encode(DropStage(stage="s")))


@given(st.binary(max_size=300))
def test_noise_is_invalid_input(noise: bytes) -> None:
    with pytest.raises(InvalidInput):
        codec.MEMBER.decode(noise)


@given(st.data())
def test_a_damaged_message_is_read_or_refused(data: st.DataObject) -> None:
    good = codec.encode(STEP)
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:at] + data.draw(st.binary(min_size=0, max_size=3)) + good[at + 1 :]

    with contextlib.suppress(InvalidInput):
        assert isinstance(codec.MEMBER.decode(damaged), msgspec.Struct)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x81\xa4type\xa5Other",
        b"\x81\xa4type\xff",
        codec.encode(
            PeerHello(protocol_version=1, hexmesh_version="", node_id="", boot=1, name="", clock_unix_s=0)
        ),
        b"\x82\xa4type\xa9Generated\xa3new" + b"\x91" * 100_000,
        b"\x82\xa4type\xa9Generated\xa8sequence\xa1\xff",
        b"\x82\xa4type\xa9Generated\xa6tokens\xdd\xff\xff\xff\xff",
        codec.encode(GENERATED) + b"\0",
    ],
    ids=["empty", "tag", "tag-type", "other-union", "deep", "utf8", "long-list", "trailing"],
)
def test_each_kind_of_nonsense(bad: bytes) -> None:
    with pytest.raises(InvalidInput, match="not a member message"):
        codec.MEMBER.decode(bad)


def test_a_wrong_type_is_named() -> None:
    fields = msgspec.to_builtins(GENERATED) | {"attempt": "one"}

    with pytest.raises(InvalidInput, match=r"Expected `int`, got `str` - at `\$.attempt`"):
        codec.MEMBER.decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "x" * 257])
def test_names_from_others_fit_a_log_line(name: str) -> None:
    hello = PeerHello(protocol_version=1, hexmesh_version="", node_id="", boot=1, name=name, clock_unix_s=0)

    with pytest.raises(InvalidInput, match="name"):
        codec.PEERING.decode(codec.encode(hello))


def test_newer_fields_are_skipped() -> None:
    fields = msgspec.to_builtins(GENERATED) | {"invented_later": [1, {"a": b"b"}]}

    assert codec.MEMBER.decode(msgspec.msgpack.encode(fields)) == GENERATED


def test_a_secret_is_not_shown() -> None:
    request = JoinRequest(
        protocol_version=1,
        hexmesh_version="",
        issuer="",
        secret=b"hush-hush",
        csr=b"",
        dht_peer_id="",
        name="",
        clock_unix_s=0.0,
    )

    assert "hush" not in repr(request)


def test_generate_is_data() -> None:
    message = Generate(
        sequence="s",
        attempt=0,
        epoch=EPOCH,
        replica="r",
        prompt=[1],
        emitted=[],
        max_tokens=1,
        stop_token_ids=[],
        sampling=SAMPLING,
    )

    assert codec.MEMBER.decode(codec.encode(message)) == message
