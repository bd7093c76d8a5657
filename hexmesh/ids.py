"""Names of things: what they are made of and how they are shown. All are plain strings on the wire."""

from __future__ import annotations

import hashlib
import random
import re
from typing import NewType

NodeId = NewType("NodeId", str)
"""40 hex digits: the first 160 bits of SHA-256 over the node's public key. It persists across restarts."""

MeshId = NewType("MeshId", str)
"""40 hex digits: the first 160 bits of SHA-256 over the mesh's root certificate."""

ModelId = NewType("ModelId", str)
"""64 hex digits: SHA-256 over the model's manifest (config, tokenizer and tensors)."""

RequestId = NewType("RequestId", str)

_ID_HEX_DIGITS = 40
_SHOWN_HEX_DIGITS = 8


def fingerprint(data: bytes) -> str:
    """The 160-bit hex fingerprint that node and mesh ids are made of."""
    return hashlib.sha256(data).hexdigest()[:_ID_HEX_DIGITS]


def is_node_id(text: str) -> bool:
    """Whether a text is a whole node id."""
    return re.fullmatch(rf"[0-9a-f]{{{_ID_HEX_DIGITS}}}", text) is not None


def short(identifier: str) -> str:
    """The first digits of a long hex id, enough for a person to tell nodes apart."""
    return identifier[:_SHOWN_HEX_DIGITS]


def new_boot(rng: random.Random) -> int:
    """A fresh boot nonce: a random positive 62-bit number that names one run of a daemon."""
    return rng.getrandbits(62) | 1


def new_request_id(rng: random.Random) -> RequestId:
    """A fresh request id, 24 hex digits."""
    return RequestId(f"{rng.getrandbits(96):024x}")
