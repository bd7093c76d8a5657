"""What a way between two hosts takes beside its link: sending, daemons, waking. Learnt from round trips of steps.

    round trip - computing - queueing at stages = sum over ways of (delay + overhead) + sum over hops of bytes / rate

The ways are the hops between hosts and the sampled tokens' way back; only the driver's clock is needed. Steps that
carry a prompt are left out (their bytes are what counts in them), and so are those that queued. What disturbs a step on
its way only adds, so the lower quartile counts: a median doubles by what else runs on a host. Which way took what
cannot be told, so the overhead is one of a driver's pipelines, and of a mesh the median of what its drivers tell: were
hosts that are in no pipeline yet better off than those that are, plans would move there for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log2
from statistics import median

from msgspec.structs import replace

from hexmesh.cluster import Link

MOST_WAY_S = 0.02
"""Beyond that, something else is wrong than a figure."""
UNQUEUED_S = 1e-3
"""A step that waited no longer at its stages did not queue."""
_N_OF_CLASS = 24
"""Trips of a size class that are remembered, the last ones: alone and in company count alike."""
_LEAST_TRIPS = 20
"""With fewer nothing is said."""

Links = Mapping[tuple[str, str], Link]


@dataclass(frozen=True, slots=True)
class Trip:
    """A step's way through its hosts and back to the first."""

    nodes: Sequence[str]
    """Of its stages."""
    payload_bytes: float
    """Over each hop."""
    seconds: float

    def beside(self, links: Links) -> float | None:
        """Of each way, what its link does not explain; None where a link is not known, or there is no way."""
        hops = [pair for pair in pairwise(self.nodes) if pair[0] != pair[1]]
        ways = [*hops, (self.nodes[-1], self.nodes[0])] if hops else []
        ways = [way for way in ways if way[0] != way[1]]
        if not ways or not all(way in links for way in ways):
            return None
        delays_s = sum(links[way].rtt_p50_s / 2 for way in ways)
        sends_s = sum(self.payload_bytes / links[hop].bytes_per_s for hop in hops)
        return (self.seconds - delays_s - sends_s) / len(ways)


@dataclass
class WayFit:
    """Of the pipelines that a node drives; owned by its daemon."""

    _seen: dict[int, deque[Trip]] = field(default_factory=dict)
    """By size class of the step."""

    def observe(self, trip: Trip, *, n_rows: int, n_tokens: int, queue_s: float) -> None:
        """A step of so many rows was answered."""
        if n_tokens > n_rows or queue_s > UNQUEUED_S:
            return
        self._seen.setdefault(round(2 * log2(n_rows)), deque(maxlen=_N_OF_CLASS)).append(trip)

    def way_s(self, links: Links) -> float | None:
        """The overhead of a way by links as they were measured; None while trips are too few."""
        found = sorted(one for trips in self._seen.values() for one in _beside(trips, links))
        return min(max(0.0, found[len(found) // 4]), MOST_WAY_S) if len(found) >= _LEAST_TRIPS else None


def _beside(trips: Iterable[Trip], links: Links) -> Iterator[float]:
    for trip in trips:
        if (seconds := trip.beside(links)) is not None:
            yield seconds


def lengthened(links: Iterable[Link], told_s: Sequence[float]) -> tuple[Link, ...]:
    """Links with the overhead that drivers tell; it is paid each way."""
    more_s = 2 * median(told_s) if told_s else 0.0
    return tuple(
        replace(link, rtt_p50_s=link.rtt_p50_s + more_s, rtt_p95_s=link.rtt_p95_s + more_s) for link in links
    )
