"""HexGen-2's swaps that the flow guides, beside swaps drawn by chance: the paper's own ablation."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import msgspec

from hexmesh.planner.algorithms.hexgen2 import (
    MAX_FLOWS,
    Builder,
    Group,
    Groups,
    Network,
    Proposals,
    first_network,
    guided,
    improve,
    most_groups,
    retyped,
)
from hexmesh.planner.exchanges import handed_over, swapped
from hexmesh.planner.run import Run
from tools.bench.planner_fleets import MODELS, problem_of

FLEET = "hexgen2-1"
N_SEEDS = 15
BUDGET_S = 20.0


class Swaps(msgspec.Struct, frozen=True, kw_only=True, tag="swaps"):
    """One class of workload: flow before any swap, after those that the flow guides, and after random ones by seed."""

    workload: str
    first: float
    guided: float
    guided_s: float
    random: tuple[float, ...]
    random_s: tuple[float, ...]

    @property
    def key(self) -> str:
        return swaps_key(self.workload)


def swaps_key(workload: str) -> str:
    return f"swaps/{workload}"


def swaps(workload: str) -> Swaps:
    """Both from the same partition, with the same kinds of swap and as many networks solved at most."""
    problem = problem_of(FLEET, workload, MODELS[0])
    builder = Builder(problem, prefills_at_once=True)
    first = first_network(builder, max(2, most_groups(problem)))

    def improved(propose: Proposals, seed: int) -> tuple[float, float]:
        run = Run(problem=problem, rng=random.Random(seed), clock=time.perf_counter, budget_s=BUDGET_S)
        network = improve(run, first, builder, propose, "swaps")
        return network.value, run.elapsed_s

    value, seconds = improved(guided, 0)
    by_chance = [improved(_at_random(random.Random(seed)), seed) for seed in range(N_SEEDS)]
    return Swaps(
        workload=workload,
        first=first.value,
        guided=value,
        guided_s=seconds,
        random=tuple(value for value, _ in by_chance),
        random_s=tuple(seconds for _, seconds in by_chance),
    )


def _at_random(rng: random.Random) -> Proposals:
    def propose(network: Network) -> Iterator[Groups]:
        for _ in range(MAX_FLOWS):
            yield _drawn(network.groups, rng)

    return propose


def _drawn(groups: Groups, rng: random.Random) -> Groups:
    giver, taker = rng.sample(range(len(groups)), 2)
    if rng.random() < 0.1:
        return retyped(groups, giver)
    mine, theirs = groups[giver], groups[taker]
    trade = swapped if rng.random() < 0.5 else handed_over
    pairs = list(trade(mine.team, theirs.team))
    if not pairs:
        return retyped(groups, giver)
    a, b = rng.choice(pairs)
    changed = {giver: Group(a, mine.phase), taker: Group(b, theirs.phase)}
    kept = (changed.get(at, group) for at, group in enumerate(groups))
    return tuple(group for group in kept if group.team)
