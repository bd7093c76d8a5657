"""Answers members that ask for the model's manifest, files and tensors: a thread for each connection.

What goes out is read anew each time, so that nothing is held in memory but one chunk a connection. While this node runs
steps of requests, it sends half of the time at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from daemon.models.niceness import be_nice
from daemon.models.tensor_files import TensorSource, read_range
from daemon.peering.bulk import BulkSocket
from hexmesh.errors import HexmeshError
from hexmesh.ids import short
from hexmesh.weights.manifest import CHUNK_BYTES, Chunk, Manifest
from hexmesh.wire.codec import BULK_ANSWERS, BULK_QUESTIONS
from hexmesh.wire.frames import Buffer
from hexmesh.wire.weights import (
    ANSWER_LIMITS,
    QUESTION_LIMITS,
    Blob,
    NotHere,
    WantChunks,
    WantFile,
    WantHoldings,
    WantManifest,
)

log = logging.getLogger("hexmesh.weights")

MAX_CONNECTIONS = 8
"""Served at once; others are told to come back."""
_MAX_TURNED_AWAY = 8
_IDLE_S = 30.0
_RETRY_AFTER_S = 2.0
_PIECE_BYTES = 256 * 1024
_LONGEST_PAUSE_S = 0.5


class WeightServer:
    """Owner of the threads. They end when their connection does, and PeerNetwork ends all of those."""

    def __init__(
        self,
        *,
        model_id: str,
        manifest: Manifest,
        encoded: bytes,
        folder: Path,
        tensors: TensorSource,
        is_busy: Callable[[], bool],
    ) -> None:
        self._model_id = model_id
        self._manifest = manifest
        self._encoded = encoded
        self._folder = folder
        self._tensors = tensors
        self._is_busy = is_busy
        self._n_connections = 0
        self._lock = threading.Lock()
        self.sent_bytes = 0
        """Of tensors, in all."""

    def serve(self, sock: BulkSocket) -> None:
        """Serve a member's connection in a thread of its own, or turn it away."""
        if self._n_connections >= MAX_CONNECTIONS + _MAX_TURNED_AWAY:
            with sock:
                return
        with self._lock:
            self._n_connections += 1
            is_full = self._n_connections > MAX_CONNECTIONS
        threading.Thread(target=self._run, args=(sock, is_full), name="serve-weights", daemon=True).start()

    def _run(self, sock: BulkSocket, is_full: bool) -> None:
        be_nice()
        try:
            with sock:
                sock.prepare(QUESTION_LIMITS, _IDLE_S)
                if is_full:
                    sock.receive()
                    _say(sock, NotHere(reason="too many nodes fetch from here", retry_after_s=_RETRY_AFTER_S))
                    return
                self._answer_until_gone(sock)
        except HexmeshError as error:
            log.debug("bulk connection ended node=%s reason=%s", short(sock.node_id), error.message)
        finally:
            with self._lock:
                self._n_connections -= 1

    def _answer_until_gone(self, sock: BulkSocket) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while True:
            question = BULK_QUESTIONS.decode(sock.receive().header)
            if question.model_id != self._model_id:
                _say(sock, NotHere(reason=f"this node has model {short(self._model_id)}"))
                return
            match question:
                case WantManifest():
                    _say(sock, Blob(), self._encoded)
                case WantFile():
                    self._send_file(sock, question.name)
                case WantHoldings():
                    _say(sock, Blob(), self._holdings())
                case WantChunks():
                    for tensor, index in question.chunks:
                        self._send_chunk(sock, Chunk(tensor, index), buffer)
                case _:
                    assert_never(question)

    def _send_file(self, sock: BulkSocket, name: str) -> None:
        if name not in {file.name for file in self._manifest.files}:
            _say(sock, NotHere(reason="the model has no such file"))
            return
        try:
            data = (self._folder / name).read_bytes()
        except OSError as error:
            _say(sock, NotHere(reason=f"{name} cannot be read: {error.strerror}"))
        else:
            _say(sock, Blob(), data)

    def _holdings(self) -> bytes:
        """A bit for each tensor that is whole here."""
        bits = bytearray(-(-len(self._manifest.tensors) // 8))
        for tensor in range(len(self._manifest.tensors)):
            if self._tensors.find(tensor) is not None:
                bits[tensor // 8] |= 1 << tensor % 8
        return bytes(bits)

    def _send_chunk(self, sock: BulkSocket, chunk: Chunk, buffer: memoryview) -> None:
        found = self._tensors.find(chunk.tensor) if self._manifest.has(chunk) else None
        if found is None:
            _say(sock, NotHere(reason="this tensor is not here"))
            return
        start, stop = self._manifest.tensors[chunk.tensor].chunk_range(chunk.part)
        data = buffer[: stop - start]
        try:
            read_range(found.path, found.start + start, data)
        except OSError as error:
            log.error("weights cannot be read path=%s reason=%s", found.path, error)
            _say(sock, NotHere(reason=f"this tensor cannot be read: {error.strerror}"))
            return
        self._send_gently(sock, BULK_ANSWERS.frame(Blob(), data, ANSWER_LIMITS))
        self.sent_bytes += len(data)

    def _send_gently(self, sock: BulkSocket, parts: list[Buffer]) -> None:
        for part in parts:
            for start in range(0, len(part), _PIECE_BYTES):
                began_s = time.monotonic()
                sock.send([memoryview(part)[start : start + _PIECE_BYTES]])
                if self._is_busy():
                    time.sleep(min(time.monotonic() - began_s, _LONGEST_PAUSE_S))


def _say(sock: BulkSocket, answer: Blob | NotHere, payload: Buffer = b"") -> None:
    sock.send(BULK_ANSWERS.frame(answer, payload, ANSWER_LIMITS))
