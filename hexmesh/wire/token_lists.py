"""Lists of distinct token ids, and of counts, in few bytes: a rising list is written as its gaps.

msgpack writes numbers below 128 in one byte, which most gaps and counts are. Stages that only pass a list on
do not look into it.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Annotated

import msgspec

from hexmesh.errors import InvalidInput

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]])


def pack_numbers(numbers: list[int]) -> bytes:
    """Numbers from 0 to 2**31 - 1; nothing for none of them."""
    return _ENCODER.encode(numbers) if numbers else b""


def unpack_numbers(packed: bytes) -> list[int]:
    """What was packed. Raises InvalidInput."""
    if not packed:
        return []
    try:
        return _DECODER.decode(packed)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(f"not a packed list of tokens: {error}", code="bad_message") from error


def gaps_of(rising: list[int]) -> list[int]:
    """A rising list as its first number and the differences that follow."""
    return [*rising[:1], *(after - before for before, after in pairwise(rising))]


def unpack_tokens(packed: bytes, vocab_size: int) -> list[int]:
    """Distinct token ids, rising, from their packed gaps. Raises InvalidInput when they are not of the vocabulary."""
    gaps = unpack_numbers(packed)
    tokens = list(accumulate(gaps))
    if tokens and (tokens[-1] >= vocab_size or 0 in gaps[1:]):
        raise InvalidInput(f"a packed list of tokens is not one of distinct ids below {vocab_size}")
    return tokens
