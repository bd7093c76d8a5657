"""What the mesh is asked to do: how long prompts and answers are, when requests come, how soon they are wanted.

`Workload` is what plans are made for; the other names describe where its figures come from.
"""

from hexmesh.workload.arrivals import Arrivals, GammaArrivals, PoissonArrivals, TraceArrivals
from hexmesh.workload.classes import CLASSES, class_of
from hexmesh.workload.file import named_workload, read_workload
from hexmesh.workload.lengths import (
    ConstantLengths,
    Lengths,
    LognormalLengths,
    TracedLengths,
    fit_lognormal,
)
from hexmesh.workload.requests import Request, requests
from hexmesh.workload.slo import Slo
from hexmesh.workload.trace import Trace, read_trace
from hexmesh.workload.workload import Workload

__all__ = [
    "CLASSES",
    "Arrivals",
    "ConstantLengths",
    "GammaArrivals",
    "Lengths",
    "LognormalLengths",
    "PoissonArrivals",
    "Request",
    "Slo",
    "Trace",
    "TraceArrivals",
    "TracedLengths",
    "Workload",
    "class_of",
    "fit_lognormal",
    "named_workload",
    "read_trace",
    "read_workload",
    "requests",
]
