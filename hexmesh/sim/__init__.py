"""A plan at work in virtual time: what requests meet, stage by stage and link by link."""

from hexmesh.sim.result import (
    HandoffUse,
    Point,
    ReplicaUse,
    SimResult,
    Spread,
    StageUse,
    WayUse,
)
from hexmesh.sim.simulate import Failure, n_to_settle, simulate

__all__ = [
    "Failure",
    "HandoffUse",
    "Point",
    "ReplicaUse",
    "SimResult",
    "Spread",
    "StageUse",
    "WayUse",
    "n_to_settle",
    "simulate",
]
