"""A worker process: one device's stages, served over one socket until the daemon closes it.

The main thread only reads. Steps run in a thread of their own, in order; loads, drops and measurements in
another, so that a stage of the next plan loads while the present one serves. Replies go out from both under a
lock.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn, assert_never

from daemon.compute.worker_channel import (
    NO_DEVICE_STATUS,
    WORKER_FRAMES,
    WORKER_TITLE,
    SpawnWorker,
    die_with_parent,
    set_process_title,
)
from hexmesh.errors import HexmeshError, InvalidInput, NotReady, Refused
from hexmesh.runtime.device import (
    Device,
    device_name,
    is_device_lost,
    measure_bandwidth,
    measure_flops,
    pick_device,
    prepare_thread,
    total_bytes,
)
from hexmesh.runtime.loading import name_tensors
from hexmesh.runtime.payload import bytes_from, tensor_from
from hexmesh.runtime.residency import Residency
from hexmesh.wire.codec import WORKER_REPLIES, WORKER_REQUESTS, WorkerReply, WorkerRequest
from hexmesh.wire.frames import Buffer, FrameDecoder
from hexmesh.wire.worker import (
    DeviceMeasured,
    DropStage,
    FailureKind,
    LoadStage,
    MeasureDevice,
    NameTensors,
    RunStep,
    StageFailed,
    StepDone,
    StepFailed,
    TensorsNamed,
)

log = logging.getLogger("hexmesh.worker")

_EXIT_FATAL = 70
_JOIN_UP_TO_BYTES = 64 * 1024


def run_worker(connection: socket.socket, order: SpawnWorker, parent_pid: int) -> NoReturn:
    """Be a worker until the daemon closes the socket; for a freshly forked process, which this ends."""
    die_with_parent(parent_pid)
    set_process_title(WORKER_TITLE)
    if order.cpu_affinity is not None:
        os.sched_setaffinity(0, order.cpu_affinity)
    try:
        device = pick_device(order.device)
    except InvalidInput as error:
        log.error("%s", error.one_line())
        os._exit(NO_DEVICE_STATUS)
    _WorkerLoop(connection, device, order.threads).read_forever()
    os._exit(0)


class _WorkerLoop:
    """Owns the socket, the device's residents and the two queues."""

    def __init__(self, connection: socket.socket, device: Device, threads: int) -> None:
        self._connection = connection
        self._threads = threads
        self._send_lock = threading.Lock()
        self._waiting_lock = threading.Lock()
        self._waiting: dict[str, list[tuple[RunStep, memoryview]]] = {}
        self._steps: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._device = device
        self._residency = Residency(self._device)

    def read_forever(self) -> None:
        """Take requests until the socket closes."""
        for name, jobs in (("steps", self._steps), ("loads", self._loads)):
            threading.Thread(target=self._work, args=(jobs,), name=name, daemon=True).start()
        decoder = FrameDecoder(WORKER_FRAMES)
        while n_bytes := self._receive(decoder):
            for frame in decoder.advance(n_bytes):
                self._take(WORKER_REQUESTS.decode(frame.header), frame.payload)

    def _receive(self, decoder: FrameDecoder) -> int:
        try:
            return self._connection.recv_into(decoder.get_buffer())
        except ConnectionError:
            return 0

    def _take(self, request: WorkerRequest, payload: memoryview) -> None:
        match request:
            case RunStep():
                self._steps.put(lambda: self._run_step(request, payload))
            case LoadStage():
                self._loads.put(lambda: self._load(request))
            case NameTensors():
                self._loads.put(lambda: self._name_tensors(request.order))
            case DropStage():
                self._loads.put(lambda: self._drop(request.stage))
            case MeasureDevice():
                self._loads.put(lambda: self._measure(request))
            case _:
                assert_never(request)

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
        """A thread's life. What a job does not foresee ends the process: its state cannot be trusted."""
        prepare_thread(self._device, self._threads)
        try:
            while True:
                jobs.get()()
        except BaseException:
            log.exception("the worker ends itself")
            os._exit(_EXIT_FATAL)

    def _run_step(self, request: RunStep, payload: memoryview) -> None:
        with self._waiting_lock:
            stage = self._residency.find(request.stage)
            if stage == "waiting":
                self._waiting.setdefault(request.stage, []).append((request, payload))
                return
        if stage is None:
            self._send(
                StepFailed(stage=request.stage, step=request.step, reason="the stage is not in this worker")
            )
            return
        started_s = time.perf_counter()
        try:
            output = stage.run(request.rows, tensor_from(payload, stage))
            hidden = bytes_from(output)
        except InvalidInput as error:
            self._send(StepFailed(stage=request.stage, step=request.step, reason=error.message))
        except Exception as error:  # the process's edge: whatever a model's code raises
            self._fail_step(request.stage, error)
        else:
            done = StepDone(
                stage=request.stage,
                step=request.step,
                compute_s=time.perf_counter() - started_s,
                sampled=output.sampled,
                scored=output.scored,
            )
            self._send(done, hidden)

    def _fail_step(self, stage: str, error: Exception) -> None:
        log.error("step failed stage=%s", stage, exc_info=error)
        self._send(StageFailed(stage=stage, reason=f"a step failed: {type(error).__name__}: {error}"))
        if is_device_lost(self._device, error):
            raise error
        self._loads.put(lambda: self._drop(stage))

    def _load(self, order: LoadStage) -> None:
        self._answer_order(order, lambda: self._residency.load(order))

    def _name_tensors(self, order: LoadStage) -> None:
        self._answer_order(
            order, lambda: TensorsNamed(stage=order.stage, names=name_tensors(order, self._device))
        )

    def _answer_order(self, order: LoadStage, answer: Callable[[], WorkerReply]) -> None:
        try:
            reply = answer()
        except HexmeshError as error:
            reply = StageFailed(stage=order.stage, reason=error.one_line(), kind=_kind_of(error))
        except Exception as error:  # the process's edge: whatever a model's code raises
            log.exception("load failed stage=%s", order.stage)
            reply = StageFailed(stage=order.stage, reason=f"{type(error).__name__}: {error}")
        self._send(reply)

    def _drop(self, stage: str) -> None:
        promotions = self._residency.drop(stage)
        self._release(stage)
        for promotion in promotions:
            if promotion.error is not None:
                reason = promotion.error.one_line()
                self._send(StageFailed(stage=promotion.stage, reason=reason, kind=_kind_of(promotion.error)))
            self._release(promotion.stage)

    def _release(self, stage: str) -> None:
        """Queue the steps that waited for a stage: it can run now, or is gone."""
        with self._waiting_lock:
            waiting = self._waiting.pop(stage, [])
        for request, payload in waiting:
            self._take(request, payload)

    def _measure(self, request: MeasureDevice) -> None:
        flops = measure_flops(self._device, request.dtype)
        bandwidth = measure_bandwidth(self._device)
        self._send(
            DeviceMeasured(
                flops_per_s=flops.per_s,
                flops_spread=flops.spread,
                bytes_per_s=bandwidth.per_s,
                bytes_spread=bandwidth.spread,
                total_bytes=total_bytes(self._device),
                name=device_name(self._device),
            )
        )

    def _send(self, reply: WorkerReply, payload: Buffer = b"") -> None:
        parts = WORKER_REPLIES.frame(reply, payload, WORKER_FRAMES)
        if sum(len(part) for part in parts) <= _JOIN_UP_TO_BYTES:
            parts = [b"".join(parts)]
        try:
            with self._send_lock:
                for part in parts:
                    self._connection.sendall(part)
        except ConnectionError:
            os._exit(0)  # the daemon is gone


def _kind_of(error: HexmeshError) -> FailureKind:
    match error:
        case InvalidInput():
            return "invalid"
        case Refused():
            return "refused"
        case NotReady():
            return "no_room"
        case _:
            return "broken"
