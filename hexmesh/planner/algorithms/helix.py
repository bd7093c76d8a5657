"""Helix's model placement (ASPLOS 2025, arXiv 2406.01566): contiguous layer ranges that let most requests flow through.

From the paper: a server holds a number of layers that fit it, and lets through what it manages with so many; a link
carries what its bytes/s allow; an integer program places the layers so that the flow from source to sink is largest.

What differs: Helix lets every request take its own way, so that its program has a start for every server and a switch
for every pair: 552 for 24 servers, on which HiGHS finds nothing in a minute (the paper lets a commercial solver run
for hours, from a start). A plan here has disjoint pipelines, and what flows through one is what its slowest server
lets through, whatever their order. So the program is, over pipelines k, kinds of server c and numbers of layers j,

    maximise the sum of f_k
    sum over c, j of j n_kcj >= L y_k       sum over k, j of n_kcj <= servers of c
    f_k <= rate_c(j) where n_kcj > 0        f_k <= the link's rate where kinds of both its ends are in k

with n servers, y 0 or 1: the best placement that disjoint pipelines allow under the paper's model of a server. Large
servers' numbers of layers are tried in steps. Rates are closed forms at the batch that a server's own memory allows,
not profiled. HiGHS stops at a number of nodes or at the time that is left, and what it has then counts; fleets with
too large a program are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from hexmesh.planner.servers import Server, servers_of
from hexmesh.score.program import Program

MAX_CHOICES = 1_500
"""Of (pipeline, kind, layers)."""
MAX_PIPELINES = 12
MAX_NUMBERS = 20
"""Of layers, that are tried for a kind."""
MAX_NODES = 1_000
MIP_GAP = 0.01

Chain = tuple[Part, ...]


def search(run: Run) -> None:
    """Offers the placement that the program ends with."""
    problem = run.problem
    if "mixed" not in problem.roles:
        run.notes.append("helix has mixed replicas alone, which were not asked for")
        return
    placement = Placement.of(problem)
    if len(placement.choices) > MAX_CHOICES:
        run.notes.append(f"helix is not tried: its program has {len(placement.choices)} choices")
        return
    chains = placement.solve(max(1.0, run.left_s)) if placement.choices else []
    layouts = (problem.layouts.rated(chain, "mixed") for chain in chains)
    draft = tuple(layout for layout in layouts if layout is not None)
    if draft:
        run.offer(draft, "helix")
    else:
        run.notes.append(f"helix found no placement within {MAX_NODES} nodes of its program")


@dataclass(frozen=True)
class Placement:
    """What the integer program is over."""

    problem: Problem
    kinds: tuple[tuple[Server, ...], ...]
    n_pipelines: int
    choices: tuple[tuple[int, int, int], ...]
    """(pipeline, kind, layers)."""

    @staticmethod
    def of(problem: Problem) -> Placement:
        """As many pipelines as memory has room for."""
        kinds = tuple(_kinds(problem, servers_of(problem)))
        room = sum(len(kind) * kind[0].max_layers for kind in kinds)
        n_pipelines = min(MAX_PIPELINES, room // problem.spec.n_layers)
        choices = (
            (k, c, j)
            for k in range(n_pipelines)
            for c, kind in enumerate(kinds)
            for j in _numbers(kind[0].max_layers)
        )
        return Placement(problem, kinds, n_pipelines, tuple(choices))

    @property
    def most(self) -> float:
        """No pipeline is faster."""
        return max(max(kind[0].rates) for kind in self.kinds)

    def solve(self, limit_s: float) -> list[Chain]:
        """The pipelines of the best placement; none if none was found in time."""
        program, most, n_layers = Program(), self.most, self.problem.spec.n_layers
        flows = [program.variable(1.0, most) for _ in range(self.n_pipelines)]
        exist = [program.variable(0.0, 1.0, is_integer=True) for _ in flows]
        for k, (flow, exists) in enumerate(zip(flows, exist, strict=True)):
            program.use(("exists", k), flow, 1.0, most, gate=exists)
            program.balance(("layers", k), exists, float(n_layers))
            program.balance(("layers", k), program.variable(), 1.0)  # layers too many
            if k > 0:
                program.use(("order", k), flow, 1.0, 1.0, gate=flows[k - 1])
        takes = {
            (k, c): program.variable(0.0, 1.0, is_integer=True)
            for k in range(self.n_pipelines)
            for c in range(len(self.kinds))
        }
        numbers = []
        for at, (k, c, j) in enumerate(self.choices):
            n_alike = float(len(self.kinds[c]))
            number = program.variable(0.0, n_alike, is_integer=True)
            is_made = program.variable(0.0, 1.0, is_integer=True)
            numbers.append(number)
            program.use(("made", at), number, 1.0, n_alike, gate=is_made)
            program.use(("taken", at), is_made, 1.0, 1.0, gate=takes[k, c])
            program.use(("servers", c), number, 1.0, n_alike)
            program.balance(("layers", k), number, -float(j))
            program.use(("rate", at), flows[k], 1.0, most)
            program.use(("rate", at), is_made, most - self.kinds[c][0].rates[j - 1], most)
        for k, flow in enumerate(flows):
            for a, b in combinations(range(len(self.kinds)), 2):
                slower = most - min(most, self.link_rate(a, b), self.link_rate(b, a))
                program.use(("link", k, a, b), flow, 1.0, most + slower)
                for kind in (a, b):
                    program.use(("link", k, a, b), takes[k, kind], slower, most + slower)
        values = program.solve_integers(gap=MIP_GAP, max_nodes=MAX_NODES, limit_s=limit_s)
        return [] if values is None else self._chains([round(values[number]) for number in numbers])

    def link_rate(self, a: int, b: int) -> float:
        """Requests per second, prompts and outputs, between servers of two kinds; 0 if there is no link."""
        problem = self.problem
        src, dst = (problem.pools[self.kinds[kind][0].pool].node.id for kind in (a, b))
        if src == dst:
            return self.most
        link = problem.links.get((src, dst))
        n_tokens = problem.workload.prompt_tokens + problem.workload.output_tokens
        return 0.0 if link is None else link.bytes_per_s / (n_tokens * problem.capacities.model.hidden_bytes)

    def _chains(self, numbers: Sequence[int]) -> list[Chain]:
        free = [list(kind) for kind in self.kinds]
        placed = defaultdict[int, list[tuple[Server, int]]](list)
        for (k, c, j), n_servers in zip(self.choices, numbers, strict=True):
            for _ in range(n_servers):
                placed[k].append((free[c].pop(0), j))
        chains = (_chain(servers, self.problem.spec.n_layers) for servers in placed.values())
        return [chain for chain in chains if chain is not None]


def _kinds(problem: Problem, servers: Sequence[Server]) -> list[tuple[Server, ...]]:
    """Servers that are alike and in one site."""
    found = defaultdict[object, list[Server]](list)
    for server in servers:
        found[problem.pools[server.pool].node.site, server.rates].append(server)
    return [tuple(kind) for kind in found.values()]


def _numbers(most: int) -> list[int]:
    step = -(-most // MAX_NUMBERS)
    return [*range(step, most, step), most]


def _chain(servers: Sequence[tuple[Server, int]], n_layers: int) -> Chain | None:
    """Servers with their numbers of layers, in the order of their pools; those with most give up what is too much."""
    numbers = [n for _, n in servers]
    for _ in range(sum(numbers) - n_layers):
        numbers[numbers.index(max(numbers))] -= 1
    if sum(numbers) < n_layers or min(numbers) == 0:
        return None
    parts, start = list[Part](), 0
    for (server, _), n in sorted(zip(servers, numbers, strict=True), key=lambda one: one[0][0].pool):
        parts.append(Part(pool=server.pool, tp=server.tp, start=start, stop=start + n))
        start += n
    return tuple(parts)
