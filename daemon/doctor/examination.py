"""All checks in the order in which one fault causes the next, over a view of the world that tests may replace.

What a check imports is imported by it: a missing package is then a finding and not a traceback.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.doctor.driver import Driver, check_driver, look_at_driver
from daemon.doctor.finding import Finding, failed, not_run
from daemon.doctor.kernel_check import check_kernels
from daemon.doctor.packages import (
    Installed,
    Wanted,
    check_packages,
    check_python,
    installed_version,
    read_wanted,
)
from daemon.doctor.torch_probe import LIMIT_S, Torch, check_torch, probe_torch
from hexmesh import native

if TYPE_CHECKING:
    from daemon.compute.inventory import Inventory
    from daemon.config import JoinOptions

_NEEDED_MODULES = (
    "daemon.doctor.state_check",
    "daemon.doctor.ports",
    "daemon.doctor.model_check",
    "daemon.doctor.peer_check",
    "daemon.doctor.reverse",
)


def _take_inventory() -> Inventory:
    from daemon.compute.inventory import take_inventory

    return take_inventory()


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What the checks look at beside files and sockets."""

    python: str = field(default_factory=platform.python_version)
    wanted: Wanted | None = field(default_factory=read_wanted)
    installed: Installed = installed_version
    driver: Callable[[], Driver] = look_at_driver
    torch: Callable[[], Torch] = probe_torch
    kernels: Callable[[], Mapping[str, str]] = native.built
    inventory: Callable[[], Inventory] = _take_inventory
    clock: Callable[[], float] = time.time
    peer_deadline_s: float = 3.0
    """For all that is asked of one peer."""
    user_id: int = field(default_factory=os.getuid)
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    api_key: str | None = field(default_factory=lambda: os.environ.get("HEXMESH_API_KEY"), repr=False)


def examine(options: JoinOptions, world: World) -> list[Finding]:
    """Every check's finding, causes first. Blocks for seconds; every wait in it has a deadline."""
    with_torch = _Later(world.torch)
    findings = [check_python(world.python, world.wanted), check_packages(world.installed, world.wanted)]
    missing = _missing_module()
    rest = _all_else(options, world) if missing is None else [_not_without(missing)]
    findings.extend(_device_findings(options, world, with_torch))
    return [*findings, *rest]


def _all_else(options: JoinOptions, world: World) -> list[Finding]:
    from daemon.doctor.model_check import check_cache, check_memory, check_model
    from daemon.doctor.peer_check import check_clock, check_peers, choose_targets
    from daemon.doctor.peer_probe import probe_all
    from daemon.doctor.ports import check_listen_address, check_ports
    from daemon.doctor.reverse import check_reverse
    from daemon.doctor.state_check import (
        check_certificate,
        check_disk,
        check_state_folder,
        read_stored,
    )
    from daemon.runfile import read_run

    path = options.state_dir
    run = read_run(path)
    folder = check_state_folder(path, world.user_id, run)
    stored, files = read_stored(path)
    targets = choose_targets(options, stored)
    root_der = stored.membership.root_der if stored.membership is not None else None
    answers = probe_all([target.address for target in targets], root_der, world.clock, world.peer_deadline_s)
    now = datetime.fromtimestamp(world.clock(), UTC)
    model, of_model = check_model(options, stored)
    reached = {
        target.node_id for target, answer in zip(targets, answers, strict=True) if answer.root_der is not None
    }
    return [
        folder,
        files,
        check_disk(path, world.free_bytes),
        check_clock(targets, answers),
        check_certificate(path, stored, now),
        check_listen_address(options),
        *check_ports(options, run.pid if run is not None else None),
        of_model,
        check_memory(options, stored, world.inventory(), model),
        check_cache(options, model, world.free_bytes),
        *check_peers(options, stored, targets, answers),
        check_reverse(options, run, reached, world.api_key),
    ]


def _device_findings(options: JoinOptions, world: World, with_torch: _Later) -> Iterator[Finding]:
    try:
        driver = world.driver()
    except ImportError as error:
        yield not_run("driver", f"{error.name} is not installed", "see packages")
        driver = Driver()
    else:
        yield check_driver(driver)
    torch = with_torch.result()
    if torch is None:
        yield failed("torch", "it was not looked at in time", "try again")
    else:
        yield check_torch(torch, driver, options.device)
    yield check_kernels(world.kernels())


def _missing_module() -> str | None:
    for module in _NEEDED_MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return error.name or module
    return None


def _not_without(module: str) -> Finding:
    return not_run("all else", f"the other checks need the package {module}", "mend the packages first")


class _Later:
    """A probe that runs beside the other checks, in a thread that nobody has to wait for."""

    def __init__(self, probe: Callable[[], Torch]) -> None:
        self._told: Torch | None = None
        self._thread = threading.Thread(target=self._run, args=(probe,), daemon=True)
        self._thread.start()

    def result(self) -> Torch | None:
        self._thread.join(LIMIT_S + 2.0)
        return self._told

    def _run(self, probe: Callable[[], Torch]) -> None:
        self._told = probe()
