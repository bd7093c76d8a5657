"""Every metric of a node: name, type, meaning, labels and buckets. Exposed by the daemon; read by dashboards.

Names and labels are a promise to those who scrape them. SI units: seconds and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["stop", "length", "cancelled", "invalid", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "cancelled", "invalid", "refused", "failed")
"""How a request ended: finished (by a stop or at its length), cancelled by the client, not valid, refused
because the mesh was full or not ready, or failed on our side."""

KvState = Literal["free", "used", "cached", "leased"]
KV_STATES: tuple[KvState, ...] = ("free", "used", "cached", "leased")
MEMBER_STATES = ("joining", "alive", "suspect", "failed", "left")

_FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY_BUCKETS_S = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HANDOFF_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One metric family. `vllm` is the name that vLLM has for the same thing, if it has one."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: str | None = None


REQUESTS = MetricSpec(
    name="hexmesh_requests_total",
    kind="counter",
    help="Generation requests that ended here, by outcome.",
    labels=("outcome",),
)
REQUESTS_RUNNING = MetricSpec(
    name="hexmesh_requests_running",
    kind="gauge",
    help="Requests being computed by the replicas that this node drives.",
    vllm="vllm:num_requests_running",
)
REQUESTS_WAITING = MetricSpec(
    name="hexmesh_requests_waiting",
    kind="gauge",
    help="Requests queued at the replicas that this node drives.",
    vllm="vllm:num_requests_waiting",
)
TIME_TO_FIRST_TOKEN = MetricSpec(
    name="hexmesh_time_to_first_token_seconds",
    kind="histogram",
    help="From a request's arrival at this node to its first token.",
    buckets=_FIRST_TOKEN_BUCKETS_S,
    vllm="vllm:time_to_first_token_seconds",
)
INTER_TOKEN_LATENCY = MetricSpec(
    name="hexmesh_inter_token_latency_seconds",
    kind="histogram",
    help="Between two tokens of one answer.",
    buckets=_INTER_TOKEN_BUCKETS_S,
    vllm="vllm:inter_token_latency_seconds",
)
REQUEST_LATENCY = MetricSpec(
    name="hexmesh_request_latency_seconds",
    kind="histogram",
    help="From a request's arrival at this node to its end, finished requests only.",
    buckets=_LATENCY_BUCKETS_S,
    vllm="vllm:e2e_request_latency_seconds",
)
PROMPT_TOKENS = MetricSpec(
    name="hexmesh_prompt_tokens_total",
    kind="counter",
    help="Prompt tokens of requests that came in here and got a first token.",
    vllm="vllm:prompt_tokens_total",
)
GENERATION_TOKENS = MetricSpec(
    name="hexmesh_generation_tokens_total",
    kind="counter",
    help="Tokens generated for requests that came in here.",
    vllm="vllm:generation_tokens_total",
)
KV_BLOCKS = MetricSpec(
    name="hexmesh_kv_blocks",
    kind="gauge",
    help="KV cache blocks of the plan's replicas by state, the same on every node; their sum is the pool.",
    labels=("state",),
)
PREFIX_CACHE_HIT_TOKENS = MetricSpec(
    name="hexmesh_prefix_cache_hit_tokens_total",
    kind="counter",
    help="Prompt tokens whose KV was found in the cache.",
    vllm="vllm:prefix_cache_hits_total",
)
STAGE_STEP = MetricSpec(
    name="hexmesh_stage_step_seconds",
    kind="histogram",
    help="Compute time of one step of a stage of a replica that this node drives.",
    labels=("replica", "stage"),
    buckets=_STEP_BUCKETS_S,
)
STEP_ROUND_TRIP = MetricSpec(
    name="hexmesh_step_round_trip_seconds",
    kind="histogram",
    help="Time of one step through all stages of a replica that this node drives, network included.",
    labels=("replica",),
    buckets=_STEP_BUCKETS_S,
)
STEP_TRANSIT = MetricSpec(
    name="hexmesh_step_transit_seconds",
    kind="histogram",
    help="Part of a step's round trip that it spent between workers, in daemons and on the network.",
    labels=("replica",),
    buckets=_STEP_BUCKETS_S,
)
STEPS_IN_FLIGHT = MetricSpec(
    name="hexmesh_steps_in_flight",
    kind="gauge",
    help="Steps under way in a replica that this node drives.",
    labels=("replica",),
)
STAGE_BUSY = MetricSpec(
    name="hexmesh_stage_busy_ratio",
    kind="gauge",
    help="Share of the last seconds that a stage on this node spent computing.",
    labels=("replica", "stage"),
)
LINK_RTT = MetricSpec(
    name="hexmesh_link_rtt_seconds", kind="gauge", help="Median round trip to a peer.", labels=("peer",)
)
LINK_RATE = MetricSpec(
    name="hexmesh_link_bytes_per_second", kind="gauge", help="Measured rate to a peer.", labels=("peer",)
)
KV_HANDOFF = MetricSpec(
    name="hexmesh_kv_handoff_seconds",
    kind="histogram",
    help="From reserving blocks for a handed-over KV cache to its last acknowledged byte.",
    buckets=_HANDOFF_BUCKETS_S,
)
KV_HANDOFF_BYTES = MetricSpec(
    name="hexmesh_kv_handoff_bytes_total", kind="counter", help="KV cache bytes sent to decode stages."
)
KV_HANDOFF_FAILURES = MetricSpec(
    name="hexmesh_kv_handoff_failures_total",
    kind="counter",
    help="KV handoffs that fell back to prefilling again, by reason.",
    labels=("reason",),
)
PLAN_EPOCH = MetricSpec(
    name="hexmesh_plan_epoch",
    kind="gauge",
    help="Number of the plan in force within its term; 0 without one.",
)
COORDINATOR_TERM = MetricSpec(
    name="hexmesh_coordinator_term", kind="gauge", help="Term of the coordinator that this node obeys."
)
REPLANS = MetricSpec(
    name="hexmesh_replans_total",
    kind="counter",
    help="Plans decided by this node as coordinator, by reason.",
    labels=("reason",),
)
REQUESTS_RECOVERED = MetricSpec(
    name="hexmesh_requests_recovered_total",
    kind="counter",
    help="Requests that went on after losing a stage, host or link, by the way they were recovered.",
    labels=("mode",),
)
MEMBERS = MetricSpec(
    name="hexmesh_members",
    kind="gauge",
    help="Members of the mesh as this node sees them, by state.",
    labels=("state",),
)

ALL = (
    *(
        REQUESTS,
        REQUESTS_RUNNING,
        REQUESTS_WAITING,
        TIME_TO_FIRST_TOKEN,
        INTER_TOKEN_LATENCY,
        REQUEST_LATENCY,
    ),
    *(PROMPT_TOKENS, GENERATION_TOKENS, KV_BLOCKS, PREFIX_CACHE_HIT_TOKENS),
    *(STAGE_STEP, STEP_ROUND_TRIP, STEP_TRANSIT, STEPS_IN_FLIGHT, STAGE_BUSY),
    *(LINK_RTT, LINK_RATE, KV_HANDOFF, KV_HANDOFF_BYTES, KV_HANDOFF_FAILURES, PLAN_EPOCH, COORDINATOR_TERM),
    *(REPLANS, REQUESTS_RECOVERED, MEMBERS),
)
