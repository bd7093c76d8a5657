"""Partitions keep devices together that are near, in like shares of memory."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from hexmesh.planner.algorithms.hexgen2 import replica_bytes
from hexmesh.planner.problem import Problem
from hexmesh.planner.spectral import Graph, graph_of, partition, refine, sides_of_most_cut, team_of_counts
from tests.unit.planner.named_fleets import named_problem

INSIDE, SITE, WAN = 100.0, 1.0, 0.01


def _graph(n_hosts: int, size: int, n_sites: int) -> Graph:
    """Hosts of like devices, one after the other at the sites in turn."""
    hosts = np.arange(n_hosts)
    same_site = (hosts[:, None] % n_sites) == (hosts[None, :] % n_sites)
    bandwidth = np.where(same_site, SITE, WAN)
    np.fill_diagonal(bandwidth, INSIDE)
    return Graph(np.full(n_hosts, size), np.full(n_hosts, 1.0), bandwidth)


def test_a_group_for_every_host_is_every_host() -> None:
    teams = partition(_graph(6, 4, 2), 6, 4.0)
    assert sorted(teams) == [((host, 4),) for host in range(6)]


def test_two_groups_are_the_two_sites() -> None:
    teams = partition(_graph(6, 4, 2), 2, 4.0)
    assert sorted(teams) == [((0, 4), (2, 4), (4, 4)), ((1, 4), (3, 4), (5, 4))]


def test_a_host_is_shared_where_there_are_more_groups_than_hosts() -> None:
    teams = partition(_graph(2, 8, 1), 4, 4.0)
    assert sorted(teams) == [((0, 4),), ((0, 4),), ((1, 4),), ((1, 4),)]


@pytest.mark.parametrize("fleet", ["hexgen2-1", "hexgen-58", "helix-24", "mixed-64"])
def test_no_device_is_lost_and_memory_is_shared_out(fleet: str) -> None:
    problem = named_problem(fleet)
    graph = graph_of(problem)
    for n_groups in (2, 3, 5):
        teams = partition(graph, n_groups, replica_bytes(problem))
        counts = sum(_counts(problem, team) for team in teams)
        assert (counts == graph.counts).all()
        held = [float(_counts(problem, team) @ graph.memory) for team in teams]
        assert len(teams) == n_groups
        assert max(held) < 2.5 * min(held)


def _counts(problem: Problem, team: tuple[tuple[int, int], ...]) -> np.ndarray:
    counts = np.zeros(len(problem.pools), dtype=np.int64)
    for pool, n in team:
        counts[pool] = n
    return counts


def _inside(graph: Graph, groups: np.ndarray) -> float:
    """Bandwidth between devices of one group, over all pairs."""
    pairs = np.einsum("gp,pq,gq->", groups, graph.bandwidth, groups)
    return float(pairs - groups.sum(axis=0) @ np.diag(graph.bandwidth)) / 2


def test_swaps_bring_bandwidth_inside_and_no_group_out_of_memory() -> None:
    rng = random.Random(3)
    for _ in range(30):
        graph = _graph(4, 4, 2)
        memory = np.array([rng.choice([1.0, 2.0, 3.0]) for _ in range(4)])
        graph = Graph(graph.counts, memory, graph.bandwidth)
        devices = [pool for pool in range(4) for _ in range(4)]
        rng.shuffle(devices)
        groups = np.array([np.bincount(devices[at : at + 4], minlength=4) for at in range(0, 16, 4)])
        least = 5.0
        refined = refine(graph, groups, least)
        assert (refined.sum(axis=0) == graph.counts).all()
        assert _inside(graph, refined) >= _inside(graph, groups)
        for before, after in zip(groups @ memory, refined @ memory, strict=True):
            assert after >= min(before, least)


def test_no_swap_is_left_that_gains() -> None:
    rng = random.Random(4)
    for _ in range(10):
        graph = _graph(4, 3, 2)
        devices = [pool for pool in range(4) for _ in range(3)]
        rng.shuffle(devices)
        groups = np.array([np.bincount(devices[at : at + 4], minlength=4) for at in range(0, 12, 4)])
        refined = refine(graph, groups, 0.0)
        for (g, a), (h, b) in product(zip(*np.nonzero(refined), strict=True), repeat=2):
            swapped = refined.copy()
            swapped[[g, h], [a, b]] -= 1
            swapped[[g, h], [b, a]] += 1
            assert g == h or _inside(graph, swapped) <= _inside(graph, refined) + 1e-9


def test_swaps_find_the_hosts_again() -> None:
    graph = _graph(2, 4, 1)
    mixed_up = np.array([[3, 1], [1, 3]])
    assert refine(graph, mixed_up, 0.0).tolist() == [[4, 0], [0, 4]]


def test_the_second_partition_cuts_the_fast_links() -> None:
    """Two pairs of groups, fast in each pair: one of each pair prefills."""
    bandwidth = np.full((4, 4), 1.0)
    for a, b in ((0, 2), (1, 3)):
        bandwidth[a, b] = bandwidth[b, a] = 50.0
    graph = Graph(np.ones(4, dtype=np.int64), np.ones(4), bandwidth)
    sides = sides_of_most_cut(graph, [team_of_counts(row) for row in np.eye(4, dtype=np.int64)])
    assert sides[0] != sides[2]
    assert sides[1] != sides[3]
