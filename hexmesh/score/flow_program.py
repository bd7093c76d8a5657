"""The linear program behind `best_flow`: its variables, its rows and what they come to, for places instead of pairs.

Variables: x and y of every replica; f of the pairs of places that must be named (`places.pairs_of`); what places in the
hub send into it and take from it, and what passes between their sites. Each limit is one row, scaled to 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from hexmesh.cluster import Role
from hexmesh.score.network import Network, Way
from hexmesh.score.places import Held, Place, pairs_of

LimitKind = Literal["prefill", "decode", "mixed", "nic_out", "nic_in", "line", "link"]

_CROSSING = 1e-6
"""What leaving a host, and a site, takes from a request's worth: of equal flows those that stay near are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRates:
    """What one replica does at most, in requests per second."""

    name: str
    role: Role
    prefill: float
    decode: float
    stages: tuple[Held, ...]
    uses: tuple[tuple[float, float], ...] = ()
    """As in `Mixed`, for "mixed"."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that is used up. A mixed replica's parts are numbered: its stages, its hops, the round trip."""

    kind: LimitKind
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Rates by what they are of."""

    prefill: Mapping[int, float]
    decode: Mapping[int, float]
    """By the replica's number."""
    named: Mapping[tuple[Place, Place], float]
    """Of pairs of places."""
    out: Mapping[Place, float]
    into: Mapping[Place, float]
    """Through the hub."""
    passed: Mapping[tuple[str, str], float]
    """Through the hub, by sites."""
    shares: Mapping[Limit, float]
    """How much of the result each limit decides."""


@dataclass(kw_only=True)
class _Program:
    """Variables and rows under construction."""

    worth: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    caps: dict[int, Limit] = field(default_factory=dict)
    """Limits that are a variable's bound."""
    limits: dict[Limit, int] = field(default_factory=dict)
    """Rows that stay below 1."""
    uses: list[tuple[int, int, float]] = field(default_factory=list)
    """(row, variable, share of the limit)."""
    balances: dict[Hashable, int] = field(default_factory=dict)
    """Rows that come to 0."""
    terms: list[tuple[int, int, float]] = field(default_factory=list)

    def variable(self, worth: float = 0.0, most: float = math.inf) -> int:
        self.worth.append(worth)
        self.most.append(most)
        return len(self.worth) - 1

    def use(self, limit: Limit, at: int, amount: float, available: float) -> None:
        """A variable's unit takes so much of what is available."""
        if available <= 0 < amount:
            self.most[at] = 0.0
        elif math.isfinite(available):
            row = self.limits.setdefault(limit, len(self.limits))
            self.uses.append((row, at, amount / available))

    def balance(self, key: Hashable, at: int, sign: float) -> None:
        self.terms.append((self.balances.setdefault(key, len(self.balances)), at, sign))

    def solve(self) -> tuple[NDArray[np.float64], Mapping[Limit, float]]:
        """The variables' values, and each limit's share of the result."""
        n = len(self.worth)
        most = np.array(self.most)
        found = linprog(
            -np.array(self.worth),
            A_ub=_matrix(self.uses, len(self.limits), n),
            b_ub=np.ones(len(self.limits)),
            A_eq=_matrix(self.terms, len(self.balances), n),
            b_eq=np.zeros(len(self.balances)),
            bounds=np.column_stack([np.zeros(n), most]),
            method="highs",
        )
        assert found.success, found.message
        shares = dict(zip(self.limits, -found.ineqlin.marginals, strict=True))
        shares |= {limit: -found.upper.marginals[at] * most[at] for at, limit in self.caps.items()}
        total = sum(shares.values())
        kept = {limit: float(share / total) for limit, share in shares.items() if share > 1e-9 * total}
        return np.maximum(found.x, 0.0), kept


def _matrix(entries: Sequence[tuple[int, int, float]], n_rows: int, n: int) -> csr_matrix:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((values, (rows, columns)), shape=(n_rows, n))


def solve(
    replicas: Sequence[ReplicaRates], places: Sequence[Place], network: Network, layer_bytes: float
) -> Solved:
    """The most requests; `places` are the replicas', `layer_bytes` is the KV of one prompt in one layer."""
    program = _Program()
    prefill, decode = _replicas(program, replicas, places)
    sources = list(dict.fromkeys(places[at] for at in prefill))
    targets = list(dict.fromkeys(places[at] for at in decode))
    named = _pairs(program, sources, targets, network, layer_bytes)
    out = _ends(program, sources, network, layer_bytes, leaves=True)
    into = _ends(program, targets, network, layer_bytes, leaves=False)
    passed = _passes(program, sources, targets, network, layer_bytes)
    values, shares = program.solve()
    return Solved(
        prefill={at: values[x] for at, x in prefill.items()},
        decode={at: values[y] for at, y in decode.items()},
        named={pair: values[f] for pair, f in named.items()},
        out={place: values[v] for place, v in out.items()},
        into={place: values[v] for place, v in into.items()},
        passed={sites: values[v] for sites, v in passed.items()},
        shares=shares,
    )


def _replicas(
    program: _Program, replicas: Sequence[ReplicaRates], places: Sequence[Place]
) -> tuple[dict[int, int], dict[int, int]]:
    """Variables of the replicas' prompts and outputs, within their own limits."""
    prefill, decode = dict[int, int](), dict[int, int]()
    for at, replica in enumerate(replicas):
        if replica.role != "decode":
            prefill[at] = x = program.variable(1.0, replica.prefill)
            program.caps[x] = Limit("prefill", replica.name)
            program.balance(("from", places[at]), x, 1.0)
        if replica.role != "prefill":
            decode[at] = y = program.variable(0.0, replica.decode)
            program.caps[y] = Limit("decode", replica.name)
            program.balance(("to", places[at]), y, 1.0)
        for part, (prompt_s, output_s) in enumerate(replica.uses):
            limit = Limit("mixed", f"{replica.name}/{part}")
            program.use(limit, prefill[at], prompt_s, 1.0)
            program.use(limit, decode[at], output_s, 1.0)
    return prefill, decode


def _pairs(
    program: _Program,
    sources: Sequence[Place],
    targets: Sequence[Place],
    network: Network,
    layer_bytes: float,
) -> dict[tuple[Place, Place], int]:
    """Variables of the pairs that must be named, with every wire that they use."""
    found = dict[tuple[Place, Place], int]()
    for source, target, ways in pairs_of(sources, targets, network):
        found[source, target] = f = program.variable(-_CROSSING * _distance(ways, network))
        program.balance(("from", source), f, -1.0)
        program.balance(("to", target), f, -1.0)
        for way, n_layers in ways.items():
            _send(program, f, way, n_layers * layer_bytes, network)
    return found


def _distance(ways: Mapping[Way, int], network: Network) -> float:
    crosses = any(network.sites[src] != network.sites[dst] for src, dst in ways)
    return float(len(ways) > 0) + crosses


def _send(program: _Program, f: int, way: Way, n_bytes: float, network: Network) -> None:
    src, dst = way
    if src in network.nics:
        program.use(Limit("nic_out", src), f, n_bytes, network.nics[src].out_bytes_per_s)
    if dst in network.nics:
        program.use(Limit("nic_in", dst), f, n_bytes, network.nics[dst].in_bytes_per_s)
    program.use(Limit("link", f"{src} to {dst}"), f, n_bytes, network.own_limit(way))
    _cross(program, f, (network.sites[src], network.sites[dst]), n_bytes, network)


def _cross(program: _Program, f: int, sites: tuple[str, str], n_bytes: float, network: Network) -> None:
    if sites[0] != sites[1]:
        limit = Limit("line", f"{sites[0]} to {sites[1]}")
        program.use(limit, f, n_bytes, network.lines.get(sites, math.inf))


def _ends(
    program: _Program, places: Sequence[Place], network: Network, layer_bytes: float, *, leaves: bool
) -> dict[Place, int]:
    """Variables of what places send into the hub, or take from it."""
    found = dict[Place, int]()
    for place in places:
        site = place.hub_site(network)
        if site is None:
            continue
        found[place] = v = program.variable(-_CROSSING if leaves else 0.0)
        program.balance(("from" if leaves else "to", place), v, -1.0)
        program.balance(("leaves" if leaves else "enters", site), v, 1.0)
        for node, n_layers in place.layers.items():
            nic, n_bytes = network.nics.get(node), n_layers * layer_bytes
            if nic is not None and leaves:
                program.use(Limit("nic_out", node), v, n_bytes, nic.out_bytes_per_s)
            elif nic is not None:
                program.use(Limit("nic_in", node), v, n_bytes, nic.in_bytes_per_s)
    return found


def _passes(
    program: _Program,
    sources: Sequence[Place],
    targets: Sequence[Place],
    network: Network,
    layer_bytes: float,
) -> dict[tuple[str, str], int]:
    """Variables of what passes from a site's places in the hub to another's, or to its own."""
    found = dict[tuple[str, str], int]()
    ends = [{p.hub_site(network): p.spans[-1][2] for p in places} for places in (sources, targets)]
    for src, n_layers in ends[0].items():
        for dst in ends[1]:
            if src is None or dst is None or (src, dst) not in network.connected_sites:
                continue
            found[src, dst] = v = program.variable(-_CROSSING * (src != dst))
            program.balance(("leaves", src), v, -1.0)
            program.balance(("enters", dst), v, -1.0)
            _cross(program, v, (src, dst), n_layers * layer_bytes, network)
    return found
