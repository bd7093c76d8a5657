"""A plan that was searched for, for people: what it does, how far from the best possible, who holds what, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from daemon.terminal.render import Glyphs
from daemon.terminal.render_tables import new_table
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.planner.explanation import DeviceView, Explanation
from hexmesh.planner.plan_file import Compared, PlanFigures, PlanFile, WhatIfView
from hexmesh.units import show_bytes, show_duration
from hexmesh.workload import Workload

MAX_ROWS = 40
"""Of a table; more are in the JSON."""
_MAX_STAGES = 8


def search_view(file: PlanFile, glyphs: Glyphs, *, is_explained: bool) -> RenderableType:
    """All of it."""
    parts: list[RenderableType] = [*_header(file)]
    if file.what_if is not None:
        parts += [Text(), *_what_if(file.what_if, file)]
    if file.comparison:
        parts += [Text(), _comparison(file.comparison)]
    parts += [Text(), _replicas(file, glyphs)]
    explanation = file.explanation
    if explanation is not None:
        parts += [Text(), Text.assemble(("bottleneck ", "dim"), explanation.bottleneck)]
        parts += _explained(explanation) if is_explained else _unused_line(file, explanation)
    parts += [Text(line, "yellow") for line in file.unmet]
    return Group(*parts)


def _header(file: PlanFile) -> Iterator[Text]:
    figures, search = file.figures, file.search
    n_devices, n_hosts = sum(len(node.devices) for node in file.cluster.nodes), len(file.cluster.nodes)
    yield Text.assemble(
        ("model ", "dim"), (file.model, "bold"), f" in {file.dtype}", ("  on ", "dim"),
        f"{figures.n_devices} of {n_devices} devices in {n_hosts} host{'s' * (n_hosts > 1)}",
        ("  for ", "dim"), _workload(file.workload), ("  objective ", "dim"), file.objective,
    )  # fmt: skip
    yield Text.assemble(
        ("predicted ", "dim"), (f"{figures.requests_per_s:.4g} requests/s", "bold"), _rest(figures)
    )
    cut = ", cut off by time" if search.was_cut_off else ""
    yield Text.assemble(
        ("bound ", "dim"), _bound(file),
        ("  found by ", "dim"), f"{_finder(file)} in {search.elapsed_s:.2g} s{cut}",
    )  # fmt: skip
    yield from (Text(note, "dim") for note in search.notes)


def _bound(file: PlanFile) -> str:
    """What no plan beats, in what the objective is about."""
    match file.objective:
        case "cost":
            return f"no plan for that rate costs less than {file.bound:.4g} an hour, {file.gap:.1%} less than this one"
        case "latency":
            return f"no request takes less than {show_duration(file.bound)}, {file.gap:.1%} less than here"
        case _:
            return f"no plan serves more than {file.bound:.4g} requests/s, this one {file.gap:.1%} less"


def _finder(file: PlanFile) -> str:
    """The algorithm, and inside a portfolio the one that brought the best plan."""
    algorithm, trace = file.search.algorithm, file.search.trace
    by = trace[-1].by if trace else algorithm
    return algorithm if by == algorithm else f"{algorithm} ({by})"


def _workload(workload: Workload) -> str:
    rate = "" if workload.requests_per_s is None else f" at {workload.requests_per_s:g}/s"
    return f"{workload.prompt_tokens} + {workload.output_tokens} tokens{rate}"


def _rest(figures: PlanFigures) -> str:
    facts = [
        f"{figures.output_tokens_per_s:.4g} tokens/s",
        f"first token {show_duration(figures.ttft_s)}",
        f"then {show_duration(figures.tpot_s)} each",
    ]
    if figures.latency_s is not None:
        facts.append(f"{show_duration(figures.latency_s)} a request")
    if figures.price_per_million_tokens is not None:
        facts.append(
            f"{figures.price_per_h:.2f} an hour, {figures.price_per_million_tokens:.3f} a million tokens"
        )
    return "".join(f", {fact}" for fact in facts)


def _what_if(view: WhatIfView, file: PlanFile) -> Iterator[RenderableType]:
    yield Text.assemble(("what if ", "dim"), "; ".join(view.changes))
    if view.before is None:
        yield Text("nothing fitted before")
        return
    table = new_table("", "BEFORE", "AFTER", "DIFFERENCE")
    for name, unit, old, new in _figure_rows(view.before, file.figures):
        table.add_row(name, f"{old:.4g}{unit}", f"{new:.4g}{unit}", _difference(old, new))
    table.add_row("bound", f"{view.bound_before:.4g}/s", f"{file.bound_requests_per_s:.4g}/s", _difference(
        view.bound_before, file.bound_requests_per_s
    ))  # fmt: skip
    yield table


def _figure_rows(old: PlanFigures, new: PlanFigures) -> Iterator[tuple[str, str, float, float]]:
    yield "requests", "/s", old.requests_per_s, new.requests_per_s
    yield "first token", " s", old.ttft_s, new.ttft_s
    yield "each token", " s", old.tpot_s, new.tpot_s
    if old.latency_s is not None and new.latency_s is not None:
        yield "a request", " s", old.latency_s, new.latency_s
    yield "price", "/h", old.price_per_h, new.price_per_h
    yield "devices", "", old.n_devices, new.n_devices
    yield "replicas", "", old.n_replicas, new.n_replicas


def _difference(old: float, new: float) -> str:
    if old == new:
        return "-"
    return f"{new - old:+.4g}" + (f" ({new / old - 1:+.1%})" if old else "")


def _comparison(rows: Iterable[Compared]) -> RenderableType:
    table = new_table(
        "ALGORITHM", "REQUESTS/S", "FIRST TOKEN", "EACH", "PRICE/H", "DEVICES", "FROM BOUND", "TOOK"
    )
    for row in rows:
        took = f"{row.elapsed_s:.2g} s" + (" (cut off)" if row.was_cut_off else "")
        if row.figures is None:
            table.add_row(row.algorithm, "nothing", "-", "-", "-", "-", "-", took)
            continue
        figures = row.figures
        table.add_row(
            row.algorithm, f"{figures.requests_per_s:.4g}", show_duration(figures.ttft_s),
            show_duration(figures.tpot_s), f"{figures.price_per_h:.2f}", str(figures.n_devices),
            f"{row.gap:.1%}", took,
        )  # fmt: skip
    return table


def _replicas(file: PlanFile, glyphs: Glyphs) -> RenderableType:
    """Like replicas in one row."""
    table = new_table("REPLICA", "DOES", "PROMPTS/S", "OUTPUTS/S", "AT ONCE", "STAGES")
    names = {node.id: node.name for node in file.cluster.nodes}
    kinds = {
        (node.id, device.index): device.name or device.kind
        for node in file.cluster.nodes
        for device in node.devices
    }
    groups = defaultdict[object, list[Replica]](list)
    for replica in file.plan.replicas:
        groups[_look(replica, kinds)].append(replica)
    for same in list(groups.values())[:MAX_ROWS]:
        first = same[0]
        prompts, outputs = _rates(file.plan, file.figures.requests_per_s, first.id)
        table.add_row(
            _ids(same), first.role, f"{prompts:.3g}", f"{outputs:.3g}", str(first.predicted_batch),
            _stages(first, names, kinds, glyphs),
        )  # fmt: skip
    if len(groups) > MAX_ROWS:
        table.add_row(f"and {len(groups) - MAX_ROWS} more kinds", "", "", "", "", "-o json has all")
    return table


def _look(replica: Replica, kinds: dict[tuple[str, int], str]) -> object:
    stages = tuple(
        (kinds[stage.node, stage.devices[0]], len(stage.devices), stage.start, stage.stop)
        for stage in replica.stages
    )
    return replica.role, stages, f"{replica.predicted_tokens_per_s:.3g}"


def _ids(same: list[Replica]) -> str:
    shown = ", ".join(replica.id for replica in same[:3])
    return shown if len(same) <= 3 else f"{shown} ... ({len(same)} alike)"


def _rates(plan: Plan, total: float, name: str) -> tuple[float, float]:
    """Prompts and outputs per second at a replica."""
    prompts = sum(flow.share for flow in plan.flows if flow.src == name)
    outputs = sum(flow.share for flow in plan.flows if flow.dst == name)
    return total * prompts, total * outputs


def _stages(
    replica: Replica, names: dict[str, str], kinds: dict[tuple[str, int], str], glyphs: Glyphs
) -> str:
    """In order; more than two like ones of a host that follow each other are counted."""

    def look(stage: Stage) -> tuple[str, str, int]:
        return stage.node, kinds[stage.node, stage.devices[0]], len(stage.devices)

    shown = list[str]()
    for (node, kind, tp), group in groupby(replica.stages, key=look):
        same = list(group)
        device = f"{names[node]}/{kind}"
        if len(same) > 2:
            last = _layers(same[-1], tp)
            shown.append(f"{names[node]}/{len(same)} x {kind}[{_layers(same[0], tp)} ... {last}]")
        else:
            shown += [f"{device}[{_layers(stage, tp)}]" for stage in same]
    more = len(shown) - _MAX_STAGES
    return f" {glyphs.arrow} ".join(shown[:_MAX_STAGES] + [f"{more} more"] * (more > 0))


def _layers(stage: Stage, tp: int) -> str:
    layers = f"{stage.start}-{stage.stop - 1}" if stage.n_layers > 1 else f"{stage.start}"
    return layers + (f" TP{tp}" if tp > 1 else "")


def _unused_line(file: PlanFile, explanation: Explanation) -> Iterator[Text]:
    n = sum(len(one.devices) for one in explanation.unused)
    if n:
        yield Text.assemble(("unused ", "dim"), f"{n} device{'s' if n > 1 else ''}; --explain says why")


def _explained(explanation: Explanation) -> Iterator[RenderableType]:
    if explanation.gains:
        yield from (Text(), Text("A tenth more of it would give the plan as it is:", "bold"))
        table = new_table("GAIN", "OF", "ASK WITH --what-if")
        for gain in explanation.gains:
            table.add_row(f"{gain.gain:+.1%}", gain.what, f'"{gain.what_if}"')
        yield table
    if explanation.limits:
        yield from (Text(), Text("What limits the rate, and how much of it each decides:", "bold"))
        yield from (Text(f"{limit.share:4.0%}  {limit.text}") for limit in explanation.limits)
    yield from (Text(), Text("What each stage needs of its devices, and what they have:", "bold"))
    yield _devices(explanation.devices)
    if explanation.unused:
        yield from (Text(), Text("Not used:", "bold"))
        yield from (
            Text(f"{_place(one.name, one.devices)}: {one.reason}") for one in explanation.unused[:MAX_ROWS]
        )
    for title, lines in (("Why these roles:", explanation.roles), ("Why these cuts:", explanation.cuts)):
        if lines:
            yield from (Text(), Text(title, "bold"), *map(Text, lines))


def _devices(devices: tuple[DeviceView, ...]) -> RenderableType:
    table = new_table(
        "NODE", "DEVICES", "TYPE", "REPLICA", "LAYERS", "WEIGHTS", "KV", "HAS", "FULL", "KV TOKENS"
    )
    for one in devices[:MAX_ROWS]:
        start, stop = one.layers
        table.add_row(
            one.name, _indices(one.devices), one.type, one.replica,
            f"{start}-{stop - 1}" if stop - start > 1 else f"{start}",
            show_bytes(one.weight_bytes), show_bytes(one.kv_bytes), show_bytes(one.room_bytes),
            f"{(one.weight_bytes + one.kv_bytes) / one.room_bytes:.0%}", str(one.kv_tokens),
        )  # fmt: skip
    if len(devices) > MAX_ROWS:
        table.add_row(f"and {len(devices) - MAX_ROWS} more; -o json has all", *[""] * 9)
    return table


def _place(name: str, devices: tuple[int, ...]) -> str:
    return f"{name} device{'s' if len(devices) > 1 else ''} {_indices(devices)}"


def _indices(devices: tuple[int, ...]) -> str:
    if len(devices) > 2 and devices[-1] - devices[0] == len(devices) - 1:
        return f"{devices[0]}-{devices[-1]}"
    return ",".join(map(str, devices))
