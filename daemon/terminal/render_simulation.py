"""A simulation for people: what requests met, and how busy everything was."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from daemon.terminal.render_search import MAX_ROWS
from daemon.terminal.render_tables import new_table
from daemon.terminal.simulate_command import Simulation
from hexmesh.sim import SimResult
from hexmesh.units import show_bytes, show_duration

_MAX_STAGES = 16


def simulation_view(run: Simulation) -> RenderableType:
    """All of it."""
    parts = [
        *_header(run),
        Text(),
        _times(run.result),
        Text(),
        _replicas(run.result),
        Text(),
        _stages(run),
    ]
    if run.result.ways:
        parts += [Text(), _ways(run)]
    return Group(*parts)


def _header(run: Simulation) -> Iterator[RenderableType]:
    result, predicted = run.result, run.predicted
    rate = (
        "as many as can be served" if result.is_saturated else f"{run.workload.requests_per_s:g} requests/s"
    )
    workload = f"{run.workload.prompt_tokens} + {run.workload.output_tokens} tokens, {rate}"
    yield Text.assemble(
        ("model ", "dim"), (run.model, "bold"), ("  requests ", "dim"), f"{result.n_requests} of {workload}",
        ("  in ", "dim"), f"{show_duration(result.seconds)} of virtual time",
    )  # fmt: skip
    ratio = f" ({result.requests_per_s / predicted.requests_per_s:.0%} of the {predicted.requests_per_s:.4g} predicted)"
    yield Text.assemble(
        ("served ", "dim"), (f"{result.requests_per_s:.4g} requests/s", "bold"), ratio if result.is_saturated else "",
        f", {result.output_tokens_per_s:.4g} tokens/s; {result.goodput_share:.1%} within the limits, "
        f"{result.goodput_requests_per_s:.4g}/s",
    )  # fmt: skip
    troubles = {"refused": result.refused, "lost": result.lost, "begun again": result.replayed}
    said = ", ".join(f"{n} {what}" for what, n in troubles.items() if n)
    if said:
        yield Text.assemble(("of these ", "dim"), (said, "yellow"))
    if result.handoffs.n:
        handoffs = result.handoffs
        yield Text.assemble(
            ("KV handed over ", "dim"), f"{handoffs.n} times, {show_bytes(handoffs.n_bytes)} between hosts, p50 "
            f"{show_duration(handoffs.seconds.p50)}, p99 {show_duration(handoffs.seconds.p99)}",
        )  # fmt: skip


def _times(result: SimResult) -> RenderableType:
    table = new_table("", "MEAN", "P50", "P90", "P99")
    for name, spread in (
        ("first token", result.ttft_s),
        ("each token", result.tpot_s),
        ("whole request", result.end_to_end_s),
    ):
        table.add_row(
            name, *(show_duration(one) for one in (spread.mean, spread.p50, spread.p90, spread.p99))
        )
    return table


def _replicas(result: SimResult) -> RenderableType:
    table = new_table("REPLICA", "DOES", "RUNNING", "MOST", "WAITING", "MOST", "KV HELD", "MOST")
    for one in result.replicas[:MAX_ROWS]:
        table.add_row(
            one.replica, one.role, f"{one.running_mean:.1f}", str(one.running_max), f"{one.waiting_mean:.1f}",
            str(one.waiting_max), f"{one.kv_mean:.0%}", f"{one.kv_max:.0%}",
        )  # fmt: skip
    return table


def _stages(run: Simulation) -> RenderableType:
    table = new_table("BUSIEST STAGES", "NODE", "BUSY")
    for stage in sorted(run.result.stages, key=lambda stage: -stage.busy)[:_MAX_STAGES]:
        table.add_row(f"{stage.replica} stage {stage.stage}", run.named(stage.node), f"{stage.busy:.0%}")
    return table


def _ways(run: Simulation) -> RenderableType:
    table = new_table("BUSIEST WAYS", "OF", "BUSY", "HIDDEN STATES", "KV")
    for way in sorted(run.result.ways, key=lambda way: -way.busy)[:_MAX_STAGES]:
        shown = way.kind.replace("nic_", "network card, ")
        table.add_row(
            shown,
            run.named(way.name),
            f"{way.busy:.1%}",
            show_bytes(way.hidden_bytes),
            show_bytes(way.kv_bytes),
        )
    return table
