"""The linear program behind `best_flow`: its variables, its rows and what they come to, for places instead of pairs.

Variables: x and y of every replica; f of the pairs of places that must be named (`places.pairs_of`); what places in the
hub send into it and take from it, and what passes between their sites. Each limit is one row, scaled to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hexmesh.cluster import Role
from hexmesh.score.network import Network, Way
from hexmesh.score.places import Held, Place, pairs_of
from hexmesh.score.program import Program

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """Variables of a program by what they are of, as in `Solved`."""

    prefill: Mapping[int, int]
    decode: Mapping[int, int]
    named: Mapping[tuple[Place, Place], int]
    out: Mapping[Place, int]
    into: Mapping[Place, int]
    passed: Mapping[tuple[str, str], int]


def solve(
    replicas: Sequence[ReplicaRates], places: Sequence[Place], network: Network, layer_bytes: float
) -> Solved:
    """The most requests; `places` are the replicas', `layer_bytes` is the KV of one prompt in one layer."""
    program = Program()
    flows = add_flows(program, replicas, places, network, layer_bytes)
    solution = program.solve()
    assert solution is not None
    values = solution.values
    shares = {limit: price for limit, price in solution.limits.items() if isinstance(limit, Limit)}
    caps = solution.caps
    shares |= {Limit("prefill", replicas[at].name): caps.get(x, 0.0) for at, x in flows.prefill.items()}
    shares |= {Limit("decode", replicas[at].name): caps.get(y, 0.0) for at, y in flows.decode.items()}
    total = sum(shares.values())
    return Solved(
        prefill={at: float(values[x]) for at, x in flows.prefill.items()},
        decode={at: float(values[y]) for at, y in flows.decode.items()},
        named={pair: float(values[f]) for pair, f in flows.named.items()},
        out={place: float(values[v]) for place, v in flows.out.items()},
        into={place: float(values[v]) for place, v in flows.into.items()},
        passed={sites: float(values[v]) for sites, v in flows.passed.items()},
        shares={limit: share / total for limit, share in shares.items() if share > 1e-9 * total},
    )


def add_flows(
    program: Program,
    replicas: Sequence[ReplicaRates],
    places: Sequence[Place],
    network: Network,
    layer_bytes: float,
    gates: Sequence[int] | None = None,
    worth: float = 1.0,
) -> Flows:
    """Rows and variables of the replicas' flows; with gates, each replica is there as often as its gate says.

    What a network's `gates` say of a node is there as often, too.
    """
    prefill, decode = _replicas(program, replicas, places, gates, worth)
    sources = list(dict.fromkeys(places[at] for at in prefill))
    targets = list(dict.fromkeys(places[at] for at in decode))
    return Flows(
        prefill=prefill,
        decode=decode,
        named=_pairs(program, sources, targets, network, layer_bytes),
        out=_ends(program, sources, network, layer_bytes, leaves=True),
        into=_ends(program, targets, network, layer_bytes, leaves=False),
        passed=_passes(program, sources, targets, network, layer_bytes),
    )


def _replicas(
    program: Program,
    replicas: Sequence[ReplicaRates],
    places: Sequence[Place],
    gates: Sequence[int] | None,
    worth: float,
) -> tuple[dict[int, int], dict[int, int]]:
    """Variables of the replicas' prompts and outputs, within their own limits."""
    prefill, decode = dict[int, int](), dict[int, int]()
    for at, replica in enumerate(replicas):
        gate = None if gates is None else gates[at]
        if replica.role != "decode":
            prefill[at] = x = _rate(program, Limit("prefill", replica.name), replica.prefill, gate, worth)
            program.balance(("from", places[at]), x, 1.0)
        if replica.role != "prefill":
            decode[at] = y = _rate(program, Limit("decode", replica.name), replica.decode, gate, 0.0)
            program.balance(("to", places[at]), y, 1.0)
        for part, (prompt_s, output_s) in enumerate(replica.uses):
            limit = Limit("mixed", f"{replica.name}/{part}")
            program.use(limit, prefill[at], prompt_s, 1.0, gate)
            program.use(limit, decode[at], output_s, 1.0, gate)
    return prefill, decode


def _rate(program: Program, limit: Limit, most: float, gate: int | None, worth: float) -> int:
    if gate is None:
        return program.variable(worth, most)
    rate = program.variable(worth)
    program.use(limit, rate, 1.0, most, gate)
    return rate


def _pairs(
    program: Program,
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


def _send(program: Program, f: int, way: Way, n_bytes: float, network: Network) -> None:
    src, dst = way
    _leave(program, f, src, n_bytes, network)
    _enter(program, f, dst, n_bytes, network)
    program.use(Limit("link", f"{src} to {dst}"), f, n_bytes, network.own_limit(way))
    _cross(program, f, (network.sites[src], network.sites[dst]), n_bytes, network)


def _leave(program: Program, f: int, node: str, n_bytes: float, network: Network) -> None:
    nic = network.nics.get(node)
    if nic is not None:
        program.use(Limit("nic_out", node), f, n_bytes, nic.out_bytes_per_s, network.gates.get(node))


def _enter(program: Program, f: int, node: str, n_bytes: float, network: Network) -> None:
    nic = network.nics.get(node)
    if nic is not None:
        program.use(Limit("nic_in", node), f, n_bytes, nic.in_bytes_per_s, network.gates.get(node))


def _cross(program: Program, f: int, sites: tuple[str, str], n_bytes: float, network: Network) -> None:
    if sites[0] != sites[1]:
        limit = Limit("line", f"{sites[0]} to {sites[1]}")
        program.use(limit, f, n_bytes, network.lines.get(sites, math.inf))


def _ends(
    program: Program, places: Sequence[Place], network: Network, layer_bytes: float, *, leaves: bool
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
            meet = _leave if leaves else _enter
            meet(program, v, node, n_layers * layer_bytes, network)
    return found


def _passes(
    program: Program,
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
