"""The logical KV blocks of one replica: which are free, which belong to a sequence.

Every stage of the replica keeps its own layers' KV under the same block ids, so this one table serves all of
them. Invariant: free blocks and blocks handed out are disjoint and together are the pool.
"""

from __future__ import annotations


class BlockPool:
    """Hands out block ids 0 .. n_blocks - 1 to a batcher, or to two while a plan gives way to the next."""

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self._free = list(range(n_blocks - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        return self.n_blocks - len(self._free)

    def blocks_for(self, n_tokens: int) -> int:
        """How many blocks hold n_tokens positions."""
        return -(-n_tokens // self.block_tokens)

    def can_hold(self, n_tokens: int) -> bool:
        """Whether the whole pool, were it empty, could hold a sequence of n_tokens."""
        return self.blocks_for(n_tokens) <= self.n_blocks

    def grow(self, table: list[int], n_tokens: int) -> bool:
        """Extend a sequence's table to hold n_tokens; False, and nothing changed, when too few are free."""
        n_missing = self.blocks_for(n_tokens) - len(table)
        if n_missing > len(self._free):
            return False
        for _ in range(n_missing):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Take back all blocks of a sequence and empty its table."""
        self._free.extend(reversed(table))
        table.clear()
