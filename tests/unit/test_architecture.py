"""The import picture of the design: who may import whom, and who may import what from outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import daemon

ROOT = Path(__file__).resolve().parents[2]

# What each part of hexmesh/ may import from hexmesh/. A part may always import itself.
FOUNDATION = {"ids", "units", "errors"}
FACTS = FOUNDATION | {"cluster", "model_spec", "workload", "metrics", "identity", "architectures"}
MAY_IMPORT: dict[str, set[str]] = {
    "ids": set(),
    "errors": set(),
    "units": {"errors"},
    "cluster": FOUNDATION,
    "model_spec": FOUNDATION,
    "workload": FOUNDATION | {"toml_text"},
    "metrics": FOUNDATION,
    "architectures": FOUNDATION,
    "identity": FOUNDATION,
    "weights": FOUNDATION,
    "toml_text": FOUNDATION,
    "catalogue": FOUNDATION | {"cluster"},
    "plan": FACTS,
    "roofline": FACTS | {"plan"},
    "fleet": FACTS | {"plan", "catalogue", "toml_text"},
    "score": FACTS | {"plan", "cost", "roofline"},
    "calibration": FACTS | {"plan", "cost"},
    "papers": FACTS | {"plan"},
    "cost": FACTS | {"plan"},
    "serving": FACTS | {"plan", "wire"},
    "wire": FACTS | {"plan"},
    "planner": FACTS | {"plan", "cost", "roofline", "score", "papers", "native", "sim"},
    "sim": FACTS | {"plan", "cost", "roofline", "score", "serving", "wire"},
    "schedule": FACTS | {"plan", "cost", "roofline", "score", "planner"},
    "native": FOUNDATION,
    "runtime": FACTS | {"plan", "serving", "wire", "native"},
    "membership": FACTS | {"wire", "calibration"},
}
SOCKETS_CLOCKS_AND_TASKS = {
    "asyncio",
    "socket",
    "aiohttp",
    "uvloop",
    "subprocess",
    "threading",
    "multiprocessing",
}
TORCH = {"torch", "transformers", "safetensors"}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, wherever in the file, type checking included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.level == 0 and node.module else "")
            if node.module == "hexmesh":
                names.update(f"hexmesh.{alias.name}" for alias in node.names)
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "hexmesh").parts[0].removesuffix(".py")


def test_each_part_of_hexmesh_imports_only_what_lies_below_it() -> None:
    wrong = []
    for path in python_files("hexmesh"):
        part = part_of(path)
        if part == "__init__":
            continue
        for name in imported_modules(path):
            if name.startswith("hexmesh.") and (below := name.split(".")[1]) not in MAY_IMPORT[part] | {part}:
                wrong.append(f"{path.relative_to(ROOT)} imports hexmesh.{below}")
    assert wrong == []


def test_every_part_of_hexmesh_has_its_place_in_the_picture() -> None:
    assert {part_of(path) for path in python_files("hexmesh")} - {"__init__"} == set(MAY_IMPORT)


def test_hexmesh_imports_no_shell() -> None:
    wrong = [
        str(path)
        for path in python_files("hexmesh")
        if roots(path) & {"daemon", "bootstrap", "tools", "tests"}
    ]
    assert wrong == []


BOOTSTRAP_MAY_IMPORT = {
    *("announcing", "config", "courier", "link_views", "reachability", "runfile", "service_group", "views"),
    *("peering", "discovery", "trust", "web"),
}
"""What a member does that serves no model; nothing of plans, stages, devices and requests."""


def test_bootstrap_shares_with_the_daemon_what_makes_a_member_and_nothing_that_serves() -> None:
    used = {
        name.split(".")[1]
        for path in python_files("bootstrap")
        for name in imported_modules(path)
        if name.startswith("daemon.")
    }
    assert used == BOOTSTRAP_MAY_IMPORT


def test_only_its_verb_starts_bootstrap() -> None:
    users = [str(path.relative_to(ROOT)) for path in python_files("daemon") if "bootstrap" in roots(path)]
    assert users == ["daemon/verbs/bootstrap.py"]


def test_starting_bootstrap_loads_no_torch_and_nothing_that_serves() -> None:
    code = (
        "import sys, bootstrap.node\n"
        "print(sorted({'torch', 'transformers', 'hivemind', 'hexmesh.runtime', 'hexmesh.schedule',"
        " 'daemon.node', 'daemon.compute'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_hexmesh_has_no_sockets_clocks_environment_or_tasks() -> None:
    wrong = []
    for path in python_files("hexmesh"):
        found = roots(path) & SOCKETS_CLOCKS_AND_TASKS
        if part_of(path) != "runtime":  # measures devices, so it may read a clock
            found |= roots(path) & {"time", "os"}
        if found:
            wrong.append(f"{path.relative_to(ROOT)}: {sorted(found)}")
    assert wrong == []


def test_only_the_runtime_imports_torch_and_transformers() -> None:
    for folder in ("hexmesh", "daemon", "bootstrap"):
        for path in python_files(folder):
            if folder == "hexmesh" and part_of(path) == "runtime":
                continue
            assert not roots(path) & TORCH, path


def test_only_the_dht_module_imports_hivemind() -> None:
    users = [
        str(path.relative_to(ROOT))
        for folder in ("hexmesh", "daemon", "bootstrap", "tools")
        for path in python_files(folder)
        if "hivemind" in roots(path)
    ]
    assert users == ["daemon/discovery/dht_node.py"]


def test_nothing_uses_pickle() -> None:
    for folder in ("hexmesh", "daemon", "bootstrap", "tools"):
        for path in python_files(folder):
            assert not roots(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path


def test_importing_hexmesh_loads_nothing_heavy() -> None:
    code = (
        "import pkgutil, importlib, sys, hexmesh\n"
        "for m in pkgutil.walk_packages(hexmesh.__path__, 'hexmesh.'):\n"
        "    if not m.name.startswith('hexmesh.runtime'):\n"
        "        importlib.import_module(m.name)\n"
        "print(sorted({'torch', 'transformers', 'hivemind', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_the_daemon_package_is_ours() -> None:
    assert daemon.__file__ is not None
    assert Path(daemon.__file__).parent == ROOT / "daemon"
