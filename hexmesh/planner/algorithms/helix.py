"""Helix's model placement (ASPLOS 2025, arXiv 2406.01566): contiguous layer ranges that let most requests flow through.

From the paper: a server holds a number of layers that fit it, and lets through what it manages with so many; a link
carries what its bytes/s allow; an integer program places the layers so that the flow from source to sink is largest.

What differs: Helix lets every request take its own way, so that its program has a start for every server and a switch
for every pair: 552 for 24 servers, on which HiGHS finds nothing in a minute (the paper lets a commercial solver run for
hours, from a start). A plan here has disjoint pipelines, and what flows through one is what its slowest server lets
through, whatever their order. So the program is, over pipelines k, kinds of server c and numbers of layers j,

    maximise the sum of f_k
    sum over c, j of j n_kcj >= L y_k       sum over k, j of n_kcj <= servers of c
    f_k <= rate_c(j) where n_kcj > 0        f_k <= the link's rate where kinds of both its ends are in k

with n servers, y 0 or 1: the best placement that disjoint pipelines allow under the paper's model of a server. Large
servers' numbers of layers are tried in steps. Rates are closed forms at the batch that a server's own memory allows, not
profiled. HiGHS stops at a number of nodes or at the time that is left, and what it has then counts; fleets with too
large a program are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_matrix

from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from hexmesh.planner.servers import Server, servers_of

MAX_CHOICES = 1_500
"""Of (pipeline, kind, layers)."""
MAX_PIPELINES = 12
MAX_NUMBERS = 20
"""Of layers, that are tried for a kind."""
MAX_NODES = 2_000
MIP_GAP = 0.01

Chain = tuple[Part, ...]


def search(run: Run) -> None:
    """Offers the placement that the program ends with."""
    problem = run.problem
    if "mixed" not in problem.roles:
        run.notes.append("helix has mixed replicas alone, which were not asked for")
        return
    program = Program(problem, servers_of(problem))
    if program.n_choices > MAX_CHOICES:
        run.notes.append(f"helix is not tried: its program has {program.n_choices} choices")
        return
    chains = program.solve(max(1.0, run.budget_s - run.elapsed_s)) if program.n_choices else []
    layouts = (problem.layouts.rated(chain, "mixed") for chain in chains)
    draft = tuple(layout for layout in layouts if layout is not None)
    if draft:
        run.offer(draft, "helix")
    else:
        run.notes.append(f"helix found no placement within {MAX_NODES} nodes of its program")


class Program:
    """The integer program of some servers."""

    def __init__(self, problem: Problem, servers: Sequence[Server]) -> None:
        self._problem = problem
        self._kinds = list(_kinds(problem, servers).values())
        room = sum(len(kind) * kind[0].max_layers for kind in self._kinds)
        self._n_pipelines = min(MAX_PIPELINES, room // problem.spec.n_layers)
        self._choices = [
            (k, c, j)
            for k in range(self._n_pipelines)
            for c, kind in enumerate(self._kinds)
            for j in _numbers(kind[0].max_layers)
        ]
        self._most = max((max(kind[0].rates) for kind in self._kinds), default=0.0)
        self._rows = list[tuple[dict[int, float], float, float]]()

    @property
    def n_choices(self) -> int:
        return len(self._choices)

    @property
    def _n_columns(self) -> int:
        """n of every choice, whether it is made, f and y of every pipeline, whether it has servers of every kind."""
        return 2 * self.n_choices + (2 + len(self._kinds)) * self._n_pipelines

    def solve(self, time_limit_s: float) -> list[Chain]:
        """The pipelines of the best placement; none if none was found in time."""
        n, k = self.n_choices, self._n_pipelines
        self._rows = list(self._placing())
        goal = np.zeros(self._n_columns)
        goal[2 * n : 2 * n + k] = -1.0
        sizes = [float(len(self._kinds[c])) for _, c, _ in self._choices]
        found: Any = milp(
            goal,
            constraints=self._constraints(),
            integrality=np.array([1] * 2 * n + [0] * k + [1] * (self._n_columns - 2 * n - k)),
            bounds=(0.0, np.array(sizes + [1.0] * n + [self._most] * k + [1.0] * (self._n_columns - 2 * n - k))),  # type: ignore[arg-type]
            options={"node_limit": MAX_NODES, "mip_rel_gap": MIP_GAP, "time_limit": time_limit_s},
        )
        return [] if found.x is None else self._chains(np.asarray(found.x))

    def _constraints(self) -> LinearConstraint:
        entries = [(at, column, value) for at, (row, _, _) in enumerate(self._rows) for column, value in row.items()]
        at_row, at_column, values = zip(*entries, strict=True)
        shape = (len(self._rows), self._n_columns)
        matrix = csr_matrix((values, (at_row, at_column)), shape=shape)
        return LinearConstraint(
            matrix, np.array([low for _, low, _ in self._rows]), np.array([high for _, _, high in self._rows])
        )

    def _placing(self) -> Iterator[tuple[dict[int, float], float, float]]:
        """Rows."""
        n, n_pipelines = self.n_choices, self._n_pipelines
        layers, taken = defaultdict[int, dict[int, float]](dict), defaultdict[int, dict[int, float]](dict)
        for at, (k, c, j) in enumerate(self._choices):
            layers[k][at] = float(j)
            taken[c][at] = 1.0
            rate, flow = self._kinds[c][0].rates[j - 1], 2 * n + k
            yield {at: 1.0, n + at: -float(len(self._kinds[c]))}, -np.inf, 0.0
            yield {flow: 1.0, n + at: self._most - rate}, -np.inf, self._most
        for k in range(n_pipelines):
            flow, is_used = 2 * n + k, 2 * n + n_pipelines + k
            yield {**layers[k], is_used: -float(self._problem.spec.n_layers)}, 0.0, np.inf
            yield {flow: 1.0, is_used: -self._most}, -np.inf, 0.0
            if k > 0:
                yield {flow: 1.0, flow - 1: -1.0}, -np.inf, 0.0
        for c, row in taken.items():
            yield row, 0.0, float(len(self._kinds[c]))
        yield from self._linking()

    def _linking(self) -> Iterator[tuple[dict[int, float], float, float]]:
        """A pipeline with servers of two kinds is no faster than the link between them."""
        first = 2 * (self.n_choices + self._n_pipelines)
        for at, (k, c, _) in enumerate(self._choices):
            yield {self.n_choices + at: 1.0, first + k * len(self._kinds) + c: -1.0}, -np.inf, 0.0
        for a in range(len(self._kinds)):
            for b in range(a):
                slower = self._most - min(self._link_rate(a, b), self._link_rate(b, a))
                for k in range(self._n_pipelines if slower > 0 else 0):
                    row = {2 * self.n_choices + k: 1.0}
                    row |= {first + k * len(self._kinds) + kind: slower for kind in (a, b)}
                    yield row, -np.inf, self._most + slower

    def _link_rate(self, a: int, b: int) -> float:
        """Requests per second, prompts and outputs, between servers of two kinds; 0 if there is no link."""
        problem = self._problem
        src, dst = (problem.pools[self._kinds[kind][0].pool].node.id for kind in (a, b))
        if src == dst:
            return self._most
        link = problem.links.get((src, dst))
        n_tokens = problem.workload.prompt_tokens + problem.workload.output_tokens
        return 0.0 if link is None else link.bytes_per_s / (n_tokens * problem.capacities.model.hidden_bytes)

    def _chains(self, solution: npt.NDArray[np.float64]) -> list[Chain]:
        free = [list(kind) for kind in self._kinds]
        placed = defaultdict[int, list[tuple[Server, int]]](list)
        for (k, c, j), n_servers in zip(self._choices, solution, strict=False):
            for _ in range(round(n_servers)):
                placed[k].append((free[c].pop(0), j))
        return [chain for servers in placed.values() if (chain := _chain(servers, self._problem.spec.n_layers))]


def _kinds(problem: Problem, servers: Sequence[Server]) -> dict[object, list[Server]]:
    """Servers that are alike and in one site."""
    found = defaultdict[object, list[Server]](list)
    for server in servers:
        found[problem.pools[server.pool].node.site, server.rates].append(server)
    return found


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
