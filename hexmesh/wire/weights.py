"""How members ask each other for a model's manifest, files and tensors, on the "bulk" channel.

One side asks, the other answers in order; questions may be sent ahead. Only members get here, and what is answered
is checked against the manifest, whose hash is the model's id.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hexmesh.wire.frames import FrameLimits
from hexmesh.wire.peering import Sentence, Text

MAX_CHUNKS = 64
QUESTION_LIMITS = FrameLimits(header_bytes=64 * 1024, payload_bytes=0)
ANSWER_LIMITS = FrameLimits(header_bytes=64 * 1024, payload_bytes=64 * 1024 * 1024)

_Count = Annotated[int, msgspec.Meta(ge=0)]


class WantManifest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by Blob: the encoded manifest."""

    model_id: Text


class WantFile(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by Blob: a config or tokenizer file of the manifest."""

    model_id: Text
    name: Text


class WantHoldings(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by Blob: one bit for each tensor of the manifest, in order, low bits first."""

    model_id: Text


class WantChunks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by one Blob for each of the (tensor, chunk index), in order."""

    model_id: Text
    chunks: Annotated[list[tuple[_Count, _Count]], msgspec.Meta(max_length=MAX_CHUNKS)]


class Blob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Payload: what was asked for."""


class NotHere(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """In place of a Blob: this node does not have it, or cannot read it, or has too much to do."""

    reason: Sentence
    retry_after_s: float = 0.0
    """Above 0: nothing is wrong; ask again then, on a new connection."""


BULK_QUESTION = WantManifest | WantFile | WantHoldings | WantChunks
BULK_ANSWER = Blob | NotHere
