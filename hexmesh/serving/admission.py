"""Who of the waiting sequences may run: in order of rank, as blocks allow, and nothing is computed twice.

A sequence whose next missing block is just being computed by a running one waits for it, as long as that one gets on.
One that finds too few blocks may be passed by smaller ones behind it, but not for ever.

KV that waits to be handed over holds blocks that nobody computes with. Where the way or the other end is slower than
the prompts, more and more of it would wait, until hardly a sequence decodes here: so where some stay, it may hold but a
small share of the pool, and prompts for others wait meanwhile.
"""

from __future__ import annotations

from bisect import insort

from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.sequence import Sequence

LOOK_AHEAD = 8
"""How many sequences that find no room are looked at in one step."""
MAX_PASSES = 32
"""How many may pass the first one that finds no room."""
LEAVING_DIVISOR, LEAST_LEAVING = 16, 4
"""Of a pool's blocks, those that may wait to be handed over; and so many sequences may, however large they are."""


class Admission:
    """Owns the waiting sequences, and knows which blocks are in the making; part of a batcher."""

    def __init__(self, pool: BlockPool) -> None:
        self.waiting: list[Sequence] = []
        """By rank."""
        self._pool = pool
        self._makers: dict[bytes, Sequence] = {}
        """Which running sequence computes the block of that name."""
        self._promised: dict[Sequence, list[bytes]] = {}
        self._awaited: dict[Sequence, bytes] = {}
        self._first_refused: Sequence | None = None
        self._n_passed = 0
        self._stuck_at: tuple[int, int] | None = None
        """Blocks available and sequences running when nothing could be taken from the queue as it still is."""

    def add(self, sequence: Sequence) -> None:
        """Queue it in the order of ranks."""
        insort(self.waiting, sequence, key=_rank)
        self._stuck_at = None

    def remove(self, sequence: Sequence) -> None:
        """It waits no more."""
        self.waiting.remove(sequence)
        self._stuck_at = None
        self._awaited.pop(sequence, None)

    def admit(
        self, n_running: int, max_running: int, last_step: int, *, n_leaving: int = 0
    ) -> list[Sequence]:
        """Take from the queue what may run now; blocks for all of their tokens are in their tables.

        Of the running ones `n_leaving` are computed for other replicas.
        """
        started: list[Sequence] = []
        some_stay = n_running > n_leaving or any(not waiting.kept_s for waiting in self.waiting)
        n_refused = n_following = 0
        for sequence in self.waiting:
            n_after = n_running + len(started)
            if n_after >= max_running or n_refused == LOOK_AHEAD:
                break
            if sequence.reuses_prefix and self._waits_for_maker(sequence, last_step):
                n_following += 1
                continue
            if sequence.kept_s and some_stay and self._is_way_full(sequence):
                continue
            if self._start(sequence, n_after, last_step):
                started.append(sequence)
                self._n_passed += n_refused > 0
                continue
            if n_refused == 0 and self._is_passed_enough(sequence):
                break
            n_refused += 1
        for sequence in started:
            self.remove(sequence)
        is_stuck = not started and not n_following
        self._stuck_at = (self._pool.n_available, n_running) if is_stuck else None
        return started

    def is_stuck(self, n_running: int) -> bool:
        """Whether nothing can be taken from the queue, unless blocks come free.

        A block that gets its name may be one less to be found for a waiting sequence, but who filled it takes another.
        """
        if self._stuck_at is None:
            return False
        n_available, n_running_then = self._stuck_at
        return self._pool.n_available <= n_available and n_running >= n_running_then

    def sealed(self, name: bytes) -> None:
        """A block in the making is there."""
        self._makers.pop(name, None)

    def stop_making(self, sequence: Sequence) -> None:
        """It has computed its prompt, or never will."""
        for name in self._promised.pop(sequence, ()):
            if self._makers.get(name) is sequence:
                del self._makers[name]

    def _is_way_full(self, sequence: Sequence) -> bool:
        n_needed = self._pool.blocks_for(len(sequence.tokens))
        most = max(LEAST_LEAVING * n_needed, self._pool.n_blocks // LEAVING_DIVISOR)
        return self._pool.n_leased + n_needed > most

    def _is_passed_enough(self, sequence: Sequence) -> bool:
        if sequence is not self._first_refused:
            self._first_refused, self._n_passed = sequence, 0
        return self._n_passed >= MAX_PASSES

    def _start(self, sequence: Sequence, n_running: int, last_step: int) -> bool:
        """Give it its blocks if there are enough, and one yet for each running sequence, so that those can grow."""
        pool = self._pool
        known = pool.match(sequence.prefix, sequence.tokens) if sequence.reuses_prefix else []
        n_needed = pool.blocks_for(len(sequence.tokens)) - len(known) + pool.n_idle(known)
        if n_needed + n_running > pool.n_available:
            return False
        pool.use(sequence.blocks, known)
        is_grown = pool.grow(sequence.blocks, len(sequence.tokens))
        assert is_grown
        sequence.start_from(len(known), len(known) * pool.block_tokens, last_step)
        if sequence.names_blocks:
            self._promise(sequence)
        return True

    def _promise(self, sequence: Sequence) -> None:
        block_tokens = self._pool.block_tokens
        stops = range((sequence.n_sealed + 1) * block_tokens, len(sequence.tokens) + 1, block_tokens)
        names = [sequence.prefix.name(sequence.tokens, stop) for stop in stops]
        self._promised[sequence] = names
        for name in names:
            self._makers.setdefault(name, sequence)

    def _waits_for_maker(self, sequence: Sequence, last_step: int) -> bool:
        awaited = self._awaited.get(sequence)
        if awaited is None or awaited not in self._makers:
            awaited = self._last_in_the_making(sequence)
            if awaited is None:
                self._awaited.pop(sequence, None)
                return False
            self._awaited[sequence] = awaited
        maker = self._makers[awaited]
        gets_on = maker.n_in_flight > 0 or maker.last_step == last_step
        return gets_on and maker.priority <= sequence.priority

    def _last_in_the_making(self, sequence: Sequence) -> bytes | None:
        """Of the blocks that it needs next, the last that is in the making, if the first one is."""
        block_tokens, found = self._pool.block_tokens, None
        n_known = len(self._pool.match(sequence.prefix, sequence.tokens))
        for stop in range((n_known + 1) * block_tokens, len(sequence.tokens), block_tokens):
            name = sequence.prefix.name(sequence.tokens, stop)
            if name not in self._makers:
                break
            found = name
        return found


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
