"""What a plan is to be good at.

A plan's worth is a tuple that is compared from the left, so that what must hold comes first and ties are broken by
what costs least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hexmesh.errors import InvalidInput
from hexmesh.workload import Slo, Workload

Worth = tuple[float, float, float]
"""The greater the better, from the left."""

WORTHLESS: Worth = (-math.inf, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a draft is predicted to do."""

    requests_per_s: float
    """At most, in steady state."""
    latency_s: float
    """Mean of a request from its first to its last token's arrival, at the workload's rate, without queueing."""
    price_per_h: float
    """Of all hosts that it uses; a host without a known price counts as 0."""
    n_devices: int


@dataclass(frozen=True, slots=True)
class Throughput:
    """As many requests per second as can be, whatever the limits of time."""

    name = "throughput"
    keeps_limits = False

    def worth(self, figures: Figures) -> Worth:
        """The rate, then the price, then the devices."""
        return _by_rate(figures)


@dataclass(frozen=True, slots=True)
class Goodput:
    """As many requests per second as can be within the workload's limits of time."""

    name = "goodput"
    keeps_limits = True

    def worth(self, figures: Figures) -> Worth:
        """The same, of layouts that keep the limits."""
        return _by_rate(figures)


@dataclass(frozen=True, slots=True)
class Latency:
    """The least mean time of a request, for a rate that must be served."""

    requests_per_s: float
    name = "latency"
    keeps_limits = True

    def worth(self, figures: Figures) -> Worth:
        """The rate up to the one wanted, then the time, then the price."""
        return min(figures.requests_per_s, self.requests_per_s), -figures.latency_s, -figures.price_per_h


@dataclass(frozen=True, slots=True)
class LeastCost:
    """The least price per hour for a rate that must be served within the limits of time."""

    requests_per_s: float
    name = "cost"
    keeps_limits = True

    def worth(self, figures: Figures) -> Worth:
        """The rate up to the one wanted, then the price, then the rate beyond it."""
        return min(figures.requests_per_s, self.requests_per_s), -figures.price_per_h, figures.requests_per_s


Objective = Throughput | Goodput | Latency | LeastCost

OBJECTIVES = ("throughput", "goodput", "latency", "cost")

ONE_AT_A_TIME = 1e-9
"""Requests per second that any plan serves: what the latency of a single request is asked at."""


def _by_rate(figures: Figures) -> Worth:
    return figures.requests_per_s, -figures.price_per_h, -figures.n_devices


def objective_named(name: str, workload: Workload) -> Objective:
    """The objective of that name; a rate comes from the workload's arrivals.

    Raises InvalidInput for a name that is none, and for "cost" without a rate.
    """
    rate = workload.requests_per_s
    match name:
        case "throughput":
            return Throughput()
        case "goodput":
            return Goodput()
        case "latency":
            return Latency(ONE_AT_A_TIME if rate is None else rate)
        case "cost" if rate is not None:
            return LeastCost(rate)
        case "cost":
            raise InvalidInput("no rate to serve at least cost", next_step="give the workload a rate")
        case _:
            raise InvalidInput(
                f"no objective is called {name!r}", next_step=f"choose one of {', '.join(OBJECTIVES)}"
            )


def within(workload: Workload, objective: Objective) -> Workload:
    """The workload, without limits of time where the objective does not ask for them."""
    if objective.keeps_limits:
        return workload
    return Workload(
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        max_concurrent_sequences=workload.max_concurrent_sequences,
        lengths=workload.lengths,
        arrivals=workload.arrivals,
        slo=Slo(),
    )
