"""Packed lists of tokens: what goes in comes out, in about a byte each."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.wire.token_lists import gaps_of, pack_numbers, unpack_numbers, unpack_tokens

VOCABULARY = 1000


@given(st.sets(st.integers(0, VOCABULARY - 1)))
def test_distinct_tokens_come_back_in_order(tokens: set[int]) -> None:
    rising = sorted(tokens)

    assert unpack_tokens(pack_numbers(gaps_of(rising)), VOCABULARY) == rising


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_counts_come_back(counts: list[int]) -> None:
    assert unpack_numbers(pack_numbers(counts)) == counts


@given(st.binary(max_size=20))
def test_any_bytes_are_tokens_or_refused(packed: bytes) -> None:
    try:
        tokens = unpack_tokens(packed, VOCABULARY)
    except InvalidInput:
        return
    assert tokens == sorted(set(tokens))
    assert all(0 <= token < VOCABULARY for token in tokens)


def test_a_long_prompts_tokens_take_little_more_than_a_byte_each() -> None:
    tokens = sorted(random.Random(1).sample(range(128_000), 4000))

    assert len(pack_numbers(gaps_of(tokens))) < 4000 * 1.1 + 8


@pytest.mark.parametrize("packed", [b"\xc1", b"\x91\xff", b"\x91\xa1a", b"\x01", b"\x91"])
def test_other_bytes_are_refused(packed: bytes) -> None:
    with pytest.raises(InvalidInput):
        unpack_numbers(packed)
