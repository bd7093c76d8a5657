"""This host's devices at work: one worker process each, measured once, replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from daemon.compute.devices import DeviceSpec, MeasurementCache, measure_devices
from daemon.compute.workers import Worker, Workshop
from hexmesh.errors import HexmeshError, Lost, TimedOut
from hexmesh.membership.records import DeviceFacts
from hexmesh.plan import DtypeName
from hexmesh.wire.worker import DeviceMeasured

log = logging.getLogger("hexmesh.devices")

START_PATIENCE_S = 120.0
"""Includes the first import of torch, which a busy machine stretches."""
MEASURE_PATIENCE_S = 60.0
RESTART_PAUSE_S = 0.5


class HostDevices:
    """Owner of the workers. `start` before anything else; its tasks run in the group that it is given."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        *,
        workshop: Workshop,
        group: asyncio.TaskGroup,
        cpu_affinity: tuple[int, ...] | None,
        on_worker_died: Callable[[Worker, str], None],
        on_stage_failed: Callable[[str, str], None],
    ) -> None:
        self.specs = tuple(specs)
        self._workshop = workshop
        self._group = group
        self._cpu_affinity = cpu_affinity
        self._on_worker_died = on_worker_died
        self._on_stage_failed = on_stage_failed
        self._workers: dict[int, Worker] = {}
        self._came = asyncio.Event()
        self._is_closing = False

    def close(self) -> None:
        """Workers that end from now on are not replaced."""
        self._is_closing = True

    async def start(self) -> None:
        """Start a worker for each device. Raises Lost or TimedOut when one does not come up."""
        for spec in self.specs:
            await self._start(spec)

    async def worker(self, index: int) -> Worker:
        """The device's worker, once it lives. Raises Lost when none comes up in time."""
        try:
            async with asyncio.timeout(START_PATIENCE_S):
                while index not in self._workers:
                    await self._came.wait()
        except TimeoutError:
            raise Lost(f"device {index} has had no worker for {START_PATIENCE_S:.0f} s") from None
        return self._workers[index]

    def budgets(self) -> dict[int, int]:
        """Bytes that each device's worker may hold."""
        return {spec.index: spec.budget_bytes for spec in self.specs}

    async def measure(self, dtype: DtypeName, cache: MeasurementCache) -> tuple[DeviceFacts, ...]:
        """Every device with measured speed. Raises HexmeshError."""

        async def ask(spec: DeviceSpec) -> DeviceMeasured:
            worker = await self.worker(spec.index)
            async with _deadline(MEASURE_PATIENCE_S, f"measuring device {spec.index}"):
                return await worker.measure(dtype)

        return await measure_devices(self.specs, dtype=dtype, measure=ask, cache=cache, now_unix_s=time.time)

    async def _start(self, spec: DeviceSpec) -> None:
        async with _deadline(START_PATIENCE_S, f"starting the worker of device {spec.index}"):
            worker = await self._workshop.start_worker(spec.torch_name, spec.n_threads, self._cpu_affinity)
        self._workers[spec.index] = worker
        came, self._came = self._came, asyncio.Event()
        came.set()
        log.info("worker started device=%d pid=%d", spec.index, worker.pid)
        worker.on_stage_failed(self._on_stage_failed)
        worker.on_closed(lambda reason: self._died(spec, worker, reason))

    def _died(self, spec: DeviceSpec, worker: Worker, reason: str) -> None:
        if self._is_closing or self._workers.get(spec.index) is not worker:
            return
        del self._workers[spec.index]
        self._on_worker_died(worker, f"the worker of device {spec.index} died: {reason}")
        self._group.create_task(self._restart(spec), name=f"restart-device-{spec.index}")

    async def _restart(self, spec: DeviceSpec) -> None:
        while spec.index not in self._workers:
            try:
                await self._start(spec)
            except HexmeshError as error:
                log.warning("worker not started device=%d reason=%s", spec.index, error)
                await asyncio.sleep(RESTART_PAUSE_S)


@asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Raise TimedOut, naming what took too long."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimedOut(
            f"{what} took longer than {seconds:.0f} s",
            code="device_too_slow",
            next_step="look at the machine's load, or leave the device out with --device",
        ) from None
