"""The node's metrics, alive: one registry for each node, written through typed methods.

The HTTP surface records requests (`Telemetry.request`); the node records everything else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from daemon.views import KvBlocksView, LinkView, MemberView
from hexmesh import metrics
from hexmesh.metrics import MetricSpec, Outcome

# Prometheus takes a series' start from its scrapes; the _created twins only double what is sent.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Telemetry:
    """Owner of one node's metric series. `registry` is what /metrics shows."""

    def __init__(self, *, model_name: str = "", alias_vllm: bool = False) -> None:
        """`alias_vllm` also exposes what vLLM's dashboards ask for, labelled with `model_name`."""
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._collectors: list[Collector] = []
        self.requests_running = self._gauge(metrics.REQUESTS_RUNNING)
        self.requests_waiting = self._gauge(metrics.REQUESTS_WAITING)
        self.plan_epoch = self._gauge(metrics.PLAN_EPOCH)
        self.coordinator_term = self._gauge(metrics.COORDINATOR_TERM)
        self._requests = self._counter(metrics.REQUESTS)
        self._first_token = self._histogram(metrics.TIME_TO_FIRST_TOKEN)
        self._inter_token = self._histogram(metrics.INTER_TOKEN_LATENCY)
        self._latency = self._histogram(metrics.REQUEST_LATENCY)
        self._prompt_tokens = self._counter(metrics.PROMPT_TOKENS)
        self._generation_tokens = self._counter(metrics.GENERATION_TOKENS)
        self._kv_blocks = self._gauge(metrics.KV_BLOCKS)
        self._stage_step = self._histogram(metrics.STAGE_STEP)
        self._step_round_trip = self._histogram(metrics.STEP_ROUND_TRIP)
        self._step_transit = self._histogram(metrics.STEP_TRANSIT)
        self._steps_in_flight = self._gauge(metrics.STEPS_IN_FLIGHT)
        self._prefix_hits = self._counter(metrics.PREFIX_CACHE_HIT_TOKENS)
        self._stage_busy = self._gauge(metrics.STAGE_BUSY)
        self._link_rtt = self._gauge(metrics.LINK_RTT)
        self._link_rate = self._gauge(metrics.LINK_RATE)
        self._replans = self._counter(metrics.REPLANS)
        self._recovered = self._counter(metrics.REQUESTS_RECOVERED)
        self._members = self._gauge(metrics.MEMBERS)
        self._show_what_is_not_counted_yet()
        self._show_known_labels()
        if alias_vllm:
            self.registry.register(_VllmNames(self))

    def families(self) -> Iterator[Metric]:
        """All metric families as they stand, without the aliases."""
        for collector in self._collectors:
            yield from collector.collect()

    @property
    def model_name(self) -> str:
        return self._model_name

    def request(self, *, arrived_s: float, n_prompt_tokens: int, n_answers: int) -> RequestMeter:
        """Measures a request that arrived at `arrived_s` of time.perf_counter."""
        return RequestMeter(self, arrived_s, n_prompt_tokens=n_prompt_tokens, n_answers=n_answers)

    def count_request(self, outcome: Outcome) -> None:
        self._requests.labels(outcome).inc()

    def count_replan(self, reason: str) -> None:
        """`reason` is a label: a word of a small set, such as "join", never free text."""
        self._replans.labels(reason).inc()

    def count_recovery(self, mode: str) -> None:
        self._recovered.labels(mode).inc()

    def observe_step(
        self, replica: str, round_trip_s: float, stage_seconds: Iterable[float], transit_s: float
    ) -> None:
        """One step through a replica that this node drives: the whole, each stage's compute time, and the ways."""
        self._step_round_trip.labels(replica).observe(round_trip_s)
        self._step_transit.labels(replica).observe(transit_s)
        for stage, seconds in enumerate(stage_seconds):
            self._stage_step.labels(replica, str(stage)).observe(seconds)

    def count_prefix_hits(self, n_tokens: int) -> None:
        """Prompt tokens of sequences that began just now, which did not have to be computed."""
        self._prefix_hits.inc(n_tokens)

    def set_steps_in_flight(self, n_steps: Mapping[str, int]) -> None:
        """Of every replica that this node drives; others are forgotten."""
        self._steps_in_flight.clear()
        for replica, n in n_steps.items():
            self._steps_in_flight.labels(replica).set(n)

    def set_stage_busy(self, busy: Mapping[tuple[str, int], float]) -> None:
        """The busy ratio of every (replica, stage) on this node; stages not named are forgotten."""
        self._stage_busy.clear()
        for (replica, stage), ratio in busy.items():
            self._stage_busy.labels(replica, str(stage)).set(ratio)

    def set_kv_blocks(self, blocks: KvBlocksView) -> None:
        counts = {"free": blocks.free, "used": blocks.used, "cached": blocks.cached, "leased": blocks.leased}
        for state, count in counts.items():
            self._kv_blocks.labels(state).set(count)

    def set_members(self, members: Iterable[MemberView]) -> None:
        counts = dict.fromkeys(metrics.MEMBER_STATES, 0)
        for member in members:
            counts[member.state] += 1
        for state, count in counts.items():
            self._members.labels(state).set(count)

    def set_links(self, links: Iterable[LinkView], *, node: str) -> None:
        """Series of the links that leave `node`; peers without a measured link are forgotten."""
        self._link_rtt.clear()
        self._link_rate.clear()
        for link in links:
            if link.src != node:
                continue
            if link.rtt_p50_s is not None:
                self._link_rtt.labels(link.dst).set(link.rtt_p50_s)
            if link.bytes_per_s is not None:
                self._link_rate.labels(link.dst).set(link.bytes_per_s)

    def record_first_token(self, seconds: float, *, n_prompt_tokens: int) -> None:
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(n_prompt_tokens)

    def record_tokens(self, n_tokens: int, *, seconds_each: float | None) -> None:
        """New tokens of one answer; `seconds_each` is None for its first ones."""
        self._generation_tokens.inc(n_tokens)
        if seconds_each is not None:
            for _ in range(n_tokens):
                self._inter_token.observe(seconds_each)

    def record_latency(self, seconds: float) -> None:
        self._latency.observe(seconds)

    def _show_what_is_not_counted_yet(self) -> None:
        """Names that dashboards may ask for already; there is no KV handoff yet."""
        for spec in (metrics.KV_HANDOFF_BYTES, metrics.KV_HANDOFF_FAILURES):
            self._counter(spec)
        self._histogram(metrics.KV_HANDOFF)

    def _show_known_labels(self) -> None:
        """Series with a fixed set of labels exist from the start, so that rates over them are right."""
        for outcome in metrics.OUTCOMES:
            self._requests.labels(outcome)
        for kv_state in metrics.KV_STATES:
            self._kv_blocks.labels(kv_state)
        for member_state in metrics.MEMBER_STATES:
            self._members.labels(member_state)

    def _counter(self, spec: MetricSpec) -> Counter:
        assert spec.kind == "counter", spec.name
        counter = Counter(spec.name, spec.help, spec.labels, registry=self.registry)
        self._collectors.append(counter)
        return counter

    def _gauge(self, spec: MetricSpec) -> Gauge:
        assert spec.kind == "gauge", spec.name
        gauge = Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
        self._collectors.append(gauge)
        return gauge

    def _histogram(self, spec: MetricSpec) -> Histogram:
        assert spec.kind == "histogram", spec.name
        histogram = Histogram(spec.name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets)
        self._collectors.append(histogram)
        return histogram


class RequestMeter:
    """Measures one request, from its arrival to its end, on time.perf_counter."""

    def __init__(
        self, telemetry: Telemetry, arrived_s: float, *, n_prompt_tokens: int, n_answers: int
    ) -> None:
        self._telemetry = telemetry
        self._n_prompt_tokens = n_prompt_tokens
        self._arrived_s = arrived_s
        self._last_s: list[float | None] = [None] * n_answers
        self._has_tokens = False

    def add_tokens(self, answer: int, n_tokens: int) -> None:
        """`n_tokens` new tokens of one answer came just now, together."""
        if not n_tokens:
            return
        now_s = time.perf_counter()
        if not self._has_tokens:
            self._has_tokens = True
            self._telemetry.record_first_token(now_s - self._arrived_s, n_prompt_tokens=self._n_prompt_tokens)
        last_s = self._last_s[answer]
        self._telemetry.record_tokens(
            n_tokens, seconds_each=None if last_s is None else (now_s - last_s) / n_tokens
        )
        self._last_s[answer] = now_s

    def end(self, outcome: Outcome) -> None:
        self._telemetry.count_request(outcome)
        if outcome in ("stop", "length"):
            self._telemetry.record_latency(time.perf_counter() - self._arrived_s)


class _VllmNames(Collector):
    """The same samples under vLLM's names, so that dashboards made for vLLM work."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._names = {spec.name.removesuffix("_total"): spec.vllm for spec in metrics.ALL if spec.vllm}

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        model = {"model_name": self._telemetry.model_name, "engine": "0"}
        for family in self._telemetry.families():
            if family.name in self._names:
                yield _renamed(family, str(self._names[family.name]).removesuffix("_total"), model)
            elif family.name == metrics.REQUESTS.name.removesuffix("_total"):
                yield _successes(family, model)
            elif family.name == metrics.KV_BLOCKS.name:
                yield _kv_usage(family, model)


def _renamed(family: Metric, name: str, labels: dict[str, str]) -> Metric:
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        renamed.add_sample(
            name + sample.name.removeprefix(family.name), {**labels, **sample.labels}, sample.value
        )
    return renamed


def _successes(family: Metric, labels: dict[str, str]) -> Metric:
    successes = Metric("vllm:request_success", "Finished requests, by finish reason.", "counter")
    for sample in family.samples:
        outcome = sample.labels.get("outcome")
        if outcome in ("stop", "length"):
            successes.add_sample(
                "vllm:request_success_total", {**labels, "finished_reason": outcome}, sample.value
            )
    return successes


def _kv_usage(family: Metric, labels: dict[str, str]) -> Metric:
    blocks = {sample.labels["state"]: sample.value for sample in family.samples}
    total = sum(blocks.values())
    in_use = blocks.get("used", 0.0) + blocks.get("leased", 0.0)
    usage = Metric("vllm:kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", "gauge")
    usage.add_sample("vllm:kv_cache_usage_perc", labels, in_use / total if total else 0.0)
    return usage
