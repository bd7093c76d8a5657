"""Worker processes seen from the daemon: started by a workshop, asked over a socket, lost when they die.

Several requests may be in flight on one worker; replies find them by stage and step. When the process ends,
every call in flight raises Lost with the reason. Importing this module imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, assert_never, cast

import msgspec

from daemon.compute.worker_channel import (
    PACKET_BYTES,
    WORKER_FRAMES,
    WORKSHOP_REPLY,
    KillWorker,
    SpawnWorker,
    WorkerExited,
    WorkerSpawned,
    describe_exit,
)
from hexmesh import native
from hexmesh.errors import Closed, HexmeshError, Internal, InvalidInput, Lost, NotReady, Refused
from hexmesh.plan import DtypeName
from hexmesh.wire.codec import WORKER_REPLIES, WORKER_REQUESTS, WorkerReply, WorkerRequest
from hexmesh.wire.frames import Buffer, FrameDecoder
from hexmesh.wire.worker import (
    DeviceMeasured,
    DropStage,
    LoadStage,
    MeasureDevice,
    NameTensors,
    RunStep,
    StageFailed,
    StageLoaded,
    StepDone,
    StepFailed,
    TensorsNamed,
)

log = logging.getLogger("hexmesh.workers")

_REASON_WITHIN_S = 1.0
_CLOSE_WITHIN_S = 5.0
_KILL_WITHIN_S = 2.0
NO_PAYLOAD = memoryview(b"")
StepCallback = Callable[[StepDone | HexmeshError, memoryview], None]
T = TypeVar("T")
K = TypeVar("K")


class Worker:
    """One worker process. Made by `Workshop.start_worker`, which also ends it."""

    def __init__(self, device: str, pid: int, kill: Callable[[], None]) -> None:
        self.device = device
        self.pid = pid
        self._kill = kill
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._loads: dict[str, asyncio.Future[StageLoaded]] = {}
        self._namings: dict[str, asyncio.Future[TensorsNamed]] = {}
        self._steps: dict[tuple[str, int], StepCallback] = {}
        self._measurements: list[asyncio.Future[DeviceMeasured]] = []
        self._callbacks: list[Callable[[str], None]] = []
        self._failed_callbacks: list[Callable[[str, str], None]] = []
        self._given_reason: str | None = None
        self._ended = asyncio.Event()
        self.closed_reason: str | None = None
        """Why the process is gone; None while it lives."""

    async def load(self, order: LoadStage) -> StageLoaded:
        """Have a stage built. Raises Refused, InvalidInput, NotReady (over budget), Internal or Lost."""
        if order.stage in self._loads:
            raise Internal(f"stage {order.stage} is being loaded already")
        return await self._ask(order, self._loads, order.stage)

    async def name_tensors(self, order: LoadStage) -> list[str]:
        """The checkpoint's tensors that `load` would read. Raises as it does."""
        return (await self._ask(NameTensors(order=order), self._namings, order.stage)).names

    def drop(self, stage: str) -> None:
        """Have a stage forgotten; calls in flight for it raise Closed. No answer is awaited."""
        self._fail_stage(stage, Closed(f"stage {stage} was dropped"))
        if self.closed_reason is None:
            self._send(DropStage(stage=stage))

    def run_step(self, step: RunStep, payload: Buffer, on_end: StepCallback) -> None:
        """Run a step; `on_end` is called once, at the moment its answer comes, with an empty payload from a last stage.

        It gets InvalidInput for a step that cannot be (the stage lives on), Internal when the stage broke, Lost when
        the process did, Closed when the stage was dropped meanwhile. Raises Lost when the process is gone already.
        """
        key = (step.stage, step.step)
        if key in self._steps:
            raise Internal(f"step {step.step} of stage {step.stage} is in flight already")
        self._send(step, payload)
        self._steps[key] = on_end

    async def measure(self, dtype: DtypeName) -> DeviceMeasured:
        """Measure the device for some seconds; steps go on meanwhile and disturb the figures."""
        answer: asyncio.Future[DeviceMeasured] = self._loop.create_future()
        self._measurements.append(answer)
        self._send(MeasureDevice(dtype=dtype))
        return await answer

    def on_closed(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason once the process is gone; at once if it is."""
        if self.closed_reason is not None:
            callback(self.closed_reason)
        else:
            self._callbacks.append(callback)

    def on_stage_failed(self, callback: Callable[[str, str], None]) -> None:
        """Call back with (stage, reason) when a stage broke:

        in a step, or when a waiting one could not load.
        """
        self._failed_callbacks.append(callback)

    async def wait_closed(self) -> str:
        """The reason, once the process is gone."""
        await self._ended.wait()
        assert self.closed_reason is not None
        return self.closed_reason

    def kill(self, reason: str) -> None:
        """End the process at once; calls in flight raise Lost with `reason`."""
        if self.closed_reason is None:
            self._given_reason = self._given_reason or reason
            self._fail_all(Lost(f"worker {self.pid} was killed: {reason}"))
            self._kill()

    def close(self) -> None:
        """Let the process end by itself."""
        self._given_reason = self._given_reason or "closed by the daemon"
        if self._transport is not None:
            self._transport.close()

    async def _ask(
        self,
        request: WorkerRequest,
        pending: dict[K, asyncio.Future[T]],
        key: K,
    ) -> T:
        answer: asyncio.Future[T] = self._loop.create_future()
        pending[key] = answer
        try:
            self._send(request)
            return await answer
        finally:
            if pending.get(key) is answer:
                del pending[key]

    def _send(self, request: WorkerRequest, payload: Buffer = b"") -> None:
        if self.closed_reason is not None or self._transport is None or self._transport.is_closing():
            raise Lost(
                f"worker {self.pid} is gone: {self.closed_reason or self._given_reason or 'socket closed'}"
            )
        self._transport.writelines(WORKER_REQUESTS.frame(request, payload, WORKER_FRAMES))

    def _take(self, reply: WorkerReply, payload: memoryview) -> None:
        match reply:
            case StepDone():
                self._end_step((reply.stage, reply.step), reply, payload)
            case StageLoaded():
                _resolve(self._loads.get(reply.stage), reply)
            case TensorsNamed():
                _resolve(self._namings.get(reply.stage), reply)
            case StageFailed():
                self._stage_failed(reply)
            case StepFailed():
                error = InvalidInput(reply.reason, code="bad_step")
                self._end_step((reply.stage, reply.step), error, NO_PAYLOAD)
            case DeviceMeasured():
                if self._measurements:
                    _resolve(self._measurements.pop(0), reply)
            case _:
                assert_never(reply)

    def _stage_failed(self, reply: StageFailed) -> None:
        error = _error_of(reply)
        if reply.stage in self._namings or reply.stage in self._loads:
            _fail(self._namings.get(reply.stage), error)
            _fail(self._loads.get(reply.stage), error)
            return
        self._fail_stage(reply.stage, error)
        for callback in self._failed_callbacks:
            callback(reply.stage, reply.reason)

    def _fail_stage(self, stage: str, error: HexmeshError) -> None:
        _fail(self._loads.get(stage), error)
        for key in [key for key in self._steps if key[0] == stage]:
            self._end_step(key, error, NO_PAYLOAD)

    def _end_step(self, key: tuple[str, int], answer: StepDone | HexmeshError, payload: memoryview) -> None:
        """Answers that nobody waits for any more are dropped."""
        on_end = self._steps.pop(key, None)
        if on_end is not None:
            on_end(answer, payload)

    def _fail_all(self, error: HexmeshError) -> None:
        for naming in self._namings.values():
            _fail(naming, error)
        for loading in self._loads.values():
            _fail(loading, error)
        for key in list(self._steps):
            self._end_step(key, error, NO_PAYLOAD)
        for measurement in self._measurements:
            _fail(measurement, error)
        self._measurements.clear()

    def _connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def _disconnected(self) -> None:
        """The socket closed.

        How the process ended follows from the workshop, which sees it a moment later.
        """
        self._loop.call_later(_REASON_WITHIN_S, self._process_ended, "its socket closed")

    def _process_ended(self, reason: str) -> None:
        if self.closed_reason is not None:
            return
        self.closed_reason = self._given_reason or reason
        if self._given_reason is None:
            log.error("worker lost pid=%d device=%s reason=%s", self.pid, self.device, reason)
        if self._transport is not None:
            self._transport.abort()
        self._fail_all(Lost(f"worker {self.pid} of device {self.device} is gone: {self.closed_reason}"))
        self._ended.set()
        for callback in self._callbacks:
            callback(self.closed_reason)


class _WorkerConnection(asyncio.BufferedProtocol):
    """Feeds a worker's replies to its Worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._decoder = FrameDecoder(WORKER_FRAMES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's classes, so there is nothing to check here.
        self._worker._connected(cast(asyncio.WriteTransport, transport))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._decoder.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        for frame in self._decoder.advance(nbytes):
            self._worker._take(WORKER_REPLIES.decode(frame.header), frame.payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker._disconnected()


class Workshop:
    """Starts workers, from a process that is started on entering and imports torch in the background.

    `async with Workshop() as workshop`: leaving ends every worker. A workshop process that died is replaced
    on the next start; its workers died with it.
    """

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._decoder = msgspec.msgpack.Decoder(WORKSHOP_REPLY)
        self._starting = asyncio.Lock()
        self._n_started = 0
        self._spawning: dict[int, asyncio.Future[int]] = {}
        self._workers: dict[int, Worker] = {}

    async def __aenter__(self) -> Workshop:
        await self._start_process()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            worker.close()
        try:
            async with asyncio.timeout(_CLOSE_WITHIN_S):
                for worker in workers:
                    await worker.wait_closed()
        except TimeoutError:
            log.warning("workers did not end in %.0f s and are killed", _CLOSE_WITHIN_S)
        finally:
            self._close_control()
            for worker in workers:
                worker._process_ended("closed by the daemon")
        await self._end_process()

    async def start_worker(self, device: str, threads: int, cpu_affinity: tuple[int, ...] | None) -> Worker:
        """A new worker for device "cpu" or "cuda:i". Raises Lost if the workshop dies.

        Callers set a time limit.
        """
        async with self._starting:
            if self._control is None:
                await self._end_process()
                await self._start_process()
        assert self._control is not None
        number = self._n_started
        self._n_started += 1
        order = SpawnWorker(
            worker=number,
            device=device,
            threads=threads,
            cpu_affinity=None if cpu_affinity is None else list(cpu_affinity),
        )
        own, theirs = socket.socketpair()
        spawned: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._spawning[number] = spawned
        try:
            with theirs:
                self._tell(order, theirs)
            pid = await spawned
            kernels = native.describe() if device == "cpu" else "none needed"
            log.info("worker started pid=%d device=%s threads=%d kernels=%r", pid, device, threads, kernels)
            return await self._connect(number, Worker(device, pid, lambda: self._kill(number)), own)
        except BaseException:
            own.close()
            raise
        finally:
            self._spawning.pop(number, None)

    async def _connect(self, number: int, worker: Worker, connection: socket.socket) -> Worker:
        self._workers[number] = worker
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: _WorkerConnection(worker), sock=connection)
        return worker

    def _kill(self, number: int) -> None:
        if number in self._workers and self._control is not None:
            self._tell(KillWorker(worker=number))
            asyncio.get_running_loop().call_later(_KILL_WITHIN_S, self._end_if_hung, number)

    def _end_if_hung(self, number: int) -> None:
        """A workshop that has not ended a worker hangs itself. The kernel ends its workers with it."""
        if number in self._workers and self._process is not None and self._process.returncode is None:
            log.error("the workshop of worker processes hangs and is killed pid=%d", self._process.pid)
            self._process.kill()

    def _tell(self, message: msgspec.Struct, passed: socket.socket | None = None) -> None:
        assert self._control is not None
        fds = [] if passed is None else [passed.fileno()]
        try:
            socket.send_fds(self._control, [msgspec.msgpack.encode(message)], fds)
        except OSError as error:
            raise Lost(f"the workshop of worker processes does not answer: {error}") from error

    async def _start_process(self) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "daemon.compute.workshop",
                    f"--fd={theirs.fileno()}",
                    f"--parent={os.getpid()}",
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env=_environment(),
                )
            except BaseException:
                control.close()
                raise
        self._control = control
        asyncio.get_running_loop().add_reader(control, self._on_readable)

    async def _end_process(self) -> None:
        self._close_control()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_WITHIN_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _close_control(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control)
            control.close()

    def _on_readable(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._process_died()
            return
        message = self._decoder.decode(data)
        match message:
            case WorkerSpawned():
                _resolve(self._spawning.get(message.worker), message.pid)
            case WorkerExited():
                self._worker_exited(message.worker, describe_exit(message.returncode))
            case _:
                assert_never(message)

    def _worker_exited(self, number: int, how: str) -> None:
        _fail(self._spawning.get(number), Lost(f"a new worker ended at once: {how}"))
        worker = self._workers.pop(number, None)
        if worker is not None:
            worker._process_ended(how)

    def _process_died(self) -> None:
        self._close_control()
        log.error("the workshop of worker processes is gone, and its workers with it")
        for spawned in self._spawning.values():
            _fail(spawned, Lost("the workshop of worker processes died"))
        for number in list(self._workers):
            self._worker_exited(number, "the workshop died")


def _environment() -> dict[str, str]:
    """Set before torch is imported: sleeping instead of spinning threads, and no thread pool at import."""
    fixed = {
        "OMP_WAIT_POLICY": "passive",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return {**os.environ, **fixed}


def _error_of(reply: StageFailed) -> HexmeshError:
    match reply.kind:
        case "invalid":
            return InvalidInput(reply.reason, code="bad_stage")
        case "refused":
            return Refused(reply.reason, code="unsupported_model")
        case "no_room":
            return NotReady(reply.reason, code="over_budget")
        case "broken":
            return Internal(reply.reason)
        case _:
            assert_never(reply.kind)


def _resolve(answer: asyncio.Future[T] | None, value: T) -> None:
    """Answers that nobody waits for any more are dropped."""
    if answer is not None and not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[T] | None, error: HexmeshError) -> None:
    if answer is not None and not answer.done():
        answer.set_exception(error)
