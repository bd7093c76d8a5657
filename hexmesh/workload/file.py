"""The workload file: TOML with lengths, arrivals and limits.

class = "HPLD"                 # or [lengths] with type = "constant" or "lognormal"
requests_per_s = 4             # or [arrivals] with type = "poisson" or "gamma"; left out: as many as can be served
max_concurrent_sequences = 64

[slo]
ttft = "2s"
tpot = "80ms"
attainment = 0.95
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hexmesh.errors import InvalidInput
from hexmesh.toml_text import Seconds, fault, read_toml
from hexmesh.workload.arrivals import GammaArrivals, PoissonArrivals
from hexmesh.workload.classes import CLASSES
from hexmesh.workload.lengths import ConstantLengths, LognormalLengths
from hexmesh.workload.slo import Slo
from hexmesh.workload.workload import Workload


class SloTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits, None where there is none."""

    ttft: Seconds | None = None
    tpot: Seconds | None = None
    attainment: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9


class WorkloadFile(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"named": "class"}
):
    """A whole workload file."""

    named: Literal["HPLD", "HPHD", "LPHD", "LPLD"] | None = None
    lengths: ConstantLengths | LognormalLengths | None = None
    requests_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    arrivals: PoissonArrivals | GammaArrivals | None = None
    max_concurrent_sequences: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 32
    slo: SloTable = SloTable()


def read_workload(text: str, where: str = "workload file") -> Workload:
    """The workload of a file's text. Raises InvalidInput, naming file, line, key and next step."""
    file = read_toml(text, WorkloadFile, where)
    if (file.named is None) == (file.lengths is None):
        said = "neither class nor lengths" if file.named is None else "both class and lengths"
        raise fault(text, where, ("class",), said, "give one of the two")
    if file.requests_per_s is not None and file.arrivals is not None:
        raise fault(text, where, ("requests_per_s",), "arrivals has a rate, too", "give one of the two")
    rate = file.requests_per_s
    arrivals = file.arrivals if rate is None else PoissonArrivals(requests_per_s=rate)
    lengths = file.lengths if file.named is None else CLASSES[file.named]
    assert lengths is not None
    return Workload.of(
        lengths,
        arrivals,
        _slo(file.slo, text, where),
        max_concurrent_sequences=file.max_concurrent_sequences,
    )


def named_workload(text: str) -> Workload:
    """A class by name, with a rate if one is wanted: "HPLD" or "HPLD@4/s". Raises InvalidInput."""
    name, at, rate = text.partition("@")
    if name not in CLASSES:
        raise InvalidInput(
            f"no workload class {name!r}", next_step=f"write {', '.join(CLASSES)} or name a file"
        )
    try:
        arrivals = PoissonArrivals(requests_per_s=float(rate.removesuffix("/s"))) if at else None
    except ValueError as error:
        raise InvalidInput(f"{rate!r} is no rate", next_step=f"write such as {name}@4/s") from error
    if arrivals is not None and not 0 < arrivals.requests_per_s <= 1e6:
        raise InvalidInput(f"{rate!r} is no rate", next_step=f"write such as {name}@4/s")
    return Workload.of(CLASSES[name], arrivals)


def _slo(table: SloTable, text: str, where: str) -> Slo:
    for key, limit in (("ttft", table.ttft), ("tpot", table.tpot)):
        if limit == 0.0:
            raise fault(text, where, ("slo", key), "a limit of no time", "leave it out, or give more")
    return Slo(
        ttft_s=None if table.ttft is None else float(table.ttft),
        tpot_s=None if table.tpot is None else float(table.tpot),
        attainment=table.attainment,
    )
