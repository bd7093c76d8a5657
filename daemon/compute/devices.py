"""The host's devices: what `--device` names, how much memory each may use, and how fast each was measured.

The daemon never imports torch: GPUs are listed through NVML, and measuring is done by each device's worker.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from daemon.compute.inventory import Inventory
from hexmesh.cluster import Device, DeviceKind
from hexmesh.errors import InvalidInput, NotReady
from hexmesh.membership.records import DeviceFacts
from hexmesh.plan import DtypeName
from hexmesh.units import show_bytes, show_flops
from hexmesh.wire.worker import DeviceMeasured

log = logging.getLogger("hexmesh.devices")

CPU_SHARE = 0.8
GPU_SHARE = 0.9
MIN_BUDGET_BYTES = 2**20
FRESH_S = 24 * 3600.0
LOCK_PATIENCE_S = 20.0
_LOCK_POLL_S = 0.02
_CUDA_NAME = re.compile(r"cuda:(\d{1,3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device that this node uses. `torch_name` is what the worker opens: "cpu" or "cuda:N"."""

    index: int
    kind: DeviceKind
    torch_name: str
    name: str
    n_threads: int
    budget_bytes: int


Measure = Callable[[DeviceSpec], Awaitable[DeviceMeasured]]
"""Ask the device's worker to measure; raises HexmeshError when the worker cannot."""


def choose_devices(
    text: str, inventory: Inventory, *, threads: int | None = None, memory_bytes: int | None = None
) -> tuple[DeviceSpec, ...]:
    """The devices that `--device` means: "auto", or names such as "cpu,cpu" or "cuda:0,cuda:1".

    `memory_bytes` is the budget of each device; without it a CPU device gets its share of 80 % of the host's
    available memory and a GPU 90 % of its free memory. `threads` is for each device; without it CPU devices
    share the host's CPUs. Raises InvalidInput.
    """
    names = _auto_names(inventory) if text.strip() == "auto" else _split_names(text, inventory)
    _check_limits(threads, memory_bytes)
    n_cpu_devices = names.count("cpu")
    specs = []
    for index, name in enumerate(names):
        if name == "cpu":
            n_threads = threads or max(1, inventory.n_cpus // n_cpu_devices)
            room_bytes = int(CPU_SHARE * inventory.available_bytes) // n_cpu_devices
            specs.append(_spec(index, "cpu", name, inventory.cpu_name, n_threads, memory_bytes or room_bytes))
        else:
            gpu = inventory.gpu(int(name.partition(":")[2]))
            room_bytes = int(GPU_SHARE * gpu.free_bytes)
            specs.append(_spec(index, "cuda", name, gpu.name, threads or 1, memory_bytes or room_bytes))
    return tuple(specs)


def _check_limits(threads: int | None, memory_bytes: int | None) -> None:
    if threads is not None and threads < 1:
        raise InvalidInput(f"{threads} threads cannot compute anything", next_step="give --threads 1 or more")
    if memory_bytes is not None and memory_bytes < MIN_BUDGET_BYTES:
        raise InvalidInput(
            f"a budget of {show_bytes(memory_bytes)} holds nothing",
            next_step=f"give --memory {show_bytes(MIN_BUDGET_BYTES).replace(' ', '')} or more",
        )


def _spec(
    index: int, kind: DeviceKind, torch_name: str, name: str, n_threads: int, budget_bytes: int
) -> DeviceSpec:
    return DeviceSpec(
        index=index,
        kind=kind,
        torch_name=torch_name,
        name=name,
        n_threads=n_threads,
        budget_bytes=budget_bytes,
    )


def _auto_names(inventory: Inventory) -> list[str]:
    return [f"cuda:{gpu.index}" for gpu in inventory.gpus] or ["cpu"]


def _split_names(text: str, inventory: Inventory) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    valid = ["auto", "cpu", *(f"cuda:{gpu.index}" for gpu in inventory.gpus)]
    for name in names:
        if name == "cpu":
            continue
        match = _CUDA_NAME.fullmatch(name)
        if match is None:
            raise InvalidInput(f"{name!r} in --device {text!r} is no device", next_step=_name_valid(valid))
        if not inventory.has_gpu(int(match.group(1))):
            raise InvalidInput(
                f"there is no {name} here: {inventory.why_no_gpus or f'{len(inventory.gpus)} GPUs found'}",
                next_step=_name_valid(valid),
            )
    repeated = {name for name in names if name != "cpu" and names.count(name) > 1}
    if repeated:
        raise InvalidInput(f"--device {text!r} names {min(repeated)} twice", next_step="name each GPU once")
    return names


def _name_valid(valid: Sequence[str]) -> str:
    return f"valid here: {', '.join(valid)} (several are separated by commas)"


class MeasuredDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement as it is kept in the state folder."""

    measured: DeviceMeasured
    measured_at_unix_s: float


class MeasurementCache:
    """Measurements of earlier runs, in one JSON file. A file that cannot be read counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = self._read()

    def fresh(self, spec: DeviceSpec, dtype: DtypeName, now_unix_s: float) -> MeasuredDevice | None:
        """The measurement of this device, dtype and thread count, if it is less than a day old."""
        entry = self._entries.get(_cache_key(spec, dtype))
        if entry is None or not 0 <= now_unix_s - entry.measured_at_unix_s < FRESH_S:
            return None
        return entry

    def keep(self, spec: DeviceSpec, dtype: DtypeName, entry: MeasuredDevice) -> None:
        """Remember a measurement, and on disk too; where that fails the next start measures again."""
        self._entries[_cache_key(spec, dtype)] = entry
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(self._entries), indent=2))
            draft.replace(self._path)
        except OSError as error:
            log.warning("device measurements not kept file=%s reason=%s", self._path, error)

    def _read(self) -> dict[str, MeasuredDevice]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, MeasuredDevice])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("stored device measurements ignored file=%s reason=%s", self._path, error)
            return {}


def _cache_key(spec: DeviceSpec, dtype: DtypeName) -> str:
    return f"{spec.kind}/{spec.name}/{dtype}/{spec.n_threads}-threads"


async def measure_devices(
    specs: Sequence[DeviceSpec],
    *,
    dtype: DtypeName,
    measure: Measure,
    cache: MeasurementCache,
    now_unix_s: Callable[[], float],
) -> tuple[DeviceFacts, ...]:
    """Every device with its measured figures, one benchmark at a time on this host.

    Devices of one kind, name and thread count are measured once. Raises HexmeshError as `measure` does, and
    NotReady when figures are impossible.
    """
    facts = []
    for spec in specs:
        entry = cache.fresh(spec, dtype, now_unix_s())
        if entry is None:
            async with benchmark_turn():
                measured = await measure(spec)
            entry = MeasuredDevice(measured=_checked(spec, measured), measured_at_unix_s=now_unix_s())
            await asyncio.to_thread(cache.keep, spec, dtype, entry)
            _log_measured(spec, dtype, measured)
        facts.append(_facts(spec, entry))
    return tuple(facts)


def _facts(spec: DeviceSpec, entry: MeasuredDevice) -> DeviceFacts:
    return DeviceFacts(
        device=Device(
            index=spec.index,
            kind=spec.kind,
            name=spec.name,
            budget_bytes=spec.budget_bytes,
            flops_per_s=entry.measured.flops_per_s,
            bytes_per_s=entry.measured.bytes_per_s,
        ),
        n_threads=spec.n_threads,
        flops_spread=entry.measured.flops_spread,
        bytes_spread=entry.measured.bytes_spread,
        measured_at_unix_s=entry.measured_at_unix_s,
    )


def _checked(spec: DeviceSpec, measured: DeviceMeasured) -> DeviceMeasured:
    if not (0 < measured.flops_per_s < math.inf and 0 < measured.bytes_per_s < math.inf):
        raise NotReady(
            f"measuring {spec.torch_name} gave {measured.flops_per_s} FLOP/s and {measured.bytes_per_s} B/s",
            code="device_not_measured",
            next_step="run hexmesh doctor, or leave the device out with --device",
        )
    return measured


def _log_measured(spec: DeviceSpec, dtype: DtypeName, measured: DeviceMeasured) -> None:
    log.info(
        "device measured device=%d name=%r dtype=%s threads=%d rate=%s +-%.0f%% memory=%s/s +-%.0f%%",
        spec.index,
        spec.name,
        dtype,
        spec.n_threads,
        show_flops(measured.flops_per_s),
        100 * measured.flops_spread,
        show_bytes(measured.bytes_per_s),
        100 * measured.bytes_spread,
    )


@asynccontextmanager
async def benchmark_turn(
    *, patience_s: float = LOCK_PATIENCE_S, folder: Path | None = None
) -> AsyncIterator[bool]:
    """Hold this host's turn to measure; yields False when it could not be had within `patience_s`.

    The turn is a lock on a file that all daemons of one user share; the kernel gives it back when a daemon
    dies. Measuring without the turn gives lower figures, which is better than never to measure.
    """
    try:
        lock = _open_lock(folder or _lock_folder())
    except OSError as error:
        log.warning("measuring without this host's benchmark lock reason=%s", error)
        yield False
        return
    try:
        has_turn = await _wait_for_lock(lock, patience_s)
        if not has_turn:
            log.warning("measuring beside another benchmark waited_s=%.0f; figures may be low", patience_s)
        yield has_turn
    finally:
        os.close(lock)


async def _wait_for_lock(lock: int, patience_s: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + patience_s
    while not _try_lock(lock):
        if loop.time() >= deadline_s:
            return False
        await asyncio.sleep(_LOCK_POLL_S)
    return True


def _lock_folder() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())


def _open_lock(folder: Path) -> int:
    path = folder / f"hexmesh-benchmark-{os.getuid()}.lock"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
