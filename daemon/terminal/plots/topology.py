"""Sites, hosts and devices, who holds which layers, how pipelines run and where KV flows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from daemon.terminal.plots.canvas import FAINT, INK, MUTED, PALETTE, PAPER, new_figure
from hexmesh.cluster import Cluster, Node
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.planner.plan_file import PlanFile
from hexmesh.units import show_bit_rate

_DEVICE, _GAP, _TITLE, _MARGIN = 1.0, 0.16, 0.66, 0.42
_WIDE = 4
"""Devices in a row of a host."""
_MOST_LABELLED = 96
"""More devices than this are drawn without words in them."""
_MOST_NAMED = 18
"""Replicas in the legend."""
_SITE_GAP = 2.2

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where everything is drawn."""

    devices: Mapping[tuple[str, int], Point]
    """Centres."""
    hosts: Mapping[str, tuple[float, float, float, float]]
    """x, y, width, height."""
    sites: Mapping[str, tuple[float, float, float, float]]
    width: float
    height: float


def draw_topology(file: PlanFile) -> Figure:
    """The whole fleet with the plan on it."""
    places = _placed(file.cluster)
    inches = min(0.6, 15.0 / places.width, 9.5 / places.height)  # of a unit of the drawing
    handles = _handles(file, colours := _colours(file.plan))
    width = max(7.5, places.width * inches + 0.4)
    columns = min(len(handles), int(width / 2.3))
    below, above = 0.3 + 0.2 * math.ceil(len(handles) / columns), 0.5
    height = places.height * inches + below + above
    figure = new_figure(width, height, is_laid_out=False)
    axes = figure.add_axes((0, below / height, 1, places.height * inches / height))
    spare = (width / inches - places.width) / 2
    axes.set_xlim(-spare, places.width + spare)
    axes.set_ylim(-places.height, 0)
    axes.axis("off")
    points = inches * 72
    _sites(axes, file.cluster, places, points)
    _devices(axes, file, places, colours, points)
    _pipelines(axes, file.plan, places, colours)
    _handoffs(axes, file.plan, places)
    figure.legend(
        handles=handles, loc="lower center", ncols=columns, frameon=False,
        fontsize=7.5, labelcolor=INK,
    )  # fmt: skip
    figure.text(
        0.2 / width, 1 - 0.2 / height, _headline(file), va="top", color=INK, fontsize=10, weight="bold"
    )
    return figure


def _headline(file: PlanFile) -> str:
    figures = file.figures
    served = f"{figures.requests_per_s:.4g} requests/s on {figures.n_devices} devices"
    return f"{file.model}: {served}, {file.gap:.1%} from the bound"


def _colours(plan: Plan) -> dict[str, str]:
    return {replica.id: PALETTE[at % len(PALETTE)] for at, replica in enumerate(plan.replicas)}


def _placed(cluster: Cluster) -> _Places:
    """Sites side by side, hosts of each in a grid."""
    devices = dict[tuple[str, int], Point]()
    hosts, sites = {}, {}
    x, height = 0.0, 0.0
    for site in dict.fromkeys(node.site for node in cluster.nodes):
        nodes = [node for node in cluster.nodes if node.site == site]
        widest, tallest = max(_host_width(node) for node in nodes), max(_host_height(node) for node in nodes)
        columns = max(1, round(math.sqrt(len(nodes) * tallest / widest * _aspect(cluster))))
        rows = math.ceil(len(nodes) / columns)
        columns = math.ceil(len(nodes) / rows)
        top = -_TITLE - _MARGIN / 2
        for row in range(rows):
            inside = nodes[row * columns : (row + 1) * columns]
            tall = max(map(_host_height, inside))
            for at, node in enumerate(inside):
                left = x + _MARGIN + at * (widest + _MARGIN)
                hosts[node.id] = (left, top - tall, widest, tall)
                devices |= _devices_of(node, left, top)
            top -= tall + _MARGIN
        width, tall = _MARGIN + columns * (widest + _MARGIN), -top
        sites[site] = (x, -tall, width, tall)
        x += width + _SITE_GAP
        height = max(height, tall)
    return _Places(devices, hosts, sites, x - _SITE_GAP, height)


def _aspect(cluster: Cluster) -> float:
    """Hosts wide for each tall: one site has the page to itself."""
    return {1: 2.0, 2: 1.0}.get(len({node.site for node in cluster.nodes}), 0.6)


def _host_width(node: Node) -> float:
    n = min(_WIDE, len(node.devices))
    return max(2.3, 2 * _GAP + n * _DEVICE + (n - 1) * _GAP)


def _host_height(node: Node) -> float:
    rows = math.ceil(len(node.devices) / _WIDE)
    return _TITLE + rows * (_DEVICE + _GAP) + _GAP


def _devices_of(node: Node, left: float, top: float) -> dict[tuple[str, int], Point]:
    step, half = _DEVICE + _GAP, _DEVICE / 2
    return {
        (node.id, device.index): (
            left + _GAP + half + (at % _WIDE) * step,
            top - _TITLE - _GAP - half - (at // _WIDE) * step,
        )
        for at, device in enumerate(node.devices)
    }


def _sites(axes: Axes, cluster: Cluster, places: _Places, points: float) -> None:
    for site, box in places.sites.items():
        axes.add_patch(_box(box, FAINT, "none", 0.25))
        at = box[0] + _MARGIN, box[1] + box[3] - 0.26
        axes.text(*at, site, va="top", color=MUTED, fontsize=0.34 * points, weight="bold")
    for (first, a), (second, b) in pairwise(places.sites.items()):
        rates = [line.bytes_per_s for line in cluster.site_links if {line.src, line.dst} == {first, second}]
        if rates:
            x, y = (a[0] + a[2] + b[0]) / 2, -min(a[3], b[3]) / 2
            axes.plot(
                [a[0] + a[2], b[0]], [y, y], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1
            )
            shown = show_bit_rate(min(rates)).replace(" ", "\n")
            axes.text(x, y + 0.15, shown, ha="center", va="bottom", fontsize=0.24 * points, color=MUTED)
    for node in cluster.nodes:
        box = places.hosts[node.id]
        axes.add_patch(_box(box, PAPER, MUTED, 0.12))
        kinds = ", ".join(dict.fromkeys(device.name or device.kind for device in node.devices))
        y = box[1] + box[3]
        most = int(box[2] / 0.17)  # letters that fit
        axes.text(
            box[0] + _GAP,
            y - 0.1,
            node.name[:most],
            va="top",
            fontsize=0.26 * points,
            color=INK,
            weight="bold",
        )
        axes.text(
            box[0] + _GAP, y - 0.42, kinds[: int(most * 1.3)], va="top", fontsize=0.2 * points, color=MUTED
        )


def _box(box: tuple[float, float, float, float], face: str, edge: str, rounding: float) -> FancyBboxPatch:
    x, y, width, height = box
    style = f"round,pad=0,rounding_size={rounding}"
    return FancyBboxPatch(
        (x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=0.8, zorder=1
    )


def _devices(axes: Axes, file: PlanFile, places: _Places, colours: Mapping[str, str], points: float) -> None:
    held = {
        (stage.node, device): (replica.id, stage)
        for replica in file.plan.replicas
        for stage in replica.stages
        for device in stage.devices
    }
    half = _DEVICE / 2
    for at, (x, y) in places.devices.items():
        name, stage = held.get(at, (None, None))
        face, edge = (FAINT, MUTED) if name is None else (colours[name], "none")
        hatch = "////" if name is None else None
        axes.add_patch(
            Rectangle((x - half, y - half), _DEVICE, _DEVICE, facecolor=face, edgecolor=edge, hatch=hatch,
                      linewidth=0.3, zorder=2)
        )  # fmt: skip
        if name is not None and stage is not None and len(places.devices) <= _MOST_LABELLED:
            axes.text(x, y, _label(name, stage), ha="center", va="center", fontsize=0.22 * points, color=PAPER,
                      zorder=6, linespacing=1.15)  # fmt: skip


def _label(name: str, stage: Stage) -> str:
    tp = f"\nTP{len(stage.devices)}" if len(stage.devices) > 1 else ""
    return f"{name}\n{stage.start}-{stage.stop - 1}{tp}"


def _pipelines(axes: Axes, plan: Plan, places: _Places, colours: Mapping[str, str]) -> None:
    """Arrows from stage to stage where the host changes."""
    for replica in plan.replicas:
        for a, b in pairwise(replica.stages):
            if a.node != b.node:
                _arrow(axes, _centre(places, a), _centre(places, b), colours[replica.id], 1.4, 0.18, 4)


def _handoffs(axes: Axes, plan: Plan, places: _Places) -> None:
    """KV from replica to replica, as wide as the share of the requests."""
    middles = {replica.id: _heart(places, replica) for replica in plan.replicas}
    for flow in plan.flows:
        if flow.src != flow.dst:
            _arrow(
                axes, middles[flow.src], middles[flow.dst], INK, 0.8 + 9 * flow.share, -0.22, 5, alpha=0.32
            )


def _arrow(
    axes: Axes, a: Point, b: Point, colour: str, width: float, bend: float, order: int, alpha: float = 0.9
) -> None:
    arrow = FancyArrowPatch(
        a, b, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=7 + width, color=colour,
        linewidth=width, alpha=alpha, zorder=order, shrinkA=4, shrinkB=4,
    )  # fmt: skip
    axes.add_patch(arrow)


def _heart(places: _Places, replica: Replica) -> Point:
    """The middle of its stages on the host that holds most of it."""
    layers = Counter[str]()
    for stage in replica.stages:
        layers[stage.node] += stage.n_layers
    ((node, _),) = layers.most_common(1)
    return _middle([_centre(places, stage) for stage in replica.stages if stage.node == node])


def _centre(places: _Places, stage: Stage) -> Point:
    return _middle([places.devices[stage.node, device] for device in stage.devices])


def _middle(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _handles(file: PlanFile, colours: Mapping[str, str]) -> list[Patch | Line2D]:
    rate, handles = file.figures.requests_per_s, list[Patch | Line2D]()
    for replica in file.plan.replicas[:_MOST_NAMED]:
        prompts = rate * sum(flow.share for flow in file.plan.flows if flow.src == replica.id)
        outputs = rate * sum(flow.share for flow in file.plan.flows if flow.dst == replica.id)
        does = ", ".join(
            [f"prompts {prompts:.3g}/s"] * (prompts > 0) + [f"outputs {outputs:.3g}/s"] * (outputs > 0)
        )
        handles.append(Patch(color=colours[replica.id], label=f"{replica.id}: {does}"))
    if len(file.plan.replicas) > _MOST_NAMED:
        handles.append(Patch(color=PAPER, label=f"and {len(file.plan.replicas) - _MOST_NAMED} more replicas"))
    if file.plan.unused:
        handles.append(Patch(facecolor=FAINT, edgecolor=MUTED, hatch="////", label="not used"))
    if any(flow.src != flow.dst for flow in file.plan.flows):
        handles.append(Line2D([], [], color=INK, linewidth=4, alpha=0.32, label="KV handed over, by share"))
    return handles
