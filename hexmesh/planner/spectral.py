"""Spectral partition of a fleet into groups of like memory, refined after Kernighan and Lin, on counts of devices.

Vertices are devices, weighed by memory; edges are weighed by bandwidth. Devices of one pool cannot be told apart, so
an eigenvector of the Laplacian may be taken constant on pools: the Laplacian of n devices shrinks to one of pools,

    L[p, q] = -sqrt(n_p n_q) W[p, q]        L[p, p] = sum over q != p of n_q W[p, q]

whose second eigenvector orders the pools (Fiedler). The order is cut where the memory's share is about right and the
links cut are slowest on average, and each side again, until there are as many groups as asked for. Then devices of two
groups change places while that brings more bandwidth inside groups: of Kernighan and Lin's passes, the swaps that gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexmesh.cost import LOCAL_BYTES_PER_S
from hexmesh.planner.pools import Team
from hexmesh.planner.problem import Problem

Matrix = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CUT_SLACK = 0.3
"""How far a cut may be from the right share, in the memory of one group."""
MAX_SWAPS_PER_GROUP = 8


@dataclass(frozen=True, slots=True)
class Graph:
    """A fleet's devices by pools."""

    counts: Counts
    """(n_pools,) devices."""
    memory: Matrix
    """(n_pools,) bytes of one device."""
    bandwidth: Matrix
    """(n_pools, n_pools) bytes/s between two devices, one of each pool; on the diagonal, inside the pool."""


def graph_of(problem: Problem) -> Graph:
    """All devices that may be planned with."""
    pools = problem.pools
    return Graph(
        np.array([pool.size for pool in pools], dtype=np.int64),
        np.array([pool.device.budget_bytes for pool in pools], dtype=np.float64),
        np.array([[_bandwidth(problem, p, q) for q in range(len(pools))] for p in range(len(pools))]),
    )


def _bandwidth(problem: Problem, p: int, q: int) -> float:
    """The slower way of the two; none where there is no link."""
    a, b = problem.pools[p].node, problem.pools[q].node
    if a.id == b.id:
        return LOCAL_BYTES_PER_S if a.fabric is None or p != q else a.fabric.bytes_per_s
    there, back = problem.links.get((a.id, b.id)), problem.links.get((b.id, a.id))
    return 0.0 if there is None or back is None else min(there.bytes_per_s, back.bytes_per_s)


def partition(graph: Graph, n_groups: int, least_bytes: float) -> list[Team]:
    """The devices in `n_groups` groups; no swap leaves a group with less memory than `least_bytes`."""
    groups = np.array(list(_halves(graph, graph.counts, n_groups)))
    return [team_of_counts(counts) for counts in refine(graph, groups, least_bytes) if counts.any()]


def team_of_counts(counts: Sequence[int] | Counts) -> Team:
    """A row of counts by pool as a team."""
    return tuple((pool, int(n)) for pool, n in enumerate(counts) if n > 0)


def _halves(graph: Graph, counts: Counts, n_groups: int) -> Iterator[Counts]:
    """Recursive bisection: rows of counts."""
    if n_groups == 1 or counts.sum() <= 1:
        yield counts
        return
    first = _first_side(graph, counts, n_groups // 2, n_groups)
    yield from _halves(graph, first, n_groups // 2)
    yield from _halves(graph, counts - first, n_groups - n_groups // 2)


def _first_side(graph: Graph, counts: Counts, n_first: int, n_groups: int) -> Counts:
    """The devices of the first `n_first` of `n_groups` groups, by a cut near their share of memory."""
    order = [pool for pool in fiedler_order(graph, counts) for _ in range(counts[pool])]
    group_bytes = float(counts @ graph.memory) / n_groups
    side, held, best = np.zeros_like(counts), 0.0, (np.inf, np.inf, np.inf)
    grain = max(graph.bandwidth.max() * 1e-9, 1e-30)
    found = side
    for pool in order[:-1]:
        side[pool] += 1
        held += graph.memory[pool]
        off = abs(held - n_first * group_bytes) / group_bytes
        rest = counts - side
        ratio = float(side @ graph.bandwidth @ rest) / float(side.sum() * rest.sum())
        rank = (max(0.0, off - CUT_SLACK), round(ratio / grain), off)
        if rank < best:
            best, found = rank, side.copy()
    return found


def fiedler_order(graph: Graph, counts: Counts) -> list[int]:
    """Pools that have devices left, by their place on the second eigenvector; equal ones in their own order."""
    pools = np.flatnonzero(counts)
    if len(pools) < 3:
        return [int(pool) for pool in pools]
    weights = graph.bandwidth[np.ix_(pools, pools)] * ~np.eye(len(pools), dtype=bool)
    n = counts[pools].astype(float)
    laplacian = np.diag(weights @ n) - weights * np.sqrt(np.outer(n, n))
    _, vectors = np.linalg.eigh(laplacian / max(weights.max() * n.max(), 1e-30))
    places = np.round(vectors[:, 1] / np.sqrt(n), 6)
    places *= np.sign(places[np.argmax(np.abs(places))]) or 1.0
    return [int(pool) for pool in pools[np.lexsort((pools, places))]]


def refine(graph: Graph, groups: Counts, least_bytes: float) -> Counts:
    """Kernighan and Lin: swap devices of two groups, the most gainful first, while bandwidth inside groups grows.

    No group that has `least_bytes` falls below it.
    """
    groups = groups.copy()
    for _ in range(MAX_SWAPS_PER_GROUP * len(groups)):
        swap = _best_swap(graph, groups, least_bytes)
        if swap is None:
            break
        (g, a), (h, b) = swap
        groups[g, a] -= 1
        groups[g, b] += 1
        groups[h, b] -= 1
        groups[h, a] += 1
    return groups


def _best_swap(
    graph: Graph, groups: Counts, least_bytes: float
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """((group, pool), (group, pool)) of the two devices that gain most; None if nothing gains."""
    at_group, at_pool = np.nonzero(groups)
    inside = np.diag(graph.bandwidth)
    # What each device of a (group, pool) is bound to every group with, itself left out.
    bound = (groups @ graph.bandwidth)[:, at_pool].T.copy()  # (n_entries, n_groups)
    own = bound[np.arange(len(at_group)), at_group] - inside[at_pool]
    there = bound[:, at_group]  # (n_entries, n_entries): first's pool to second's group
    gains = there + there.T - own[:, None] - own[None, :]
    gains -= 2 * graph.bandwidth[np.ix_(at_pool, at_pool)]
    change = graph.memory[at_pool][None, :] - graph.memory[at_pool][:, None]  # of the first's group
    held = (groups @ graph.memory)[at_group]
    too_little = (change < 0) & (held[:, None] + change < least_bytes)
    gains[too_little | too_little.T | (at_group[:, None] == at_group[None, :])] = -np.inf
    first, second = np.unravel_index(int(np.argmax(gains)), gains.shape)
    if gains[first, second] <= 1e-9 * graph.bandwidth.max():
        return None
    return (int(at_group[first]), int(at_pool[first])), (int(at_group[second]), int(at_pool[second]))


def sides_of_most_cut(graph: Graph, teams: Sequence[Team]) -> list[bool]:
    """The secondary partition: which side every group is on so that most bandwidth runs between the sides.

    Groups are dealt out one by one to where they cut more, then change sides while that cuts more.
    """
    groups = np.zeros((len(teams), len(graph.counts)))
    for at, team in enumerate(teams):
        for pool, n in team:
            groups[at, pool] = n
    between = groups @ graph.bandwidth @ groups.T
    np.fill_diagonal(between, 0.0)
    signs = np.zeros(len(teams))
    for at in np.argsort(-between.sum(axis=1), kind="stable"):
        signs[at] = 1.0 if between[at] @ signs <= 0 else -1.0
    for _ in range(len(teams) ** 2):
        pulls = signs * (between @ signs)  # positive: more of its bandwidth stays on its side
        worst = int(np.argmax(pulls))
        if pulls[worst] <= 1e-9 * between.max(initial=0.0):
            break
        signs[worst] = -signs[worst]
    return [bool(sign > 0) for sign in signs]
