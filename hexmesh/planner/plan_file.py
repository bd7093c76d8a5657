"""A plan with all that it was made from and all that was found out about it: what `hexmesh plan` prints and saves.

One JSON document, so that a saved plan can be simulated, compared and asked about without the files it came from.
"""

from __future__ import annotations

import math

import msgspec

from hexmesh.cluster import Cluster
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName, Plan, plan_fault
from hexmesh.planner.explanation import Explanation
from hexmesh.planner.front import Found
from hexmesh.planner.problem import Judged, Problem
from hexmesh.workload import Workload

VERSION = 1
MAX_BYTES = 256 * 2**20


class PlanFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is predicted to do in steady state, at its highest rate."""

    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: float
    """Mean time of a prompt through idle stages; queues are left out."""
    tpot_s: float
    """Mean time per output token after the first."""
    latency_s: float | None
    """Mean of a whole request at the rate asked for, where latency is the objective; else null."""
    price_per_h: float
    """Of all hosts in use; a host without a known price counts as 0."""
    price_per_million_tokens: float | None
    """Prompt and output tokens alike; null where no price is known."""
    n_devices: int
    n_replicas: int


class SearchStep(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was better than all before it."""

    elapsed_s: float
    requests_per_s: float
    value: float
    """What the objective looks at first."""
    by: str


class SearchView(msgspec.Struct, frozen=True, kw_only=True):
    """How the plan was found."""

    algorithm: str
    seed: int
    elapsed_s: float
    n_judged: int
    was_cut_off: bool
    notes: tuple[str, ...]
    trace: tuple[SearchStep, ...]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What one algorithm comes to on the same problem."""

    algorithm: str
    figures: PlanFigures | None
    """null: it found no plan."""
    gap: float
    elapsed_s: float
    n_judged: int
    was_cut_off: bool


class WhatIfView(msgspec.Struct, frozen=True, kw_only=True):
    """What the changes were, and what held before them."""

    changes: tuple[str, ...]
    before: PlanFigures | None
    """null: nothing fitted before."""
    bound_before: float


class PlanFile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document. Figures are SI: seconds, bytes, requests per second."""

    version: int
    model: str
    spec: ModelSpec
    dtype: DtypeName
    objective: str
    workload: Workload
    cluster: Cluster
    plan: Plan
    figures: PlanFigures
    bound_requests_per_s: float
    """No plan of any kind over this cluster serves more, by the same score."""
    bound: float
    """The same in what the objective is about: requests per second, price per hour or seconds of a request."""
    gap: float
    """How far the plan is from that bound, as a share of the greater of the two."""
    search: SearchView
    unmet: tuple[str, ...] = ()
    """What was asked for and cannot be had, with the nearest that can."""
    explanation: Explanation | None = None
    comparison: tuple[Compared, ...] = ()
    """The best first, by the objective."""
    what_if: WhatIfView | None = None


def figures_of(problem: Problem, judged: Judged) -> PlanFigures:
    """What the judged draft does."""
    figures, flow, workload = judged.figures, judged.flow, problem.workload
    layouts = {f"r{at}": layout for at, layout in enumerate(judged.draft)}
    rate = flow.requests_per_s
    tokens_per_h = 3600 * rate * (workload.prompt_tokens + workload.output_tokens)
    return PlanFigures(
        requests_per_s=rate,
        output_tokens_per_s=rate * workload.output_tokens,
        ttft_s=sum(n * layouts[p].prefill_latency_s for (p, _), n in flow.flows.items()) / rate,
        tpot_s=sum(n * layouts[d].tpot_s for (_, d), n in flow.flows.items()) / rate,
        latency_s=figures.latency_s if 0 < figures.latency_s < math.inf else None,
        price_per_h=figures.price_per_h,
        price_per_million_tokens=1e6 * figures.price_per_h / tokens_per_h if figures.price_per_h else None,
        n_devices=figures.n_devices,
        n_replicas=len(judged.draft),
    )


def compared(problem: Problem, found: Found) -> Compared:
    """One row of a comparison."""
    return Compared(
        algorithm=found.algorithm,
        figures=None if found.best is None else figures_of(problem, found.best),
        gap=found.gap,
        elapsed_s=found.elapsed_s,
        n_judged=found.n_judged,
        was_cut_off=found.was_cut_off,
    )


def search_view(found: Found, seed: int) -> SearchView:
    """How it was found, as it is printed."""
    return SearchView(
        algorithm=found.algorithm,
        seed=seed,
        elapsed_s=found.elapsed_s,
        n_judged=found.n_judged,
        was_cut_off=found.was_cut_off,
        notes=found.notes,
        trace=tuple(
            SearchStep(
                elapsed_s=step.elapsed_s, requests_per_s=step.requests_per_s, value=step.value, by=step.by
            )
            for step in found.trace
        ),
    )


def read_plan_file(data: bytes, where: str) -> PlanFile:
    """The plan of a file. Raises InvalidInput for what is none, or of another version."""
    again = "write one with `hexmesh plan --save`"
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{where} is larger than any plan", next_step=again)
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            raise InvalidInput(f"{where} is a plan of version {version}, not {VERSION}", next_step=again)
        file = msgspec.json.decode(data, type=PlanFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{where} is no saved plan: {error}", next_step=again) from None
    if (fault := plan_fault(file.plan)) is not None:
        raise InvalidInput(f"{where}: {fault}", next_step=again)
    return file


class _Version(msgspec.Struct, frozen=True):
    version: int
