"""Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers", 2011).

A draw is a pure function of key and counter: no state, so the same whatever was drawn before or beside it.
Arrays in, arrays out: a batch's draws cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Words = np.ndarray  # (n,) uint64, each below 2**32

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Four random words of 32 bits for each counter of four words and key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Numbers in [0, 1) with 53 random bits, each for the token at a position of a request's answer `choice`."""
    position, choice, seed = (np.array(column, dtype=np.uint64) for column in (positions, choices, seeds))
    counter = (position & _MASK, position >> _HALF, choice & _MASK, choice >> _HALF)
    low, high, _, _ = philox4x32(counter, (seed & _MASK, seed >> _HALF))
    bits = (high << _HALF | low) >> np.uint64(11)
    uniform: np.ndarray = bits.astype(np.float64) * 2.0**-53
    return uniform
