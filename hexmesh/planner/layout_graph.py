"""The orders in which a pipeline may visit a team's pools, as an acyclic graph of visits.

Pools that cannot be told apart (like devices, as many, and the same ways to all others) are one `Class`, and a visit is
to a class. What may follow depends on what has been visited and where one is, so a vertex is (first class, visits by
class, class of the last): Held and Karp's subsets, with counts in place of sets, and with the first kept for the way
back unless all ways back are alike. Pools may be left out. With few classes that is every order; a team of too many
takes a few orders of hosts instead, in each of which pools may be left out, too (`Graph.has_all_orders`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hexmesh.score.pipeline import Hop

MOST_VISITS = 600
"""Vertices of a graph of all orders: five pools that all differ, or 24 hosts of three types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """Pools of a team that are alike."""

    kind: int
    """Of their devices."""
    n_devices: int
    """In each."""
    n_pools: int
    site: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A way into a visit."""

    visit: int
    """Where it comes from."""
    hop: Hop


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A vertex: a pool of a class, after some others."""

    cls: int
    is_first: bool
    """A pipeline begins here, and nowhere else."""
    entries: tuple[Entry, ...]
    back: Hop | None
    """To the first; None where there is no way, so that a pipeline of several stages cannot end here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Visits, each after those that it may be entered from."""

    classes: tuple[Class, ...]
    visits: tuple[Visit, ...]
    inside: Hop
    """Between two stages of one pool."""
    has_all_orders: bool
    is_complete: bool
    """Whether all pools have a way to all others."""


Hops = Sequence[Sequence[Hop | None]]
"""From class to class; of a class with itself: from one of its pools to another."""


def graph_of(classes: tuple[Class, ...], hops: Hops, inside: Hop) -> Graph:
    """All orders if they are few, else some."""
    is_complete = None not in list(_possible(classes, hops))
    visits = _all_orders(classes, hops, inside)
    if visits is not None:
        return Graph(
            classes=classes, visits=visits, inside=inside, has_all_orders=True, is_complete=is_complete
        )
    visits = tuple(_some_orders(classes, hops, inside))
    return Graph(classes=classes, visits=visits, inside=inside, has_all_orders=False, is_complete=is_complete)


_State = tuple[int, tuple[int, ...], int]
"""(class of the first or ANY, visits by class, class of the last)"""
_ANY = -1


def _all_orders(classes: Sequence[Class], hops: Hops, inside: Hop) -> tuple[Visit, ...] | None:
    """None if there are too many."""
    n = len(classes)
    delays = {None if hop is None else hop.delay_s for hop in _possible(classes, hops)}
    is_any = len(delays) <= 1 and None not in delays
    some = next(_possible(classes, hops), inside)
    entries = dict[_State, list[tuple[_State, Hop]]]()
    layer = [
        (_ANY if is_any else cls, tuple(int(other == cls) for other in range(n)), cls) for cls in range(n)
    ]
    entries.update((state, []) for state in layer)
    while layer:
        further = dict[_State, list[tuple[_State, Hop]]]()
        for first, counts, last in layer:
            for cls in range(n):
                hop = hops[last][cls]
                if hop is not None and counts[cls] < classes[cls].n_pools:
                    after = (first, (*counts[:cls], counts[cls] + 1, *counts[cls + 1 :]), cls)
                    further.setdefault(after, []).append(((first, counts, last), hop))
        entries |= further
        if len(entries) > MOST_VISITS:
            return None
        layer = list(further)
    at = {state: index for index, state in enumerate(entries)}
    return tuple(
        Visit(
            cls=last,
            is_first=sum(counts) == 1,
            entries=tuple(Entry(at[state], hop) for state, hop in entries[first, counts, last]),
            back=inside if sum(counts) == 1 else some if first == _ANY else hops[last][first],
        )
        for first, counts, last in at
    )


def _possible(classes: Sequence[Class], hops: Hops) -> Iterator[Hop | None]:
    """Ways between two pools of the team; None where there is none."""
    for src in range(len(classes)):
        for dst in range(len(classes)):
            if src != dst or classes[src].n_pools > 1:
                yield hops[src][dst]


def _some_orders(classes: Sequence[Class], hops: Hops, inside: Hop) -> Iterator[Visit]:
    """Chains of all pools, sites one after the other: the largest first and last, and each site's pools together.

    The first visit is every one in turn, as far as the number of visits allows.
    """
    n_visits = 0
    for chain in _chains(classes, hops):
        n_firsts = max(1, min(len(chain), 4 * MOST_VISITS // len(chain)))
        for first in range(n_firsts):
            yield from _chain(chain[first:], hops, inside, n_visits)
            n_visits += len(chain) - first


def _chains(classes: Sequence[Class], hops: Hops) -> list[list[int]]:
    """Orders of pools, by their classes."""
    pools = [cls for cls, found in enumerate(classes) for _ in range(found.n_pools)]
    by_site = defaultdict[int, list[int]](list)
    for pool in pools:
        by_site[classes[pool].site].append(pool)
    sites = sorted(by_site, key=lambda site: -sum(classes[pool].n_devices for pool in by_site[site]))
    largest_first = [pool for site in sites for pool in _near_to_near(by_site[site], classes, hops)]
    return [largest_first, largest_first[::-1]]


def _near_to_near(pools: Sequence[int], classes: Sequence[Class], hops: Hops) -> list[int]:
    """From the largest, always on to the pool over the fastest way, the larger of equals."""
    left = sorted(pools, key=lambda pool: -classes[pool].n_devices)
    found = [left.pop(0)] if left else []
    while left:
        ways = [hops[found[-1]][pool] for pool in left]
        rates = [0.0 if way is None else way.bytes_per_s for way in ways]
        found.append(left.pop(rates.index(max(rates))))
    return found


def _chain(chain: Sequence[int], hops: Hops, inside: Hop, offset: int) -> Iterator[Visit]:
    """One pipeline's order from its first pool on."""
    for at, cls in enumerate(chain):
        ways = [(before, hops[chain[before]][cls]) for before in range(at)]
        entries = tuple(Entry(offset + before, hop) for before, hop in ways if hop is not None)
        back = hops[cls][chain[0]] if at else inside
        yield Visit(cls=cls, is_first=at == 0, entries=entries, back=back)
