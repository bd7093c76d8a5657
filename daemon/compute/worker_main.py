"""A worker process: one device's stages, served over one socket until the daemon closes it.

The main thread reads, and runs each step where it read it: handing it to another thread would cost a step more than
reading does. Loads, drops and measurements run in a thread of their own, so that a stage of the next plan loads while
the present one serves. Replies go out from both under a lock.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn, assert_never

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


class _Arrived(NamedTuple):
    """A step to run."""

    request: RunStep
    payload: memoryview


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
    _WorkerLoop(connection, device, order.threads).serve()
    os._exit(0)


class _WorkerLoop:
    """Owns the socket, the device's residents and the queue of orders."""

    def __init__(self, connection: socket.socket, device: Device, threads: int) -> None:
        self._connection = connection
        self._threads = threads
        self._send_lock = threading.Lock()
        self._waiting_lock = threading.Lock()
        self._waiting: dict[str, list[_Arrived]] = {}
        self._released: queue.SimpleQueue[_Arrived] = queue.SimpleQueue()
        self._release_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._loads: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._free_s = 0.0
        """When the last step was answered."""
        self._device = device
        self._residency = Residency(self._device)

    def serve(self) -> None:
        """Take requests until the socket closes. What is not foreseen ends the process: its state cannot be trusted."""
        threading.Thread(target=self._carry_out_orders, name="orders", daemon=True).start()
        try:
            prepare_thread(self._device, self._threads)
            self._take_until_closed()
        except BaseException:
            log.exception("the worker ends itself")
            os._exit(_EXIT_FATAL)

    def _take_until_closed(self) -> None:
        decoder = FrameDecoder(WORKER_FRAMES)
        poller = select.poll()
        for fd in (self._connection.fileno(), self._release_fd):
            poller.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            if self._release_fd in ready:
                os.eventfd_read(self._release_fd)
                self._run_released()
            if self._connection.fileno() in ready:
                if not (n_bytes := self._receive(decoder)):
                    return
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
                self._run_released()
                self._run_step(_Arrived(request, payload))
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

    def _carry_out_orders(self) -> None:
        """The other thread's life."""
        prepare_thread(self._device, self._threads)
        try:
            while True:
                self._loads.get()()
        except BaseException:
            log.exception("the worker ends itself")
            os._exit(_EXIT_FATAL)

    def _run_released(self) -> None:
        while not self._released.empty():
            self._run_step(self._released.get())

    def _run_step(self, arrived: _Arrived) -> None:
        request, payload = arrived
        with self._waiting_lock:
            stage = self._residency.find(request.stage)
            if stage == "waiting" or request.stage in self._waiting:  # never before those that came earlier
                self._waiting.setdefault(request.stage, []).append(arrived)
                return
        if stage is None:
            self._send(
                StepFailed(stage=request.stage, step=request.step, reason="the stage is not in this worker")
            )
            return
        started_s = time.monotonic()
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
                compute_s=time.monotonic() - started_s,
                waited_s=max(0.0, self._free_s - request.sent_s),
                sampled=output.sampled,
                scored=output.scored,
            )
            self._send(done, hidden)
        self._free_s = time.monotonic()

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
        """Have the steps run that waited for a stage: it can run now, or is gone."""
        with self._waiting_lock:
            for arrived in self._waiting.pop(stage, []):
                self._released.put(arrived)
        os.eventfd_write(self._release_fd, 1)

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
        try:
            with self._send_lock:
                n_left = self._connection.sendmsg(parts) - len(parts[0])
                if n_left < 0:
                    self._connection.sendall(memoryview(parts[0])[n_left:])
                    n_left = 0
                if n_left < len(payload):
                    self._connection.sendall(memoryview(payload)[n_left:])
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
