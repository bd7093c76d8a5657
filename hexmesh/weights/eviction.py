"""What goes when the cache is full: least recently used tensors first, never one that a stage uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTensor:
    """A tensor's file in the cache, whole or partial. `key` names it among all models."""

    key: tuple[str, int]
    n_bytes: int
    used_at_unix_s: float
    is_in_use: bool


@dataclass(frozen=True, slots=True)
class Eviction:
    """What to delete; `short_bytes` is what then still lacks."""

    victims: tuple[CachedTensor, ...]
    short_bytes: int


def choose_evictions(cached: Sequence[CachedTensor], wanted_bytes: int, room_bytes: int) -> Eviction:
    """The fewest least recently used tensors to delete, so that wanted_bytes more stay within room_bytes."""
    over_bytes = sum(tensor.n_bytes for tensor in cached) + wanted_bytes - room_bytes
    free = sorted(
        (tensor for tensor in cached if not tensor.is_in_use),
        key=lambda tensor: (tensor.used_at_unix_s, tensor.key),
    )
    victims = []
    for tensor in free:
        if over_bytes <= 0:
            break
        victims.append(tensor)
        over_bytes -= tensor.n_bytes
    return Eviction(tuple(victims), max(0, over_bytes))
