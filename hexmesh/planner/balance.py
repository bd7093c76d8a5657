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

Borders that do not bind are left out: first all, then those that the solution crosses are put in. Without any the
optimum has a closed form.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hexmesh.cluster import Cluster
from hexmesh.planner.layouts import Layout
from hexmesh.planner.simplex import maximise

Corner = tuple[float, float]
"""Prompts and outputs per second."""
Share = tuple[int, float]
"""Of a replica's layers at a border, by its number."""
_TOLERANCE = 1e-9
"""Of what is served: by so much a border may be crossed."""


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

    def price_at(self, host: int, site: int) -> float:
        """Of a prompt's KV on that host of that site."""
        return self.price + self.extra.get(host, 0.0) + self.extra.get(site, 0.0)

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
    corners: Sequence[Sequence[Corner]],
    shares: Sequence[Sequence[Share]],
    borders: Sequence[Border],
    likely: Iterable[int] = (),
) -> Balanced:
    """The most that the replicas serve together, given by their corners and shares; `likely` borders may bind."""
    found = _without_borders(corners)
    binding = set[int]()
    while exceeded := _exceeded(found.rates, shares, borders) - binding:
        binding |= exceeded if binding else exceeded.union(likely)
        found = _program(corners, shares, borders, sorted(binding))
    return found


def _without_borders(corners: Sequence[Sequence[Corner]]) -> Balanced:
    """All replicas decode as much as they can; then those turn to prompts that lose least by it, until both match."""
    at = [max(own, key=lambda corner: corner[1]) for own in corners]
    prompts, outputs = sum(x for x, _ in at), sum(y for _, y in at)
    price = 0.0 if prompts < outputs else 1.0
    turns = sorted(
        ((a[1] - b[1]) / (b[0] - a[0]), replica, a, b)
        for replica, own in enumerate(corners)
        if len(own) > 1
        for a, b in pairwise(own)
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


def _exceeded(
    rates: Sequence[Corner], shares: Sequence[Sequence[Share]], borders: Sequence[Border]
) -> set[int]:
    net = defaultdict[int, float](float)
    for (x, y), own in zip(rates, shares, strict=True):
        if x != y:
            for border, share in own:
                net[border] += share * (x - y)
    tolerance = _TOLERANCE * sum(x for x, _ in rates)
    return {
        at for at, n in net.items() if n > borders[at].out + tolerance or n < -borders[at].into - tolerance
    }


def _program(
    corners: Sequence[Sequence[Corner]],
    shares: Sequence[Sequence[Share]],
    borders: Sequence[Border],
    binding: Sequence[int],
) -> Balanced:
    """The same by linear programming over weights of corners, with rows for some borders."""
    n_replicas, n_rows = len(corners), len(corners) + 2 + 2 * len(binding)
    replica_of = np.array([at for at, own in enumerate(corners) for _ in own])
    x, y = np.array([corner for own in corners for corner in own]).T
    unit = max(x.max(), y.max())
    x, y = x / unit, y / unit
    rows, room = np.zeros((n_rows, len(x))), np.zeros(n_rows)
    rows[replica_of, np.arange(len(x))], room[:n_replicas] = 1.0, 1.0
    rows[n_replicas], rows[n_replicas + 1] = x - y, y - x
    row_of = {border: n_replicas + 2 + 2 * at for at, border in enumerate(binding)}
    held = np.zeros((len(binding), n_replicas))
    for replica, own in enumerate(shares):
        for border, share in own:
            if border in row_of:
                held[(row_of[border] - n_replicas) // 2 - 1, replica] = share
    net = held[:, replica_of] * (x - y)
    rows[n_replicas + 2 :: 2], rows[n_replicas + 3 :: 2] = net, -net
    for border, row in row_of.items():
        room[row], room[row + 1] = borders[border].out / unit, borders[border].into / unit
    found = maximise(x, rows, room)
    paid = found.prices
    extra = {border: float(paid[row] - paid[row + 1]) for border, row in row_of.items()}
    prompts = unit * np.bincount(replica_of, found.values * x, n_replicas)
    outputs = unit * np.bincount(replica_of, found.values * y, n_replicas)
    return Balanced(
        requests_per_s=found.worth * unit,
        rates=tuple(zip(prompts.tolist(), outputs.tolist(), strict=True)),
        price=float(paid[n_replicas] - paid[n_replicas + 1]),
        extra={border: price for border, price in extra.items() if price},
        borders_earn=float(paid[n_replicas + 2 :] @ room[n_replicas + 2 :]) * unit,
    )
