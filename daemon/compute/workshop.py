"""The workshop: a process that has torch and transformers imported and forks a worker for each request.

`python -m daemon.compute.workshop --fd N --parent PID`. Imports take seconds, a fork milliseconds. It stays single-
threaded and touches no tensor and no device before it forks, so that workers start with neither locks nor
contexts of others.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import select
import signal
import socket
import traceback
from typing import NoReturn, assert_never

import msgspec

from daemon.compute.worker_channel import (
    PACKET_BYTES,
    WORKSHOP_REQUEST,
    WORKSHOP_TITLE,
    KillWorker,
    SpawnWorker,
    WorkerExited,
    WorkerSpawned,
    die_with_parent,
    set_process_title,
)

_PRELOAD = (
    "daemon.compute.worker_main",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.mistral.modeling_mistral",
)
"""The runtime, and the models most likely wanted; others are imported by the worker that loads one."""


def main() -> None:
    """Serve until the daemon closes its end."""
    parser = argparse.ArgumentParser(prog="daemon.compute.workshop")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    set_process_title(WORKSHOP_TITLE)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the daemon's to handle: workers finish their steps
    for module in _PRELOAD:
        importlib.import_module(module)
    gc.freeze()
    Workshop(socket.socket(fileno=options.fd)).serve()


class Workshop:
    """Owns the control socket and the list of living workers."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._decoder = msgspec.msgpack.Decoder(WORKSHOP_REQUEST)
        self._pids: dict[int, int] = {}

    def serve(self) -> None:
        """Fork workers and report their ends. Returns when the daemon is gone.

        Workers then die with this process.
        """
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        while True:
            readable, _, _ = select.select([self._control.fileno(), wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                self._reap()
            if self._control.fileno() in readable and not self._take_request():
                return

    def _take_request(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1)
        except ConnectionError:
            return False
        if not data:
            return False
        request = self._decoder.decode(data)
        match request:
            case SpawnWorker():
                self._spawn(request, socket.socket(fileno=fds[0]))
            case KillWorker():
                if request.worker in self._pids:
                    os.kill(self._pids[request.worker], signal.SIGKILL)
            case _:
                assert_never(request)
        return True

    def _spawn(self, order: SpawnWorker, connection: socket.socket) -> None:
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(order, connection, parent_pid)
        connection.close()
        self._pids[order.worker] = pid
        self._reply(WorkerSpawned(worker=order.worker, pid=pid))

    def _become_worker(self, order: SpawnWorker, connection: socket.socket, parent_pid: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            connection.setblocking(True)
            from daemon.compute.worker_main import run_worker

            run_worker(connection, order, parent_pid)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _reap(self) -> None:
        for worker, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[worker]
                self._reply(WorkerExited(worker=worker, returncode=os.waitstatus_to_exitcode(status)))

    def _reply(self, message: msgspec.Struct) -> None:
        try:
            self._control.send(msgspec.msgpack.encode(message))
        except ConnectionError:
            return  # the daemon is gone: the next read says so


if __name__ == "__main__":
    main()
