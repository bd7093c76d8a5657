"""Messages to bytes and back: msgpack with a tag, checked field by field on the way in."""

from __future__ import annotations

from typing import Generic, TypeVar, cast

import msgspec

from hexmesh.errors import InvalidInput
from hexmesh.wire.circuits import CIRCUIT_MESSAGE, REACH_MESSAGE
from hexmesh.wire.control import CONTROL_MESSAGE, ControlMessage
from hexmesh.wire.data import DATA_MESSAGE
from hexmesh.wire.frames import DEFAULT_LIMITS, Buffer, FrameLimits, frame_parts
from hexmesh.wire.peering import PEERING_MESSAGE
from hexmesh.wire.weights import BULK_ANSWER, BULK_QUESTION
from hexmesh.wire.worker import WORKER_REPLY, WORKER_REQUEST

M = TypeVar("M", bound=msgspec.Struct)

_MAX_SAID = 200

_ENCODER = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """A message as it stands in a frame's header."""
    return _ENCODER.encode(message)


class Codec(Generic[M]):
    """Reads one union of tagged messages, and nothing else."""

    def __init__(self, union: object, *, name: str) -> None:
        self._name = name
        self._decoder = msgspec.msgpack.Decoder(cast("type[M]", union))

    def decode(self, header: Buffer) -> M:
        """The message in a frame's header. Raises InvalidInput on an unknown tag or bad types."""
        try:
            return self._decoder.decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MemoryError) as error:
            said = str(error)[
                :_MAX_SAID
            ]  # it quotes the message, which a stranger may have made a megabyte long
            raise InvalidInput(f"not a {self._name} message: {said}", code="bad_message") from error

    def frame(self, message: M, payload: Buffer = b"", limits: FrameLimits = DEFAULT_LIMITS) -> list[Buffer]:
        """What to write for one message with its payload. Raises FrameTooLarge."""
        return frame_parts(encode(message), payload, limits)


DataMessage = DATA_MESSAGE
ReachMessage = REACH_MESSAGE
PeeringMessage = PEERING_MESSAGE | CIRCUIT_MESSAGE
WorkerRequest = WORKER_REQUEST
WorkerReply = WORKER_REPLY
BulkQuestion = BULK_QUESTION
BulkAnswer = BULK_ANSWER

PEERING: Codec[PeeringMessage] = Codec(PEERING_MESSAGE | CIRCUIT_MESSAGE, name="peering")
WORKER_REQUESTS: Codec[WorkerRequest] = Codec(WORKER_REQUEST, name="worker request")
WORKER_REPLIES: Codec[WorkerReply] = Codec(WORKER_REPLY, name="worker reply")
BULK_QUESTIONS: Codec[BulkQuestion] = Codec(BULK_QUESTION, name="bulk question")
BULK_ANSWERS: Codec[BulkAnswer] = Codec(BULK_ANSWER, name="bulk answer")
MEMBER: Codec[ControlMessage | DataMessage | ReachMessage] = Codec(
    CONTROL_MESSAGE | DATA_MESSAGE | REACH_MESSAGE, name="member"
)
"""Everything that members send each other once both have said PeerHello."""
