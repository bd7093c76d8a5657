"""The requests of a workload, one after the other, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hexmesh.errors import InvalidInput
from hexmesh.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Request:
    """When it comes and how long it is."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def requests(workload: Workload, rng: random.Random, *, n: int) -> Iterator[Request]:
    """The first `n` requests; fewer where a trace ends. Raises InvalidInput for a workload without arrivals.

    Arrivals and lengths draw from generators of their own, so that another rate leaves the lengths alone.
    """
    if workload.arrivals is None:
        raise InvalidInput("the workload has no arrivals", next_step="give it a rate, or a trace")
    of_arrivals, of_lengths = random.Random(rng.getrandbits(64)), random.Random(rng.getrandbits(64))
    for arrival_s in islice(workload.arrivals.times_s(of_arrivals), n):
        yield Request(arrival_s, *workload.drawn_lengths.sample(of_lengths))
