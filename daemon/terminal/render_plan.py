"""The plan for people: each device's share, what it needs and has, and why it got that."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from daemon.terminal.render_tables import new_table
from daemon.views import Blocker, PlanDeviceView, PlanView
from hexmesh.units import show_bytes


def plan_view(plan: PlanView) -> RenderableType:
    """Header, one device a row, the planner's own explanation and, where nothing fits, the blocker."""
    parts: list[RenderableType] = [_header(plan)]
    if plan.devices:
        parts += [Text(), _devices(plan.devices)]
        parts += [
            Text(),
            *(Text(f"{_place(device)}: {device.reason}") for device in plan.devices if device.reason),
        ]
    if plan.explanation:
        parts += [Text(), *(Text(line) for line in plan.explanation)]
    if plan.blocker is not None:
        parts += [Text(), *_blocker(plan.blocker)]
    return Group(*parts)


def _header(plan: PlanView) -> Text:
    if plan.plan_id is None:
        return Text.assemble(("model ", "dim"), (plan.model, "bold"), ("  no plan yet", "yellow"))
    line = Text.assemble(("plan ", "dim"), (plan.plan_id, "bold"), ("  model ", "dim"), plan.model)
    if plan.dtype:
        line.append(f" in {plan.dtype}")
    if plan.reason:
        line.append(f"\nmade because {plan.reason}")
    if plan.predicted_tokens_per_s is not None:
        batch = f" with {plan.predicted_batch} sequences together" if plan.predicted_batch is not None else ""
        line.append(f"\npredicted {plan.predicted_tokens_per_s:.1f} tok/s{batch}")
    return line


def _devices(devices: list[PlanDeviceView]) -> RenderableType:
    has_several = len({device.replica for device in devices} - {None}) > 1
    replica = ["REPLICA"] if has_several else []
    table = new_table("NODE", "DEVICE", *replica, "LAYERS", "NEEDS", "HAS", "FULL")
    for device in devices:
        full = f"{device.needed_bytes / device.room_bytes:.0%}" if device.room_bytes else "-"
        table.add_row(
            device.name,
            str(device.device),
            *([device.replica or "-"] if has_several else []),
            _layers(device),
            show_bytes(device.needed_bytes),
            show_bytes(device.room_bytes),
            full,
        )
    return table


def _layers(device: PlanDeviceView) -> str:
    if device.layers is None:
        return "-"
    start, stop = device.layers
    return f"{start}-{stop - 1}" if stop - start > 1 else f"{start}"


def _place(device: PlanDeviceView) -> str:
    return f"{device.name} device {device.device}"


def _blocker(blocker: Blocker) -> list[Text]:
    lines = [Text.assemble(("blocker ", "red"), f"{blocker.message} ({blocker.code})")]
    if blocker.needed_bytes is not None and blocker.room_bytes is not None:
        lines.append(Text(f"needs {show_bytes(blocker.needed_bytes)}, has {show_bytes(blocker.room_bytes)}"))
    lines.append(Text.assemble(("next step ", "dim"), blocker.next_step))
    return lines
