"""Lists of distinct token ids, and of counts, as two bytes each: a rising list is written as its gaps.

Stages that only pass a list on do not look into it; the last one reads it without a loop.
"""

from __future__ import annotations

from array import array

import numpy as np

from hexmesh.errors import InvalidInput

_MOST = 0xFFFF
"""As a gap: the next number adds to it. As a count: so many or more."""


def pack_gaps(gaps: list[int]) -> bytes:
    """A rising list of token ids, given as its first one and the differences that follow."""
    if gaps and max(gaps) >= _MOST:
        gaps = [part for gap in gaps for part in (*[_MOST] * (gap // _MOST), gap % _MOST)]
    return array("H", gaps).tobytes()


def pack_counts(counts: list[int]) -> bytes:
    if counts and max(counts) > _MOST:
        counts = [min(count, _MOST) for count in counts]
    return array("H", counts).tobytes()


def unpack_tokens(packed: bytes, vocab_size: int) -> np.ndarray:
    """Distinct token ids, rising (n,) int64. Raises InvalidInput when they are not, or not of the vocabulary."""
    gaps = _numbers(packed)
    tokens: np.ndarray = np.cumsum(gaps, dtype=np.int64)[gaps != _MOST]
    if len(tokens) and (tokens[-1] >= vocab_size or (tokens[1:] <= tokens[:-1]).any()):
        raise InvalidInput(f"a packed list of tokens is not one of distinct ids below {vocab_size}")
    return tokens


def unpack_counts(packed: bytes) -> np.ndarray:
    """(n,) float32. Raises InvalidInput."""
    return _numbers(packed).astype(np.float32)


def _numbers(packed: bytes) -> np.ndarray:
    if len(packed) % 2:
        raise InvalidInput(f"a packed list of {len(packed)} bytes, and each number takes two")
    return np.frombuffer(packed, dtype=np.uint16)
