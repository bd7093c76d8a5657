"""Which peer fetches which chunk next. Pure: peers ask for work, report it done, or give it back.

Order is that of the tensors; a peer takes from the front what it holds. When nothing is left to take, a peer may
take what has been on its way from another for long, so that one slow peer does not hold up the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from hexmesh.weights.manifest import Chunk

SLOW_S = 5.0
"""A chunk on its way for longer may be asked of a second peer."""


class FetchQueue:
    """Owner of the chunks that are still to come."""

    def __init__(self, chunks: Mapping[Chunk, int]) -> None:
        """`chunks`: what to fetch, with bytes."""
        self._sizes = dict(chunks)
        self._waiting: dict[Chunk, None] = dict.fromkeys(chunks)
        self._flying: dict[Chunk, dict[str, float]] = {}
        self.total_bytes = sum(chunks.values())
        self.done_bytes = 0

    @property
    def is_done(self) -> bool:
        return not self._waiting and not self._flying

    def take(
        self, peer: str, holds: Callable[[int], bool], max_bytes: int, max_chunks: int, now_s: float
    ) -> list[Chunk]:
        """Chunks for `peer` to fetch now, at least one if there is any for it. `holds` tells its tensors."""
        taken: list[Chunk] = []
        n_bytes = 0
        for chunk in self._choices(peer, now_s):
            if not holds(chunk.tensor):
                continue
            if taken and n_bytes + self._sizes[chunk] > max_bytes:
                break
            taken.append(chunk)
            n_bytes += self._sizes[chunk]
            if len(taken) >= max_chunks:
                break
        for chunk in taken:
            self._waiting.pop(chunk, None)
            self._flying.setdefault(chunk, {})[peer] = now_s
        return taken

    def done(self, chunk: Chunk) -> bool:
        """The chunk is here and checked; False if it was before."""
        if self._flying.pop(chunk, None) is None and chunk not in self._waiting:
            return False
        self._waiting.pop(chunk, None)
        self.done_bytes += self._sizes[chunk]
        return True

    def give_back(self, peer: str, chunks: Iterable[Chunk]) -> None:
        """The peer does not bring these; others may."""
        returned = [chunk for chunk in chunks if self._flying.get(chunk, {}).pop(peer, None) is not None]
        for chunk in returned:
            if not self._flying[chunk]:
                del self._flying[chunk]
        again = [chunk for chunk in returned if chunk not in self._flying]
        self._waiting = {**dict.fromkeys(again), **self._waiting}

    def _choices(self, peer: str, now_s: float) -> Iterator[Chunk]:
        if self._waiting:
            return iter(self._waiting)
        return (
            chunk
            for chunk, since in self._flying.items()
            if peer not in since and now_s - max(since.values()) >= SLOW_S
        )
