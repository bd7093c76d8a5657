"""When requests come: seeded, without end or up to the end of a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

import msgspec

from hexmesh.errors import InvalidInput

_Rate = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class PoissonArrivals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="poisson"):
    """Requests that know nothing of each other."""

    requests_per_s: _Rate

    def times_s(self, rng: random.Random) -> Iterator[float]:
        """Arrivals from time 0 on, without end."""
        now_s = 0.0
        while True:
            now_s += rng.expovariate(self.requests_per_s)
            yield now_s


class GammaArrivals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gamma"):
    """Gaps of a given coefficient of variation: above 1 in bursts, 1 is Poisson, below it like a clock."""

    requests_per_s: _Rate
    cv: Annotated[float, msgspec.Meta(gt=0, le=100)]

    def times_s(self, rng: random.Random) -> Iterator[float]:
        """Arrivals from time 0 on, without end."""
        shape = 1 / self.cv**2
        now_s = 0.0
        while True:
            now_s += rng.gammavariate(shape, 1 / (shape * self.requests_per_s))
            yield now_s


class TraceArrivals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="trace"):
    """Arrivals as they were, from the first on; `speed` 2 is twice as fast."""

    times: Annotated[tuple[float, ...], msgspec.Meta(min_length=2)]
    speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0

    def __post_init__(self) -> None:
        if any(later < earlier for earlier, later in pairwise(self.times)) or self.times[-1] == self.times[0]:
            raise InvalidInput("arrivals of a trace must rise", next_step="sort the trace by arrival")

    @property
    def requests_per_s(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) * self.speed

    def times_s(self, rng: random.Random) -> Iterator[float]:
        """Arrivals from time 0 to the end of the trace."""
        return ((time_s - self.times[0]) / self.speed for time_s in self.times)


Arrivals = PoissonArrivals | GammaArrivals | TraceArrivals
