"""HexGen (arXiv 2311.11514): a genetic search over partitions of the GPUs into groups, one colocated replica each.

    1. group the GPUs by k-means over the rows of the communication matrix (k by the elbow): one group a region
    2. individual: a partition. Fitness: what its replicas serve, each laid out as well as it can be
    3. mutation, always: merge two groups, split one, or swap GPUs of two; a group without memory for the model is none
    4. of parents and offspring the fittest survive; no crossover

From the paper: k-means regions, merge, split and swap, the memory lower bound, a layout search inside each group. From
its released optimiser: mutation with probability 1 and crossover with 0, 10 offspring a generation, tournaments of 3,
population 100, 300 generations, halves rounded down, one GPU at a time, groups that at first stay within their region.

Differs: fitness is the sum of the replicas' balanced rates instead of SLO attainment in a simulator (the release ranks
mostly by the number of groups); layouts are exact (`Layouts`) where the release tries near-even cuts; a few moves leave
their region; plus-selection instead of tournaments among all; drafts that lead are judged with handoffs, as all are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans, vq

from hexmesh.cluster import Cluster
from hexmesh.cost import LOCAL_BYTES_PER_S, LOCAL_HOP_S
from hexmesh.planner.members import Members, draft_of
from hexmesh.planner.moves import halved, joined, pool_of_any, without
from hexmesh.planner.objective import WORTHLESS, Figures, Worth
from hexmesh.planner.pools import Team
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run

NAME = "genetic"
POPULATION, N_OFFSPRING, N_GENERATIONS, TOURNAMENT = 100, 10, 300, 3
PATIENCE = 150
"""Generations without a fitter one after which the search ends."""
MAX_REGIONS = 10
LEAST_GAIN = 0.5
"""Of the spread that is left: with less, one more region is not worth it."""
LEAVES_REGION = 0.1
"""Of the partners of a merge or swap, so many are drawn from everywhere."""
_TRIES = 20
"""At a mutation that keeps all groups large enough."""
_K_MEANS_STARTS = 8

Partition = tuple[Team, ...]
"""Every device in one team, teams in order."""
Matrix = npt.NDArray[np.float64]


def search(run: Run) -> None:
    """Offers each partition that leads."""
    problem = run.problem
    if "mixed" not in problem.roles:
        run.notes.append("genetic colocates prefill and decode: without the role mixed it has no plan")
        return
    region_of = _region_of_pools(problem, run.rng)
    groups = Groups(region_of, _holds_model(problem))
    first = tuple(
        sorted(
            tuple((pool, n) for pool, n in problem.whole if region_of[pool] == region)
            for region in set(region_of)
        )
    )
    colocated = _Colocated(problem)
    for partition in evolve(first, groups, colocated.worth, run.rng, is_over=lambda: run.is_over):
        draft = colocated.draft(partition)
        if draft:
            run.offer(draft, NAME)
    if run.is_over:
        run.notes.append("genetic was cut off by time")


def evolve(
    first: Partition,
    groups: Groups,
    fitness: Callable[[Partition], Worth],
    rng: random.Random,
    *,
    n_generations: int = N_GENERATIONS,
    patience: int = PATIENCE,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Partition]:
    """Partitions, each fitter than all before it."""
    population = [(fitness(first), first)]
    best, seen, gained_at = population[0][0], {first}, 0
    yield first
    for generation in range(n_generations + 1):
        offspring = list[tuple[Worth, Partition]]()
        for _ in range(N_OFFSPRING if generation else POPULATION):
            if is_over():
                return
            parents = rng.choices(population + offspring if generation == 0 else population, k=TOURNAMENT)
            child = groups.mutated(max(parents, key=_fitness)[1], rng)
            if child not in seen:
                seen.add(child)
                offspring.append((fitness(child), child))
        # Of equals the younger survive: the search drifts over plateaus instead of standing on them.
        population = sorted([*reversed(offspring), *population], key=_fitness, reverse=True)[:POPULATION]
        if population[0][0] > best:
            best, gained_at = population[0][0], generation
            yield population[0][1]
        if generation - gained_at >= patience:
            return


def _fitness(individual: tuple[Worth, Partition]) -> Worth:
    return individual[0]


@dataclass(frozen=True, slots=True)
class Groups:
    """The mutations."""

    region_of: Sequence[int]
    """By pool."""
    holds_model: Callable[[Team], bool]
    """The lower bound that a group must reach."""
    leaves_region: float = LEAVES_REGION

    def mutated(self, partition: Partition, rng: random.Random) -> Partition:
        """A merge, a split or a swap, drawn until all groups are large enough; else the same."""
        for _ in range(_TRIES):
            changed = rng.choice((self._merge, self._split, self._swap))(partition, rng)
            if changed is not None:
                return changed
        return partition

    def _merge(self, partition: Partition, rng: random.Random) -> Partition | None:
        pair = self._pair(partition, rng)
        return None if pair is None else self._with(partition, pair, (joined(*pair),))

    def _split(self, partition: Partition, rng: random.Random) -> Partition | None:
        group = rng.choice(partition)
        return self._with(partition, (group,), halved(group))

    def _swap(self, partition: Partition, rng: random.Random) -> Partition | None:
        """One GPU changes its group; half of the time one comes back for it."""
        pair = self._pair(partition, rng)
        if pair is None:
            return None
        a, b = pair
        there: Team = ((pool_of_any(a, rng), 1),)
        back: Team = ((pool_of_any(b, rng), 1),) if rng.random() < 0.5 else ()
        return self._with(partition, pair, (joined(without(a, there), back), joined(without(b, back), there)))

    def _pair(self, partition: Partition, rng: random.Random) -> tuple[Team, Team] | None:
        """Two groups that share a region, now and then of any."""
        one = rng.choice(partition)
        regions = {self.region_of[pool] for pool, _ in one}
        anywhere = rng.random() < self.leaves_region
        others = [
            team
            for team in partition
            if team is not one and (anywhere or any(self.region_of[pool] in regions for pool, _ in team))
        ]
        return (one, rng.choice(others)) if others else None

    def _with(self, partition: Partition, gone: Sequence[Team], come: Sequence[Team]) -> Partition | None:
        if not all(self.holds_model(team) for team in come):
            return None
        left = list(partition)
        for team in gone:
            left.remove(team)
        return tuple(sorted((*left, *come)))


class _Colocated:
    """Partitions as replicas that serve their own prompts, each request in one of them."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._members = problem, Members(problem)

    def draft(self, partition: Partition) -> Draft:
        """Groups that are too large to be laid out are left out: they are there to be split."""
        found = (self._members.of(team, "mixed") for team in partition)
        return draft_of([member for member in found if member is not None])

    def worth(self, partition: Partition) -> Worth:
        """By the objective, without handoffs."""
        draft = self.draft(partition)
        rate = sum(layout.requests_per_s for layout in draft)
        if rate <= 0:
            return WORTHLESS
        figures = Figures(
            requests_per_s=rate,
            latency_s=sum(layout.alone_s * layout.requests_per_s for layout in draft) / rate,
            price_per_h=self._members.price_per_h(self._members.of_draft(draft)),
            n_devices=sum(part.tp for layout in draft for part in layout.parts),
        )
        return self._problem.objective.worth(figures)


def _holds_model(problem: Problem) -> Callable[[Team], bool]:
    weights = problem.capacities.costs.weight_bytes(0, problem.spec.n_layers)
    rooms = [pool.device.budget_bytes for pool in problem.pools]
    return lambda team: sum(n * rooms[pool] for pool, n in team) > weights


def _region_of_pools(problem: Problem, rng: random.Random) -> list[int]:
    """The region of each pool's host."""
    delays = delay_matrix(
        problem.cluster, problem.capacities.workload.prompt_tokens * problem.capacities.model.hidden_bytes
    )
    by_host = dict(zip((node.id for node in problem.cluster.nodes), regions(delays, rng), strict=True))
    return [by_host[pool.node.id] for pool in problem.pools]


def delay_matrix(cluster: Cluster, payload_bytes: float) -> Matrix:
    """(hosts, hosts) seconds that a prompt's hidden states take; a missing link is as slow as the slowest.

    One row a host: those of its GPUs are alike.
    """
    at = {node.id: number for number, node in enumerate(cluster.nodes)}
    delays = np.full((len(at), len(at)), np.nan)
    np.fill_diagonal(delays, LOCAL_HOP_S + payload_bytes / LOCAL_BYTES_PER_S)
    for link in cluster.links:
        delays[at[link.src], at[link.dst]] = link.rtt_p50_s / 2 + payload_bytes / link.bytes_per_s
    delays[np.isnan(delays)] = np.nanmax(delays)
    return delays


def regions(delays: Matrix, rng: random.Random) -> list[int]:
    """The region of every row: k-means with the k after which one more no longer gains much."""
    found = [_k_means(delays, k, rng) for k in range(1, min(MAX_REGIONS, len(delays)) + 1)]
    for (before, labels), (after, _) in pairwise(found):
        if before - after < LEAST_GAIN * before or before == 0:
            return labels
    return found[-1][1]


def _k_means(rows: Matrix, k: int, rng: random.Random) -> tuple[float, list[int]]:
    """Sum of squared distances to the nearest centre, and its number, for every row."""
    centres, _ = kmeans(rows, k, iter=_K_MEANS_STARTS, rng=np.random.default_rng(rng.getrandbits(64)))
    labels, distances = vq(rows, centres)
    return float((distances**2).sum()), [int(label) for label in labels]
