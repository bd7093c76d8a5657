"""A draft over a running mesh as the plan that its hosts are sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from hexmesh.plan import Flow, Plan, Replica, Unused
from hexmesh.planner.finish import part_room_blocks, stage_of
from hexmesh.planner.layouts import Layout
from hexmesh.planner.problem import Judged, Problem
from hexmesh.schedule.misfit import too_small, why_unusable
from hexmesh.schedule.room import Place, room_blocks
from hexmesh.schedule.wish import Wish


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen. Layouts of the draft that stay where they are have a replica of the present plan."""

    problem: Problem
    judged: Judged
    floor_tokens: int
    stays: Mapping[int, Replica]
    """By place in the draft."""

    @property
    def requests_per_s(self) -> float:
        return self.judged.flow.requests_per_s

    @property
    def n_replicas(self) -> int:
        return len(self.served)

    @property
    def served(self) -> list[int]:
        """Places in the draft that requests go through."""
        used = {name for pair in self.judged.flow.flows for name in pair}
        return [at for at in range(len(self.judged.draft)) if f"r{at}" in used]


def write_plan(wish: Wish, choice: Choice, *, model_id: str, model_name: str, reason: str) -> Plan:
    """The plan. What stays keeps its name and its devices; the others are named by their rates."""
    names, devices = _names(choice), _devices(choice)
    replicas = [
        _replica(
            wish, choice, name, choice.judged.draft[at], devices[at], choice.judged.flow.decode[f"r{at}"]
        )
        for at, name in names.items()
    ]
    total = choice.requests_per_s
    flows = [
        Flow(src=names[int(src[1:])], dst=names[int(dst[1:])], share=rate / total)
        for (src, dst), rate in choice.judged.flow.flows.items()
    ]
    ordered = tuple(sorted(replicas, key=lambda one: (len(one.id), one.id)))
    return Plan(
        model_id=model_id,
        model_name=model_name,
        n_layers=wish.spec.n_layers,
        dtype=wish.dtype,
        max_model_tokens=wish.max_model_tokens,
        hosts=dict(wish.hosts),
        replicas=ordered,
        flows=tuple(sorted(flows, key=lambda flow: (flow.src, flow.dst))),
        unused=tuple(_unused(wish, choice, ordered)),
        reason=reason,
    )


def _names(choice: Choice) -> dict[int, str]:
    draft = choice.judged.draft
    names = {at: replica.id for at, replica in choice.stays.items() if at in choice.served}
    free = (name for name in (f"r{n}" for n in count()) if name not in names.values())
    new = sorted(
        (at for at in choice.served if at not in names),
        key=lambda at: (-draft[at].requests_per_s, draft[at].parts[0].pool),
    )
    return names | dict(zip(new, free, strict=False))


def _devices(choice: Choice) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The devices of every stage, by place in the draft: what stays first, then in the order of their indices."""
    free = [list(pool.devices) for pool in choice.problem.pools]
    taken = {}
    for at, replica in choice.stays.items():
        taken[at] = tuple(stage.devices for stage in replica.stages)
        for part, devices in zip(choice.judged.draft[at].parts, taken[at], strict=True):
            free[part.pool] = [index for index in free[part.pool] if index not in devices]
    for at in choice.served:
        if at not in taken:
            taken[at] = tuple(_take(free[part.pool], part.tp) for part in choice.judged.draft[at].parts)
    return taken


def _take(free: list[int], n: int) -> tuple[int, ...]:
    taken = tuple(free[:n])
    del free[:n]
    return taken


def _replica(
    wish: Wish,
    choice: Choice,
    name: str,
    layout: Layout,
    devices: Sequence[tuple[int, ...]],
    requests_per_s: float,
) -> Replica:
    blocks = min(wish.max_blocks, *(part_room_blocks(choice.problem, part) for part in layout.parts))
    return Replica(
        id=name,
        role=layout.role,
        stages=tuple(
            stage_of(choice.problem, part, which, blocks, layout)
            for part, which in zip(layout.parts, devices, strict=True)
        ),
        block_tokens=wish.block_tokens,
        predicted_tokens_per_s=requests_per_s * wish.asked.output_tokens,
        predicted_batch=max(1, int(layout.batch * layout.micro_batches)),
    )


def _unused(wish: Wish, choice: Choice, replicas: Sequence[Replica]) -> Iterator[Unused]:
    used = {
        (stage.node, index) for replica in replicas for stage in replica.stages for index in stage.devices
    }
    usable = {(place.node.id, place.device.index): place for place in wish.places}
    for node in wish.everywhere.nodes:
        for device in node.devices:
            if (node.id, device.index) in used:
                continue
            place = usable.get((node.id, device.index))
            why = why_unusable(node.id, wish.hosts)
            if place is not None:
                why = _why_not_needed(wish, choice, place, {node for node, _ in used})
            yield Unused(node=node.id, device=device.index, reason=why)


def _why_not_needed(wish: Wish, choice: Choice, place: Place, used: set[str]) -> str:
    costs, (rooms,) = wish.costs, room_blocks(wish.costs, [place])
    must, chosen = costs.blocks_of(wish.floors[0]), costs.blocks_of(choice.floor_tokens)
    if rooms.max() < must:
        return too_small(costs, place.device, wish.floors[0])
    if rooms.max() < chosen or must <= rooms[0, -1] < chosen:
        return f"too little memory for sequences of {choice.floor_tokens} tokens, as every replica holds"
    links, here = choice.problem.links, place.node.id
    if here not in used and not any((here, other) in links and (other, here) in links for other in used):
        return "no measured link joins it to the devices in use, both ways"
    return "the replicas are no faster with it: another stage costs as much as it gains"
