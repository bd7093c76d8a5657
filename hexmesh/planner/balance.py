"""What replicas serve together when handoffs need only balance: an upper bound that is quick enough for local search.

A replica's rates (x prompts, y outputs a second) lie in the hull of its corners. All together

    maximise the sum of x    subject to    sum of x = sum of y,    for every host and site h:
    -in_h <= sum over replicas of (share of its layers on h) (x - y) KV bytes <= out_h

so KV that leaves h must be made there and not used up there, whoever the partners are: 1 + 2 H rows instead of R^2
pairs. Exact for replicas of one host each, a relaxation for those that span hosts (`Problem.judge` knows the pairs).

Prices: at the optimum a prompt's KV has a price p_h at each h, and a replica that sees price p (the sum of p_h by its
shares) earns max over corners of x (1 - p) + y p. By weak duality the earnings of *any* other replicas, plus what the
borders earn, bound what those serve. So a changed state is priced by its changed replicas alone, and the program is
solved only for states whose price passes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from hexmesh.cluster import Cluster
from hexmesh.planner.layouts import Layout

Corner = tuple[float, float]
"""Prompts and outputs per second."""
Share = tuple[int, float]
"""Of a replica's layers at a border, by its number."""


@dataclass(frozen=True, slots=True)
class Border:
    """Of a host or a site: requests per second whose KV may leave it, and may enter it."""

    out: float
    into: float


@dataclass(frozen=True, slots=True)
class Balanced:
    """The optimum, and its prices."""

    requests_per_s: float
    rates: tuple[Corner, ...]
    """By replica."""
    price: float
    """Of a prompt's KV that lies nowhere in particular."""
    extra: Mapping[int, float]
    """What is added to it at a border; zeros left out."""
    borders_earn: float

    def earns(self, corners: Sequence[Corner], shares: Sequence[Share]) -> float:
        """What such a replica would add at most, at these prices."""
        price = self.price
        if self.extra:
            price += sum(share * self.extra.get(border, 0.0) for border, share in shares)
        return max(0.0, max(x * (1 - price) + y * price for x, y in corners))


def corners_of(layout: Layout) -> tuple[Corner, ...]:
    """The rates that a replica may have lie below these, from most outputs to most prompts."""
    if layout.role == "decode":
        return ((0.0, layout.decode),)
    if layout.role == "prefill" or not layout.uses:
        return ((layout.prefill, 0.0),)
    return tuple(_outline([*layout.uses, (1 / layout.prefill, 0.0), (0.0, 1 / layout.decode)]))


def _outline(limits: Sequence[tuple[float, float]]) -> Iterator[Corner]:
    """Corners of a x + b y <= 1 in the positive quadrant, walking along the limit that binds."""
    x, (a, b) = 0.0, max(limits, key=lambda limit: (limit[1], limit[0]))
    while True:
        yield x, (1 - a * x) / b
        crossings = [((b - d) / (c * b - a * d), c, d) for c, d in limits if c * b > a * d * (1 + 1e-12)]
        following, c, d = min(crossings)
        if a * following >= 1:
            yield 1 / a, 0.0
            return
        x = max(x, following)
        if d == 0:
            yield x, (1 - a * x) / b
            yield x, 0.0
            return
        a, b = c, d


def borders_of(cluster: Cluster, kv_bytes: float) -> tuple[Border, ...]:
    """Of the hosts in order, then of the sites in order of appearance; `kv_bytes` is a prompt's KV."""
    out, into = defaultdict[str, float](float), defaultdict[str, float](float)
    for link in cluster.links:
        out[link.src] += link.bytes_per_s
        into[link.dst] += link.bytes_per_s
    hosts = [
        (
            out[node.id] if node.nic is None else min(out[node.id], node.nic.out_bytes_per_s),
            into[node.id] if node.nic is None else min(into[node.id], node.nic.in_bytes_per_s),
        )
        for node in cluster.nodes
    ]
    lines = [
        (
            sum(line.bytes_per_s for line in cluster.site_links if line.src == site),
            sum(line.bytes_per_s for line in cluster.site_links if line.dst == site),
        )
        if cluster.site_links
        else (math.inf, math.inf)
        for site in sites_of(cluster)
    ]
    return tuple(Border(most / kv_bytes, least / kv_bytes) for most, least in hosts + lines)


def sites_of(cluster: Cluster) -> list[str]:
    """In the order in which nodes name them."""
    return list(dict.fromkeys(node.site for node in cluster.nodes))


def balance(
    corners: Sequence[Sequence[Corner]], shares: Sequence[Sequence[Share]], borders: Sequence[Border]
) -> Balanced:
    """The most that the replicas serve together, given by their corners and shares."""
    free = _without_borders(corners)
    if _crosses_too_much(free.rates, shares, borders):
        return _program(corners, shares, borders)
    return free


def _without_borders(corners: Sequence[Sequence[Corner]]) -> Balanced:
    """All replicas decode as much as they can; then those turn to prompts that lose least by it, until both match."""
    at = [max(own, key=lambda corner: corner[1]) for own in corners]
    prompts, outputs = sum(x for x, _ in at), sum(y for _, y in at)
    price = 0.0 if prompts < outputs else 1.0
    turns = sorted(
        ((a[1] - b[1]) / (b[0] - a[0]), replica, a, b)
        for replica, own in enumerate(corners)
        if len(own) > 1
        for a, b in zip(own, own[1:], strict=False)
        if b[0] > a[0]
    )
    for loss, replica, a, b in turns:
        if prompts >= outputs:
            break
        gained, lost = b[0] - a[0], a[1] - b[1]
        part = min(1.0, (outputs - prompts) / (gained + lost))
        at[replica] = (a[0] + part * gained, a[1] - part * lost)
        prompts, outputs = prompts + part * gained, outputs - part * lost
        # The last turn sets the price: both its ends earn the same.
        price = 1 / (1 + loss) if prompts >= outputs else 0.0
    return Balanced(min(prompts, outputs), _matched(at, prompts, outputs), price, {}, 0.0)


def _matched(at: Sequence[Corner], prompts: float, outputs: float) -> tuple[Corner, ...]:
    """The larger side slowed down evenly."""
    less_x = min(1.0, outputs / prompts) if prompts > 0 else 0.0
    less_y = min(1.0, prompts / outputs) if outputs > 0 else 0.0
    return tuple((x * less_x, y * less_y) for x, y in at)


def _crosses_too_much(
    rates: Sequence[Corner], shares: Sequence[Sequence[Share]], borders: Sequence[Border]
) -> bool:
    net = defaultdict[int, float](float)
    for (x, y), own in zip(rates, shares, strict=True):
        if x != y:
            for border, share in own:
                net[border] += share * (x - y)
    return any(not -borders[at].into <= n <= borders[at].out for at, n in net.items())


def _program(
    corners: Sequence[Sequence[Corner]], shares: Sequence[Sequence[Share]], borders: Sequence[Border]
) -> Balanced:
    """The same by linear programming, over weights of corners."""
    columns = [(replica, x, y) for replica, own in enumerate(corners) for x, y in own]
    used = sorted({border for own in shares for border, _ in own})
    row_of = {border: len(corners) + 2 * at for at, border in enumerate(used)}
    cells = list[tuple[int, int, float]]()
    for at, (replica, x, y) in enumerate(columns):
        cells.append((replica, at, 1.0))
        for border, share in shares[replica]:
            cells.append((row_of[border], at, share * (x - y)))
            cells.append((row_of[border] + 1, at, share * (y - x)))
    limits = [1.0] * len(corners)
    for border in used:
        limits += [borders[border].out, borders[border].into]
    most = np.minimum(np.array(limits), 1e12)
    rows, ats, values = zip(*cells, strict=True)
    found = linprog(
        [-x for _, x, _ in columns],
        A_ub=csr_matrix((values, (rows, ats)), shape=(len(most), len(columns))),
        b_ub=most,
        A_eq=[[x - y for _, x, y in columns]],
        b_eq=[0.0],
        method="highs",
    )
    assert found.success, found.message
    paid = -found.ineqlin.marginals
    rates = [[0.0, 0.0] for _ in corners]
    for (replica, x, y), weight in zip(columns, found.x, strict=True):
        rates[replica][0] += x * weight
        rates[replica][1] += y * weight
    extra = {border: float(paid[row] - paid[row + 1]) for border, row in row_of.items()}
    return Balanced(
        requests_per_s=float(-found.fun),
        rates=tuple((x, y) for x, y in rates),
        price=float(-found.eqlin.marginals[0]),
        extra={border: price for border, price in extra.items() if abs(price) > 1e-12},
        borders_earn=float(paid[len(corners) :] @ most[len(corners) :]),
    )
