"""Were the C kernels for CPUs built? Without them everything works, and batches on CPUs are several times slower."""

from __future__ import annotations

from collections.abc import Mapping

from daemon.doctor.finding import Finding, passed, warned
from hexmesh.native import MODULES


def check_kernels(built: Mapping[str, str]) -> Finding:
    """`built` names the instruction set that each module of kernels uses here."""
    found = ", ".join(f"{name} {built[name]}" for name in MODULES if name in built)
    missing = [name for name in MODULES if name not in built]
    if missing:
        return warned(
            "kernels",
            f"no C kernels for {' and '.join(missing)}: CPUs compute that by torch, batches far slower"
            + (f" (built: {found})" if found else ""),
            "install a C compiler (gcc) and hexmesh again: pip install -e . in a checkout",
        )
    return passed("kernels", found)
