"""What an operator may tell the coordinator of plans: what to plan for, or which plan to carry out."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hexmesh.plan import Plan
from hexmesh.workload import Workload


class PlanOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /admin/plan`."""

    objective: Annotated[str, msgspec.Meta(max_length=40)] = "throughput"
    workload: Workload | None = None
    """None: as before."""
    plan: Plan | None = None
    """To be carried out as it is, if it suits the mesh as it is now; None: the mesh searches."""
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] = "operator"
