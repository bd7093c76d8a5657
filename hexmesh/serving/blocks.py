"""The logical KV blocks of one replica: who uses them, and what those that nobody uses still hold.

Every stage of the replica keeps its own layers' KV under the same block ids, so this one table serves all of
them. Each block is in one of four states, and their numbers add up to the pool:
  used    in the table of at least one sequence
  leased  in no table, but kept for a handoff until its lease ends
  cached  in neither; a whole block of a known prefix, found again by that prefix's name, until it is evicted
  free    none of these
A block gets its name (`seal`) once its KV is known to be computed, and from then on is never written. There is one
block for a name, and a table that has a named block has named blocks before it: therefore a block is let go no later
than the ones it follows on, and eviction, longest unused first, takes it before them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from hexmesh.serving.prefix import PrefixChain


@dataclass(slots=True)
class Lease:
    """Blocks kept for a handoff; owned by the pool."""

    blocks: list[int]
    until_s: float


class BlockPool:
    """Hands out block ids 0 .. n_blocks - 1 to a batcher, or to two while a plan gives way to the next."""

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.n_leased = 0
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Longest unused first."""
        self._n_tables = [0] * n_blocks
        self._n_leases = [0] * n_blocks
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._leases: dict[str, Lease] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_cached(self) -> int:
        return len(self._cached)

    @property
    def n_used(self) -> int:
        return self.n_blocks - self.n_available - self.n_leased

    @property
    def n_available(self) -> int:
        """How many blocks `grow` can give: free ones, and cached ones that it evicts."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, n_tokens: int) -> int:
        """How many blocks hold n_tokens positions."""
        return -(-n_tokens // self.block_tokens)

    def can_hold(self, n_tokens: int) -> bool:
        """Whether the whole pool, were it empty, could hold a sequence of n_tokens."""
        return self.blocks_for(n_tokens) <= self.n_blocks

    def grow(self, table: list[int], n_tokens: int) -> bool:
        """Extend a sequence's table to hold n_tokens; False, and nothing changed, when too few are available."""
        n_missing = self.blocks_for(n_tokens) - len(table)
        if n_missing > self.n_available:
            return False
        for _ in range(n_missing):
            block = self._free.pop() if self._free else self._evict()
            self._n_tables[block] = 1
            table.append(block)
        return True

    def trim(self, table: list[int], n_tokens: int) -> None:
        """Let go of what a table has beyond n_tokens, last block first."""
        while len(table) > self.blocks_for(n_tokens):
            self._let_go(table.pop())

    def release(self, table: list[int]) -> None:
        """Let go of all blocks of a sequence and empty its table."""
        self.trim(table, 0)

    def match(self, prefix: PrefixChain, tokens: list[int]) -> list[int]:
        """The known blocks that hold the start of `tokens`, never its last token: that one is to be computed."""
        found = []
        for stop in range(self.block_tokens, len(tokens), self.block_tokens):
            block = self._named.get(prefix.name(tokens, stop))
            if block is None:
                break
            found.append(block)
        return found

    def is_known(self, name: bytes) -> bool:
        """Whether a block has that name."""
        return name in self._named

    def n_idle(self, blocks: list[int]) -> int:
        """How many of these are cached: using them leaves so many fewer available."""
        return sum(block in self._cached for block in blocks)

    def use(self, table: list[int], blocks: list[int]) -> None:
        """Put blocks that hold something (matched, or leased) into a table, behind what it has."""
        for block in blocks:
            self._hold(block)
            table.append(block)

    def seal(self, table: list[int], index: int, name: bytes) -> bool:
        """Name a table's block, all of it computed and never to be written again; False if it cannot have a name.

        If another block has that name, it takes this one's place in the table: let no step be in flight then that
        reads or writes the table.
        """
        if index > 0 and table[index - 1] not in self._names:
            return False  # what came before was forgotten
        block = table[index]
        known = self._named.setdefault(name, block)
        if known == block:
            self._names[block] = name
        else:
            self._hold(known)
            table[index] = known
            self._let_go(block)
        return True

    def forget_cached(self) -> None:
        """No block holds what its name says any more: the stages made their KV pools anew."""
        self._named.clear()
        self._names.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def lease(self, lease_id: str, blocks: list[int], until_s: float) -> None:
        """Keep blocks that are in a table, whatever becomes of it, until a time or `end_lease`."""
        assert lease_id not in self._leases, "leased twice"
        for block in blocks:
            self._n_leases[block] += 1
        self._leases[lease_id] = Lease(list(blocks), until_s)

    def renew(self, lease_id: str, until_s: float) -> bool:
        """Put off a lease's end; False if it has ended already."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.until_s = max(lease.until_s, until_s)
        return lease is not None

    def end_lease(self, lease_id: str) -> bool:
        """Keep a lease's blocks no longer; False if it has ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        for block in reversed(lease.blocks):
            self._n_leases[block] -= 1
            if not self._n_leases[block] and not self._n_tables[block]:
                self.n_leased -= 1
                self._put_aside(block)
        return True

    def end_leases(self, now_s: float) -> list[str]:
        """End those whose time is over; their ids."""
        over = [lease_id for lease_id, lease in self._leases.items() if lease.until_s <= now_s]
        for lease_id in over:
            self.end_lease(lease_id)
        return over

    def _hold(self, block: int) -> None:
        self._n_tables[block] += 1
        if self._n_tables[block] > 1:
            return
        if self._n_leases[block]:
            self.n_leased -= 1
        else:
            del self._cached[block]

    def _let_go(self, block: int) -> None:
        self._n_tables[block] -= 1
        if self._n_tables[block]:
            return
        if self._n_leases[block]:
            self.n_leased += 1
        else:
            self._put_aside(block)

    def _put_aside(self, block: int) -> None:
        if block in self._names:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block
