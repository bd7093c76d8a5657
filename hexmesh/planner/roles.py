"""The best roles for a fixed partition of the devices: what every search puts its teams through.

A small integer program chooses for each team one role, with the role's best layout, or none. NICs and lines count, so
that hosts with slow wires stay balanced. Missing this step is the largest single loss of a search: 725 instead of 814
requests a second on 320 GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hexmesh.cluster import Role
from hexmesh.planner.layouts import Layout
from hexmesh.planner.master import Bundle, Master
from hexmesh.planner.pools import ROLES, Team
from hexmesh.planner.problem import Draft, Problem

_GAP = 1e-4
_MAX_NODES = 500


def best_roles(problem: Problem, teams: Sequence[Team], *, max_nodes: int = _MAX_NODES) -> Draft:
    """The layouts of the teams that serve most together; teams that help nothing are left out.

    Exact within 1e-4 for these layouts where the program ends by its gap: above some hundred teams it may end by its
    nodes. Links of single pairs that are slower than their NICs are not counted here; the judge counts them.
    """
    options = [(at, layout) for at, team in enumerate(teams) for layout in layouts_of(problem, team)]
    bundles = [Bundle(layouts=(layout,), takes=((at, 1),)) for at, layout in options]
    if not bundles:
        return ()
    master = Master(problem=problem, bundles=bundles, resources=dict.fromkeys(range(len(teams)), 1))
    counts = master.chosen(gap=_GAP, max_nodes=max_nodes)
    if counts is None:
        return by_ratio(problem, teams)
    return tuple(layout for count, (_, layout) in zip(counts, options, strict=True) if count)


def layouts_of(problem: Problem, team: Team) -> list[Layout]:
    """The best one of each role that the team may have."""
    found = [problem.layouts.best(team, role) for role in ROLES if problem.may_be(team, role)]
    return [layout for layout in found if layout is not None]


def by_ratio(problem: Problem, teams: Sequence[Team]) -> Draft:
    """Roles in closed form, as if links were free: the best at decoding decode, one in the middle is mixed; or all."""
    options = [{layout.role: layout for layout in layouts_of(problem, team)} for team in teams]
    ordered = sorted(
        (roles for roles in options if roles),
        key=lambda roles: _rate(roles, "decode") / max(_rate(roles, "prefill"), 1e-30),
    )
    drafts = [tuple(_cut(ordered, cut)) for cut in range(len(ordered) + 1)]
    drafts.append(tuple(roles["mixed"] for roles in ordered if "mixed" in roles))
    return max(drafts, key=_lesser_phase, default=())


def _cut(ordered: Sequence[Mapping[Role, Layout]], cut: int) -> Iterator[Layout]:
    for rank, roles in enumerate(ordered):
        role: Role = "mixed" if rank == cut else "prefill" if rank < cut else "decode"
        if role in roles:
            yield roles[role]


def _rate(roles: Mapping[Role, Layout], role: Role) -> float:
    return roles[role].requests_per_s if role in roles else 0.0


def _lesser_phase(draft: Draft) -> float:
    """Requests per second, a mixed replica doing what is missing."""
    prompts = sum(layout.prefill for layout in draft if layout.role == "prefill")
    outputs = sum(layout.decode for layout in draft if layout.role == "decode")
    both = sum(layout.requests_per_s for layout in draft if layout.role == "mixed")
    return min(prompts, outputs) + both
