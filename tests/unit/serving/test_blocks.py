"""Blocks by name, count and lease, one rule at a time; test_serving_machine.py has them all at once."""

from __future__ import annotations

import pytest

from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.prefix import PrefixChain, first_link

FIRST = first_link("model", "")


def states(pool: BlockPool) -> dict[str, int]:
    """How many blocks are in each state, but for none."""
    counts = {
        "free": pool.n_free,
        "used": pool.n_used,
        "cached": pool.n_cached,
        "leased": pool.n_leased,
    }
    assert sum(counts.values()) == pool.n_blocks
    return {state: n for state, n in counts.items() if n}


def computed(pool: BlockPool, tokens: list[int]) -> list[int]:
    """The table of a sequence whose tokens are all computed."""
    prefix = PrefixChain(FIRST)
    table: list[int] = []
    pool.use(table, pool.match(prefix, tokens))
    assert pool.grow(table, len(tokens))
    for index in range(len(tokens) // pool.block_tokens):
        assert pool.seal(table, index, prefix.name(tokens, (index + 1) * pool.block_tokens))
    return table


def matched(pool: BlockPool, tokens: list[int]) -> int:
    return len(pool.match(PrefixChain(FIRST), tokens))


@pytest.mark.parametrize("block_tokens", [1, 3, 8, 16, 24, 32])
def test_a_prefix_is_found_in_blocks_of_any_size(block_tokens: int) -> None:
    pool = BlockPool(100, block_tokens)
    tokens = list(range(70))
    table = computed(pool, tokens)
    n_whole = 69 // block_tokens
    assert pool.match(PrefixChain(FIRST), tokens) == table[:n_whole]
    assert matched(pool, [*tokens[:50], 999, *tokens[51:]]) == 50 // block_tokens
    assert matched(pool, [999, *tokens[1:]]) == 0
    assert pool.match(PrefixChain(first_link("model", "salt")), tokens) == []
    assert pool.match(PrefixChain(first_link("other model", "")), tokens) == []


def test_what_nobody_uses_is_cached_if_it_has_a_name_and_free_if_not() -> None:
    pool = BlockPool(10, 4)
    table = computed(pool, list(range(10)))
    assert states(pool) == {"used": 3, "free": 7}
    pool.release(table)
    assert states(pool) == {"cached": 2, "free": 8}
    again = computed(pool, list(range(10)))
    assert states(pool) == {"used": 3, "free": 7}
    pool.release(again)


def test_shared_blocks_count_once_and_are_let_go_by_the_last() -> None:
    pool = BlockPool(10, 4)
    tables = [computed(pool, [*range(8), 90 + who]) for who in range(3)]
    assert [table[:2] for table in tables] == [tables[0][:2]] * 3
    assert states(pool) == {"used": 5, "free": 5}
    for n_left, table in zip((4, 3, 0), tables, strict=True):
        pool.release(table)
        assert pool.n_used == n_left


def test_the_longest_unused_goes_first_and_a_leaf_before_its_prefix() -> None:
    pool = BlockPool(6, 4)
    old, new = list(range(13)), [*range(4), *range(50, 59)]
    pool.release(computed(pool, old))
    pool.release(computed(pool, new))
    assert states(pool) == {"cached": 5, "free": 1}
    lasts = []
    taken: list[int] = []
    for n_blocks in range(1, 7):
        assert pool.grow(taken, 4 * n_blocks)
        lasts.append((matched(pool, old), matched(pool, new)))
    assert lasts == [(3, 3), (2, 3), (1, 3), (1, 2), (1, 1), (0, 0)]
    assert not pool.grow(taken, 28)


def test_one_block_stands_for_one_content() -> None:
    pool = BlockPool(10, 4)
    tokens = list(range(8))
    tables = []
    for _ in range(2):
        table: list[int] = []
        assert pool.grow(table, 8)
        tables.append(table)
    prefix = PrefixChain(FIRST)
    for table in tables:
        for index in range(2):
            assert pool.seal(table, index, prefix.name(tokens, 4 * index + 4))
    assert tables[0] == tables[1]
    assert states(pool) == {"used": 2, "free": 8}


def test_a_leased_block_outlives_its_sequence_until_the_lease_ends() -> None:
    pool = BlockPool(10, 4)
    table = computed(pool, list(range(10)))
    pool.lease("handoff", table, until_s=5.0)
    assert states(pool) == {"used": 3, "free": 7}
    pool.release(table)
    assert states(pool) == {"leased": 3, "free": 7}
    assert not pool.grow([], 32), "leased blocks are not to be had"
    assert pool.renew("handoff", 8.0)
    assert pool.end_leases(7.9) == []
    assert pool.end_leases(8.0) == ["handoff"]
    assert states(pool) == {"cached": 2, "free": 8}
    assert not pool.renew("handoff", 99.0)
    assert not pool.end_lease("handoff")


def test_a_leased_prefix_can_be_used_and_stays_leased() -> None:
    pool = BlockPool(10, 4)
    table = computed(pool, list(range(9)))
    for lease_id in ("first", "second"):
        pool.lease(lease_id, table[:2], until_s=5.0)
    pool.release(table)
    again = computed(pool, list(range(9)))
    assert states(pool) == {"used": 3, "free": 7}
    assert pool.end_lease("first")
    pool.release(again)
    assert states(pool) == {"leased": 2, "free": 8}
    assert pool.end_lease("second")
    assert states(pool) == {"cached": 2, "free": 8}


def test_what_the_stages_forgot_is_not_found_nor_followed_on() -> None:
    pool = BlockPool(10, 4)
    tokens = list(range(12))
    pool.release(computed(pool, tokens[:8]))
    running = computed(pool, [*tokens[:4], 50, 51, 52, 53, 54])
    pool.forget_cached()
    assert (matched(pool, tokens), states(pool)) == (0, {"used": 3, "free": 7})
    assert not pool.seal(running, 1, b"a name"), "what it follows on is gone"
    pool.release(running)
    assert states(pool) == {"free": 10}
