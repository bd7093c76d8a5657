"""What this host has: CPUs and memory that this process may use, and GPUs as NVML lists them."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hexmesh.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its CUDA index."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """CPUs and memory count what affinity and control groups leave to this process."""

    cpu_name: str
    n_cpus: int
    available_bytes: int
    gpus: tuple[Gpu, ...] = ()
    why_no_gpus: str | None = None

    def has_gpu(self, index: int) -> bool:
        return any(gpu.index == index for gpu in self.gpus)

    def gpu(self, index: int) -> Gpu:
        """The GPU of that index. Raises InvalidInput."""
        for gpu in self.gpus:
            if gpu.index == index:
                return gpu
        raise InvalidInput(f"there is no GPU {index} here")


def take_inventory() -> Inventory:
    """Look at this host. Takes some milliseconds, more where there are GPUs: call it off the event loop."""
    gpus, why_no_gpus = _list_gpus()
    return Inventory(
        cpu_name=_cpu_name(),
        n_cpus=_n_cpus(),
        available_bytes=_available_bytes(),
        gpus=gpus,
        why_no_gpus=why_no_gpus,
    )


def _list_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs in CUDA's order, or why there are none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"NVML says: {error}"
    try:
        visible = _visible_indices(os.environ.get("CUDA_VISIBLE_DEVICES"), pynvml.nvmlDeviceGetCount())
        gpus = []
        for index, physical_index in enumerate(visible):
            handle = pynvml.nvmlDeviceGetHandleByIndex(physical_index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(
                Gpu(index, str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))
            )
        return tuple(gpus), None if gpus else "no GPU is visible"
    except pynvml.NVMLError as error:
        return (), f"NVML says: {error}"
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _visible_indices(variable: str | None, n_gpus: int) -> list[int]:
    """Physical indices in the order in which CUDA counts them, if CUDA_DEVICE_ORDER is PCI_BUS_ID.

    CUDA ends the list at the first entry that names no GPU. UUIDs are not looked up: those GPUs are left out.
    """
    if variable is None:
        return list(range(n_gpus))
    visible: list[int] = []
    for entry in variable.split(","):
        if not entry.strip().isdigit() or int(entry) >= n_gpus:
            break
        visible.append(int(entry))
    return visible


def _cpu_name() -> str:
    with suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match is not None:
            return match.group(1).strip()
    return platform.processor() or platform.machine() or "cpu"


def _n_cpus() -> int:
    """CPUs of the affinity mask, or the control group's quota if that is less."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_fields(_cgroup_folder() / "cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        n_cpus = min(n_cpus, max(1, int(quota[0]) // int(quota[1])))
    return n_cpus


def _available_bytes() -> int:
    """Memory that can be had without swapping: the kernel's estimate, or what the control group leaves."""
    available_bytes = _mem_available_bytes()
    folder = _cgroup_folder()
    limit, used = _read_fields(folder / "memory.max"), _read_fields(folder / "memory.current")
    if limit and limit[0].isdigit() and used and used[0].isdigit():
        available_bytes = min(available_bytes, max(0, int(limit[0]) - int(used[0])))
    return available_bytes


def _mem_available_bytes() -> int:
    with suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match is not None:
            return int(match.group(1)) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_folder() -> Path:
    """The folder of this process's version 2 control group; one that does not exist where there is none."""
    for line in _read_lines(Path("/proc/self/cgroup")):
        if line.startswith("0::"):
            return Path("/sys/fs/cgroup") / line[3:].lstrip("/")
    return Path("/sys/fs/cgroup/none")


def _read_fields(path: Path) -> list[str]:
    return [field for line in _read_lines(path) for field in line.split()]


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
