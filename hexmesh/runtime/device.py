"""Devices by name, and what they measure: GEMM rate, sustained memory bandwidth, memory in all."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hexmesh.errors import InvalidInput
from hexmesh.plan import DtypeName

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Device = torch.device
"""For those who may not import torch."""

_WINDOW_S = 0.05
_N_WINDOWS = 5
_WANTED_SPREAD = 0.10
_LIMIT_S = 3.0
_CPU_GEMM_SIDE = 1024
_CUDA_GEMM_SIDE = 8192
_CPU_READ_BYTES = 256 * 2**20
_CUDA_COPY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Rate:
    """A measured rate; the spread is (max - min) / median of the last windows."""

    per_s: float
    spread: float


def pick_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda:i". Raises InvalidInput when this host has none such."""
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise InvalidInput(f"no device {name!r}", next_step='name devices "cpu" or "cuda:0"')
    n_devices = torch.cuda.device_count()
    if int(index) >= n_devices:
        raise InvalidInput(f"no device {name!r}: this host has {n_devices} CUDA devices")
    return torch.device(kind, int(index))


def prepare_thread(device: torch.device, n_threads: int) -> None:
    """Settings that torch keeps for each thread of a process: call it first in every thread that computes."""
    torch.set_num_threads(n_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def is_device_lost(device: torch.device, error: BaseException) -> bool:
    """Whether after this error the process cannot use the device again: a CUDA context never recovers."""
    return device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError)


def measure_flops(device: torch.device, dtype: DtypeName) -> Rate:
    """FLOP/s of a square matrix product."""
    side = _CPU_GEMM_SIDE if device.type == "cpu" else _CUDA_GEMM_SIDE
    left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    return measure_rate(lambda: torch.mm(left, right, out=out), 2.0 * side**3, device)


def measure_bandwidth(device: torch.device) -> Rate:
    """Bytes/s of reading memory that no cache holds (CPU), or of copying it, counted both ways (CUDA)."""
    if device.type == "cpu":
        data = torch.ones(_CPU_READ_BYTES // 4, dtype=torch.float32)
        return measure_rate(lambda: data.sum(), float(data.nbytes), device)
    source = torch.ones(_CUDA_COPY_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return measure_rate(lambda: target.copy_(source), 2.0 * source.nbytes, device)


def measure_rate(action: Callable[[], object], units: float, device: torch.device) -> Rate:
    """Units per second of repeating `action`, in windows until the last ones agree or time is up."""
    action()
    _wait_for(device)
    repeats = max(1, int(_WINDOW_S / max(_time_once(action, 1, device), 1e-9)))
    rates: list[float] = []
    started_s = time.perf_counter()
    while True:
        rates.append(repeats * units / _time_once(action, repeats, device))
        last = rates[-_N_WINDOWS:]
        median = statistics.median(last)
        spread = (max(last) - min(last)) / median
        is_done = len(last) == _N_WINDOWS and spread < _WANTED_SPREAD
        if is_done or (len(rates) > 1 and time.perf_counter() - started_s > _LIMIT_S):
            return Rate(median, spread)


def total_bytes(device: torch.device) -> int:
    """Memory of the device; for the CPU, the smaller of the host's and the control group's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return host_bytes
    return min(host_bytes, int(limit)) if limit.isdecimal() else host_bytes


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")


def _time_once(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    started_s = time.perf_counter()
    for _ in range(repeats):
        action()
    _wait_for(device)
    return time.perf_counter() - started_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
