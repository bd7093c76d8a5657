"""Were the C kernels built? Without them everything works; batches on CPUs and the planner are many times slower."""

from __future__ import annotations

from collections.abc import Mapping

from daemon.doctor.finding import Finding, passed, warned
from hexmesh.native import MODULES, PLANNING

LOST = {name: "batches on CPUs, which torch computes then, are" for name in MODULES} | {
    PLANNING: "planning is"
}


def check_kernels(built: Mapping[str, str]) -> Finding:
    """`built` names the instruction set that each module of kernels uses here."""
    found = ", ".join(f"{name} {built[name]}" for name in LOST if name in built)
    missing = [name for name in LOST if name not in built]
    if missing:
        lost = " and ".join(dict.fromkeys(LOST[name] for name in missing))
        return warned(
            "kernels",
            f"no C kernels for {' and '.join(missing)}: {lost} far slower"
            + (f" (built: {found})" if found else ""),
            "install a C compiler (gcc) and hexmesh again: pip install -e . in a checkout",
        )
    return passed("kernels", found)
