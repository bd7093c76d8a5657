"""Are Python and the packages those that hexmesh asks for? Standard library only, so that a missing package is told."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import hexmesh
from daemon.doctor.finding import Finding, failed, not_run, passed

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*([^;]*)")
_CLAUSE = re.compile(r"\s*(>=|<=|==|!=|<|>)\s*([0-9]+(?:\.[0-9]+)*)\s*")
_SHOWN = 3

Installed = Callable[[str], str | None]
"""The version of a package, None where it is not installed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Version ranges, such as ">=3.11,<3.13", of Python and of each package by name."""

    python: str
    packages: Mapping[str, str]


def read_wanted() -> Wanted | None:
    """What hexmesh asks for: its pyproject.toml in a checkout, else its installed metadata; None without both."""
    path = Path(hexmesh.__file__).parents[1] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        if project["name"] == "hexmesh":
            return Wanted(project["requires-python"], dict(_ranges(project["dependencies"])))
    except (OSError, ValueError, KeyError):
        pass
    try:
        about, lines = metadata.metadata("hexmesh"), metadata.requires("hexmesh") or []
    except metadata.PackageNotFoundError:
        return None
    return Wanted(str(about["Requires-Python"] or ""), dict(_ranges(lines)))


def installed_version(package: str) -> str | None:
    """What importlib.metadata says."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_python(version: str, wanted: Wanted | None) -> Finding:
    if wanted is None:
        return not_run("python", f"{version}; hexmesh's own metadata is missing", "pip install hexmesh")
    if not is_within(version, wanted.python):
        return failed(
            "python",
            f"Python {version} runs hexmesh, which needs {wanted.python}",
            "make the environment anew with another Python (PYTHON=python3.11 make setup)",
        )
    return passed("python", f"{version}, within {wanted.python}")


def check_packages(installed: Installed, wanted: Wanted | None) -> Finding:
    if wanted is None:
        return not_run("packages", "hexmesh's own metadata is missing", "pip install hexmesh")
    wrong = list(_misfits(installed, wanted.packages))
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        names = " ".join(f"'{name}{wanted.packages[name]}'" for name, _ in wrong)
        said = "; ".join(text for _, text in wrong[:_SHOWN])
        return failed("packages", said + more, f"pip install {names}, or make setup in a checkout")
    return passed("packages", f"{len(wanted.packages)} packages, all within hexmesh's ranges")


def is_within(version: str, clauses: str) -> bool:
    """Whether a version's release number satisfies every clause; 2.13.0+cpu counts as 2.13.0."""
    release = _release(version)
    return all(_holds(release, clause) for clause in clauses.split(",") if clause.strip())


def _misfits(installed: Installed, packages: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, clauses in packages.items():
        version = installed(name)
        if version is None:
            yield name, f"{name} is not installed"
        elif not is_within(version, clauses):
            yield name, f"{name} {version} is installed and {clauses} is needed"


def _ranges(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Packages with their clauses; those of extras are left out."""
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is not None and "extra ==" not in line:
            yield match[1], match[2].strip()


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return _numbers(match[0]) if match is not None else ()


def _numbers(text: str) -> tuple[int, ...]:
    """Without trailing zeros: 2.0 and 2 are the same release."""
    numbers = [int(part) for part in text.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _holds(release: tuple[int, ...], clause: str) -> bool:
    match = _CLAUSE.fullmatch(clause)
    if match is None:  # a form that hexmesh's own ranges do not use
        return True
    bound = _numbers(match[2])
    match match[1]:
        case ">=":
            return release >= bound
        case "<=":
            return release <= bound
        case "<":
            return release < bound
        case ">":
            return release > bound
        case "!=":
            return release != bound
        case _:
            return release == bound
