"""A replica that computes: token ids stand for keys and values, a hash of all that a row can see for the model.

A stage writes the ids it is given into the slots that the row's blocks name, then reads the sequence back through
the same blocks, so that a wrong block, a stale prefix, a lost chunk or a shared block that was written shows in the
very next token.
"""

from __future__ import annotations

import hashlib
from array import array
from zlib import crc32

from hexmesh.serving.batcher import MicroBatch, ScheduledRow
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import SampledToken, SamplingParams

VOCABULARY = 5
"""Small, so that drafts are often right and outputs often alike."""


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`."""
    return hashlib.sha256(array("q", tokens).tobytes()).digest()[0] % VOCABULARY


def oracle(prompt: list[int], max_tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The fake model's answer, one sequence at a time and without blocks."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def sequence(
    name: str,
    prompt: int | list[int],
    max_tokens: int = 4,
    *,
    stop: frozenset[int] = frozenset(),
    priority: int = 0,
    deadline_s: float = float("inf"),
    salt: str = "",
) -> Sequence:
    """A request; a prompt given as a number is of that length and unlike any other's."""
    tokens = (
        prompt
        if isinstance(prompt, list)
        else [1000 * crc32(name.encode()) % 10**9 + at for at in range(prompt)]
    )
    return Sequence(
        id=name,
        attempt=1,
        tokens=list(tokens),
        n_prompt=len(tokens),
        max_tokens=max_tokens,
        stop_token_ids=stop,
        sampling=SamplingParams(),
        priority=priority,
        deadline_s=deadline_s,
        cache_salt=salt,
    )


class FakeStages:
    """The KV slots of a replica; `run` is a step through all its stages."""

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._slots: list[int] = [-1] * (n_blocks * block_tokens)

    def forget(self) -> None:
        """The pool was made anew."""
        self._slots = [-1] * len(self._slots)

    def run(self, orders: list[Order]) -> list[list[SampledToken]]:
        """Compute a step; the drawn tokens of each row that asked."""
        for order in orders:
            for position, token in enumerate(order.token_ids, start=order.start):
                self._slots[self._slot(order, position)] = token
        return [self._draw(order) for order in orders if order.n_wanted]

    def _draw(self, order: Order) -> list[SampledToken]:
        stop = order.start + len(order.token_ids)
        seen = [self._slots[self._slot(order, position)] for position in range(stop)]
        wanted = range(stop - order.n_wanted + 1, stop + 1)
        return [SampledToken(token_id=next_token(seen[:n_seen])) for n_seen in wanted]

    def _slot(self, order: Order, position: int) -> int:
        block, offset = divmod(position, self._block_tokens)
        return order.blocks[block] * self._block_tokens + offset


class Order:
    """A row as it leaves the driver: what the batcher does to its tables later does not change it."""

    def __init__(self, row: ScheduledRow) -> None:
        self.sequence = row.sequence
        self.start = row.start
        self.token_ids = list(row.token_ids)
        self.n_wanted = row.n_wanted
        self.blocks = list(row.sequence.blocks)


def orders_of(batch: MicroBatch) -> list[Order]:
    return [Order(row) for row in batch.rows]
