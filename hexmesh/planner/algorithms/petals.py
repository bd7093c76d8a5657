"""Petals' block selection (arXiv 2312.08361; `block_selection.py` of its code): each server lifts the weakest blocks.

From the paper: a joining server announces a span as long as its memory allows, at the place whose blocks, sorted by the
throughput that the swarm has for them, come first: the weakest. Then servers look again in turn, and one moves if that
raises the swarm's throughput, its weakest block's, by more than the balance quality.

What differs: Petals lets any request take any way through the servers. A plan here has disjoint pipelines, so the spans
are joined to chains, each server in one: next comes the span that begins last, and so overlaps least, and of those the
one that reaches furthest, cut where it overlaps. What is left over serves nothing. Petals does not disaggregate:
replicas are mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from hexmesh.planner.servers import Server, servers_of

BALANCE_QUALITY = 0.75
MAX_ROUNDS = 10
"""In which every server looks again."""

Throughputs = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Span:
    """What a server announces: layers [start, stop)."""

    server: Server
    start: int
    stop: int

    @property
    def rate(self) -> float:
        return self.server.rates[self.stop - self.start - 1]


def search(run: Run) -> None:
    """Offers the chains of one swarm."""
    problem = run.problem
    if "mixed" not in problem.roles:
        run.notes.append("petals has mixed replicas alone, which were not asked for")
        return
    spans = swarm(servers_of(problem), problem.spec.n_layers)
    layouts = (problem.layouts.rated(parts, "mixed") for parts in chains(problem, spans))
    draft = tuple(layout for layout in layouts if layout is not None)
    if draft:
        run.offer(draft, "petals")


def swarm(servers: Sequence[Server], n_layers: int) -> list[Span]:
    """Where the servers end up that join one after the other."""
    spans = list[Span]()
    for server in servers:
        spans.append(_weakest(server, throughputs(spans, n_layers)))
    for _ in range(MAX_ROUNDS):
        if not any([_moved(spans, at, n_layers) for at in range(len(spans))]):
            break
    return spans


def throughputs(spans: Sequence[Span], n_layers: int) -> Throughputs:
    """(n_layers,) requests per second that the swarm has for each block."""
    found = np.zeros(n_layers)
    for span in spans:
        found[span.start : span.stop] += span.rate
    return found


def _weakest(server: Server, blocks: Throughputs) -> Span:
    """The span whose sorted throughputs are the least, the first of equals."""
    length = min(server.max_layers, len(blocks))
    start = min(
        range(len(blocks) - length + 1), key=lambda at: (sorted(blocks[at : at + length].tolist()), at)
    )
    return Span(server, start, start + length)


def _moved(spans: list[Span], at: int, n_layers: int) -> bool:
    """Whether the server goes elsewhere, which changes `spans`."""
    others = throughputs([*spans[:at], *spans[at + 1 :]], n_layers)
    new = _weakest(spans[at].server, others)
    before = throughputs(spans, n_layers).min()
    others[new.start : new.stop] += new.rate
    if before >= BALANCE_QUALITY * others.min():
        return False
    spans[at] = new
    return True


def chains(problem: Problem, spans: Sequence[Span]) -> Iterator[tuple[Part, ...]]:
    """Disjoint pipelines of the spans, as long as whole ones can be made."""
    left = list(spans)
    while True:
        chain, at = list[Part](), 0
        while at < problem.spec.n_layers:
            reaching = [span for span in left if span.start <= at < span.stop]
            if not reaching:
                return
            span = max(reaching, key=lambda span: (span.start, span.stop, span.rate))
            left.remove(span)
            chain.append(Part(pool=span.server.pool, tp=span.server.tp, start=at, stop=span.stop))
            at = span.stop
        yield tuple(chain)
