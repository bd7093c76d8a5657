"""C kernels, one extension module a source file; optional, see setup.py.

Those that compute on CPUs (MODULES) say by `instruction_sets()` which they have kernels for here, best first. `layout`
searches layouts for the planner; without it the same search runs in Python, some hundred times slower.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

MODULES = ("attention", "gemm")
PLANNING = "layout"


def load(name: str) -> ModuleType | None:
    """The extension module, None where it was not built."""
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError:
        return None


def built() -> dict[str, str]:
    """The best instruction set of every module that was built; the planner's has but one."""
    modules = {name: load(name) for name in (*MODULES, PLANNING)}
    return {
        name: "generic" if name == PLANNING else module.instruction_sets()[0]
        for name, module in modules.items()
        if module is not None
    }


def describe() -> str:
    """Which kernels run here, in one line: "attention avx512", or what runs in their place."""
    found = built()
    return ", ".join(f"{name} {found[name]}" if name in found else f"{name} by torch" for name in MODULES)
