"""What is fuzzed. A target takes any bytes and returns; whatever it raises is a finding.

Each swallows the one error that its reader promises for bad input, and checks what must hold of good input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from daemon.dispatch import PEER_MESSAGES
from daemon.trust.attestor import Attestor
from daemon.web.http_errors import HttpFailure
from daemon.web.openai_models import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
    parse_body,
)
from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity.authority import MeshAuthority, request_certificate, requesting_node
from hexmesh.identity.certificates import verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.tokens import format_token, make_token, parse_token
from hexmesh.membership.records import NodeRecord, open_record, sign_record
from hexmesh.plan import Plan, Replica, Stage, decode_plan, encode_plan, plan_fault
from hexmesh.wire import codec
from hexmesh.wire.codec import Codec
from hexmesh.wire.control import LEAST_BALLOT, Beat, Cert, Epoch, Header, Hello
from hexmesh.wire.data import Generate, Row, SampledToken, SamplingParams, Step, StepResult
from hexmesh.wire.facts import Facts, ProbeChunk
from hexmesh.wire.frames import FrameDecoder, FrameLimits, FrameTooLarge, frame_parts
from hexmesh.wire.peering import JoinRequest, PeerHello, WantRoot

NOW = datetime(2026, 1, 1, tzinfo=UTC)
_SMALL = FrameLimits(header_bytes=4096, payload_bytes=65536)
_BODIES = (ChatBody, CompletionBody, GenerateBody, TokenizeBody, DetokenizeBody)
_PEER_ID = "12D3KooWFuzz"


@dataclass(frozen=True, slots=True)
class Target:
    """`seeds` are good inputs to start from."""

    read: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def targets() -> dict[str, Target]:
    """Every target by name."""
    authority, key = MeshAuthority.found(NOW), NodeKey.generate()
    certificate = authority.issue(request_certificate(key), _PEER_ID, NOW)
    messages = tuple(_messages())
    attestor = Attestor(key, (certificate,), authority.root_der, now=lambda: NOW)
    return {
        "codec": Target(lambda data: read_messages(messages, data), (*messages, b"\0\0\0\0")),
        "frames": Target(read_frames, tuple(_streams())),
        "records": Target(lambda data: read_record(attestor, data), (_record(attestor),)),
        "tokens": Target(read_token, (_token(authority, key).encode(),)),
        "certificates": Target(
            lambda data: read_certificate(authority, data), (certificate, request_certificate(key))
        ),
        "plans": Target(read_plan, (encode_plan(_plan()),)),
        "http-bodies": Target(read_bodies, _JSON),
    }


def read_messages(good: tuple[bytes, ...], data: bytes) -> None:
    """Read or refused; what is read is read alike when it is sent again.

    The decoder is compiled code, whose coverage nothing guides by: so the first byte may name a good message, and
    each three bytes after it then change one byte of it.
    """
    if data and data[0] < len(good):
        data = _damaged(good[data[0]], data[1:])
    decoders: tuple[Codec[Any], ...] = (
        PEER_MESSAGES,
        codec.PEERING,
        codec.WORKER_REQUESTS,
        codec.WORKER_REPLIES,
    )
    for decoder in decoders:
        with contextlib.suppress(InvalidInput):
            sent = codec.encode(decoder.decode(data))
            again = codec.encode(decoder.decode(sent))
            assert again == sent, "a message changes on its way"


def _damaged(message: bytes, changes: bytes) -> bytes:
    damaged = bytearray(message)
    for at in range(0, len(changes) - 2, 3):
        damaged[int.from_bytes(changes[at : at + 2], "big") % len(damaged)] = changes[at + 2]
    return bytes(damaged)


def read_frames(data: bytes) -> None:
    """The first byte says how the rest is cut into chunks, which must make no difference."""
    size = 1 + data[0] if data else 1
    stream = data[1:]
    at_once = _frames([stream])
    cut = _frames([stream[start : start + size] for start in range(0, len(stream), size)])
    assert cut == at_once, "frames depend on how they arrive"


def _frames(chunks: list[bytes]) -> tuple[list[tuple[bytes, bytes]], bool]:
    decoder = FrameDecoder(_SMALL)
    found = []
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                found.append((bytes(frame.header), bytes(frame.payload)))
    except FrameTooLarge:
        return found, True
    return found, False


def read_record(attestor: Attestor, data: bytes) -> None:
    with contextlib.suppress(Refused):
        open_record(data, mesh_id=attestor.mesh_id, verify=attestor.verify, now_unix_s=NOW.timestamp())


def read_token(data: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        parse_token(data.decode("utf-8", "replace"))


def read_certificate(authority: MeshAuthority, data: bytes) -> None:
    with contextlib.suppress(Refused):
        verify_member([data], authority.root_der, NOW)
    with contextlib.suppress(Refused):
        requesting_node(data)


def read_plan(data: bytes) -> None:
    """A plan without fault has whatever the daemon asks of it."""
    with contextlib.suppress(msgspec.MsgspecError):
        plan = decode_plan(data)
        if plan_fault(plan) is None:
            for replica in plan.replicas:
                assert replica.driver is not None
                assert replica.kv_blocks > 0


def read_bodies(data: bytes) -> None:
    for shape in _BODIES:
        with contextlib.suppress(HttpFailure, InvalidInput):
            parse_body(shape, data)


_JSON = (
    b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": true}',
    b'{"prompt": ["a", "b"], "n": 2, "stop": ["x"], "logprobs": 3, "temperature": 0.5, "seed": 7}',
    b'{"prompt": [1, 2, 3], "stop_token_ids": [1], "top_k": 5, "min_p": 0.1, "ignore_eos": true}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "top_logprobs": 2}',
)


def _messages() -> Iterator[bytes]:
    epoch = Epoch(ballot=LEAST_BALLOT, n=1)
    header = Header(src="a" * 40, boot=1, to_boot=2, hears=True)
    cert = Cert(epoch=epoch, digest="0" * 64, signature=bytes(64))
    row = Row(start=0, n_tokens=2, blocks=[0, 1], sample=SamplingParams(temperature=0.5, seed=7))
    messages: tuple[msgspec.Struct, ...] = (
        Step(epoch=epoch, cert=cert, replica="r0", stage=0, step=1, driver="a", rows=[row]),
        StepResult(
            epoch=epoch, replica="r0", step=1, sampled=[[SampledToken(token_id=1)]], stage_seconds=[0.1]
        ),
        Generate(
            sequence="a/b-0",
            attempt=1,
            epoch=epoch,
            replica="r0",
            prompt=[1],
            emitted=[],
            max_tokens=2,
            stop_token_ids=[0],
            sampling=SamplingParams(),
        ),
        Hello(
            header=header,
            rank=0,
            is_free=True,
            is_leaving=False,
            promised=LEAST_BALLOT,
            is_coordinator=False,
            ballot=LEAST_BALLOT,
            n_held=1,
            cert=cert,
        ),
        Beat(header=header, ballot=LEAST_BALLOT, seq=1, cur=cert, prep=epoch, heirs=("b",)),
        Facts(record=bytes(20)),
        ProbeChunk(probe=1, is_last=True),
        PeerHello(protocol_version=1, hexmesh_version="0", node_id="a", boot=1, name="n", clock_unix_s=1.0),
        WantRoot(),
        JoinRequest(
            protocol_version=1,
            hexmesh_version="0",
            issuer="a",
            secret=bytes(32),
            csr=bytes(9),
            dht_peer_id="x",
            name="n",
            clock_unix_s=1.0,
        ),
    )
    yield from map(codec.encode, messages)


def _streams() -> Iterator[bytes]:
    for size in (0, 6):
        parts = frame_parts(b"header", b"payload" * 9) + frame_parts(b"", b"") + frame_parts(b"next")
        yield bytes([size]) + b"".join(map(bytes, parts))


def _record(attestor: Attestor) -> bytes:
    record = NodeRecord(
        mesh_id=attestor.mesh_id,
        node=attestor.node_id,
        boot=1,
        sequence=1,
        made_at_unix_s=NOW.timestamp(),
        name="n",
        site="s",
        peer_address="127.0.0.1:1",
        dht_maddrs=(),
        hexmesh_version="0",
        protocol_version=1,
        model_id="m",
    )
    expires_at_unix_s = NOW.timestamp() + 60
    return sign_record(record, expires_at_unix_s=expires_at_unix_s, chain=attestor.chain, sign=attestor.sign)


def _token(authority: MeshAuthority, key: NodeKey) -> str:
    return format_token(make_token("127.0.0.1:7701", bytes(32), key.node_id, bytes(32)))


def _plan() -> Plan:
    stage = Stage(
        node="a",
        devices=(0,),
        start=0,
        stop=4,
        kv_blocks=8,
        needed_bytes=1,
        room_bytes=2,
        predicted_step_s=0.1,
    )
    replica = Replica(
        id="r0",
        role="mixed",
        stages=(stage,),
        block_tokens=16,
        predicted_tokens_per_s=1.0,
        predicted_batch=1,
    )
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=4,
        dtype="float32",
        max_model_tokens=128,
        hosts={"a": 1},
        replicas=(replica,),
    )
