"""Sequences in the middle of their outputs, as a replica that has been at work for long holds them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hexmesh.plan import Replica
from hexmesh.workload import Lengths

_N_DRAWN = 2000


@dataclass(frozen=True, slots=True)
class Resident:
    """A request that has some of its output."""

    prompt_tokens: int
    output_tokens: int
    n_emitted: int


def residents(replica: Replica, lengths: Lengths, rng: random.Random) -> Iterator[Resident]:
    """As many as the plan means it to hold and steps may have, as far as there are blocks.

    Long outputs are more of them than of the requests, in proportion to their length; each is as likely at any of
    its tokens.
    """
    drawn = [lengths.sample(rng) for _ in range(_N_DRAWN)]
    weights = [output - 1 for _, output in drawn]
    if not any(weights):
        return
    n_blocks = replica.kv_blocks
    for prompt, output in rng.choices(drawn, weights, k=replica.predicted_batch):
        n_emitted = rng.randint(1, output - 1)
        n_blocks -= -(-(prompt + n_emitted) // replica.block_tokens) + 1
        if n_blocks < 0:
            return
        yield Resident(prompt, output, n_emitted)
