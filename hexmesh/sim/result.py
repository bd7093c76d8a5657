"""What a simulation found. All of it is data: it goes into JSON and plots as it is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and percentiles, in seconds; zeros where there was nothing to measure."""

    mean: float
    p50: float
    p90: float
    p99: float


class StageUse(msgspec.Struct, frozen=True, kw_only=True):
    """A stage in the measured window."""

    replica: str
    stage: int
    node: str
    busy: float
    """Share of the time in which it computed."""


class WayUse(msgspec.Struct, frozen=True, kw_only=True):
    """A link, NIC or line in the measured window."""

    kind: str
    """ "link", "nic_out", "nic_in" or "line"."""
    name: str
    busy: float
    """What it carried, of what it can."""
    hidden_bytes: float
    """Hidden states between stages, in the window."""
    kv_bytes: float
    """Handoffs, in the window."""


class ReplicaUse(msgspec.Struct, frozen=True, kw_only=True):
    """A replica in the measured window, as looked at now and then."""

    replica: str
    role: str
    kv_mean: float
    """Share of its blocks that sequences or leases hold."""
    kv_max: float
    waiting_mean: float
    waiting_max: int
    running_mean: float
    running_max: int


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The whole mesh at one time."""

    at_s: float
    tokens_per_s: float
    """Output, since the point before."""
    running: int
    waiting: int
    """In queues of replicas, or for a replica that is whole."""
    kv_used: float
    """Share of all blocks."""


class HandoffUse(msgspec.Struct, frozen=True, kw_only=True):
    """KV that went from a replica to another, in the whole run; seconds from the first token to the last byte."""

    n: int
    n_bytes: float
    """That crossed between hosts."""
    seconds: Spread


class SimResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Latencies are of the requests that came in the measured window, rates of what happened in it."""

    n_requests: int
    served: int
    refused: int
    """All queues were full, or it was too long."""
    lost: int
    """Its deadline passed."""
    replayed: int
    """Times that a request was begun again elsewhere, in all."""
    seconds: float
    """Virtual, from the first arrival to the last answer."""
    window_start_s: float
    window_stop_s: float
    is_saturated: bool
    """The workload names no rate: the queue was kept full."""
    ttft_s: Spread
    tpot_s: Spread
    """Mean time per token after the first, of each request with two or more."""
    end_to_end_s: Spread
    requests_per_s: float
    """That ended in the window. Where the queue was kept full: prompts computed, or output tokens drawn by a request's
    mean, whichever were less, for what comes of the sequences that were there at first is not to be kept up."""
    output_tokens_per_s: float
    goodput_share: float
    """Of the requests that came in the window: served, within both limits."""
    goodput_requests_per_s: float
    stages: tuple[StageUse, ...]
    ways: tuple[WayUse, ...]
    replicas: tuple[ReplicaUse, ...]
    timeline: tuple[Point, ...]
    handoffs: HandoffUse
    n_events: int
    n_steps: int


def spread_of(values: Sequence[float]) -> Spread:
    """Percentiles by nearest rank."""
    if not values:
        return Spread(mean=0.0, p50=0.0, p90=0.0, p99=0.0)
    ranked = sorted(values)

    def percentile(share: float) -> float:
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]

    return Spread(
        mean=sum(ranked) / len(ranked),
        p50=percentile(0.5),
        p90=percentile(0.9),
        p99=percentile(0.99),
    )
