"""Packed lists of tokens: what goes in comes out, in two bytes each."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.wire.token_lists import pack_counts, pack_gaps, unpack_counts, unpack_tokens

VOCABULARY = 300_000


@given(st.sets(st.integers(0, VOCABULARY - 1) | st.sampled_from([65_534, 65_535, 65_536, 131_070])))
def test_distinct_tokens_come_back_in_order(tokens: set[int]) -> None:
    rising = sorted(tokens)
    gaps = [*rising[:1], *(after - before for before, after in pairwise(rising))]

    assert unpack_tokens(pack_gaps(gaps), VOCABULARY).tolist() == rising


@given(st.lists(st.integers(0, 70_000)))
def test_counts_come_back_up_to_a_bound(counts: list[int]) -> None:
    assert unpack_counts(pack_counts(counts)).tolist() == [min(count, 65_535) for count in counts]


@given(st.binary(max_size=20))
def test_any_bytes_are_tokens_or_refused(packed: bytes) -> None:
    try:
        tokens = unpack_tokens(packed, VOCABULARY).tolist()
    except InvalidInput:
        return
    assert tokens == sorted(set(tokens))
    assert all(0 <= token < VOCABULARY for token in tokens)


def test_two_bytes_a_token() -> None:
    assert len(pack_gaps([5] * 1000)) == 2000
