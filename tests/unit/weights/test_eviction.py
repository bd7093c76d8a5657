"""What leaves a full cache, and what never does."""

from __future__ import annotations

from hexmesh.weights.eviction import CachedTensor, Eviction, choose_evictions


def cached(name: str, n_bytes: int, used_at_s: float, *, is_in_use: bool = False) -> CachedTensor:
    return CachedTensor(key=(name, 0), n_bytes=n_bytes, used_at_unix_s=used_at_s, is_in_use=is_in_use)


OLD, MIDDLE, NEW = cached("old", 10, 1.0), cached("middle", 10, 2.0), cached("new", 10, 3.0)


def test_nothing_goes_while_there_is_room() -> None:
    assert choose_evictions([OLD, NEW], wanted_bytes=10, room_bytes=30) == Eviction((), 0)


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    assert choose_evictions([NEW, OLD, MIDDLE], 5, 30) == Eviction((OLD,), 0)
    assert choose_evictions([NEW, OLD, MIDDLE], 11, 30) == Eviction((OLD, MIDDLE), 0)


def test_what_a_stage_uses_stays_and_the_lack_is_told() -> None:
    used = cached("used", 10, 0.0, is_in_use=True)
    assert choose_evictions([used, OLD, NEW], 20, 30) == Eviction((OLD, NEW), 0)
    assert choose_evictions([used, OLD], 25, 30) == Eviction((OLD,), 5)


def test_a_cap_that_shrank_is_kept_to() -> None:
    assert choose_evictions([OLD, MIDDLE, NEW], 0, 10) == Eviction((OLD, MIDDLE), 0)
