"""One TLS connection that carries frames, driven by the event loop's readiness callbacks.

The socket is read and written directly, with no stream layer in between, so that a large payload is decrypted
straight into the memory that its receiver keeps. A callback moves a bounded number of bytes and then lets the
loop go on with others.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from hexmesh.errors import InvalidInput
from hexmesh.wire.frames import Buffer, Frame, FrameDecoder, FrameLimits, size_bytes

LossKind = Literal["eof", "reset", "tls", "protocol", "refused", "timeout", "closed"]

_READ_TURN_BYTES = 1024 * 1024
_WRITE_TURN_BYTES = 1024 * 1024
_JOINED_BYTES = 64 * 1024
"""A small frame is written as a whole, for its receiver would wake for each part."""
_LINGER_S = 1.0
_KEEPALIVE_IDLE_S = 2
_KEEPALIVE_INTERVAL_S = 1
_KEEPALIVE_PROBES = 3
_USER_TIMEOUT_MS = 5000


class Loss(NamedTuple):
    """Why a connection ended."""

    kind: LossKind
    message: str

    @property
    def is_peers_doing(self) -> bool:
        """The other side, or the network, ended it: its process may be gone."""
        return self.kind in ("eof", "reset")


CLOSED_HERE = Loss("closed", "closed by this node")


class ConnectionOwner(Protocol):
    """Who is told what happens on a connection. InvalidInput raised by `on_frame` closes the connection."""

    def on_open(self, connection: FrameConnection) -> None:
        """The handshake is done and the peer's certificate holds under the root."""

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None: ...

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        """Called once, also after `close`."""


def prepare_socket(sock: socket.socket) -> None:
    """Non-blocking, no delay for small messages, and a dead network noticed within seconds."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", _USER_TIMEOUT_MS),
    ):
        if hasattr(socket, name):  # Linux has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class FrameConnection:
    """Owns the socket. Made inside a running loop from a connected socket; starts its handshake at once.

    Raises OSError, and closes the socket, when the peer has hung up before that.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        owner: ConnectionOwner,
        limits: FrameLimits,
        *,
        is_server: bool,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._decoder = FrameDecoder(limits)
        self._state: Literal["handshake", "open", "lingering", "detached", "closed"] = "handshake"
        self._unsent: deque[memoryview] = deque()
        self._pull: Callable[[], list[Buffer]] | None = None
        self._is_flush_due = False
        self._is_writer_on = False
        self._is_closing = False
        self._socket = context.wrap_socket(sock, server_side=is_server, do_handshake_on_connect=False)
        self._fd = self._socket.fileno()
        self._loop.add_reader(self._fd, self._on_readable)
        self._loop.call_soon(self._shake_hands)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def peer_certificate(self) -> bytes | None:
        """The peer's own certificate (DER), verified under the root; None if it showed none."""
        return self._socket.getpeercert(binary_form=True)

    def allow(self, limits: FrameLimits) -> None:
        """Take frames up to these limits from now on."""
        self._decoder.limits = limits

    def feed_from(self, pull: Callable[[], list[Buffer]]) -> None:
        """Ask `pull` for more to write whenever everything is written; `wake` after it ran empty."""
        self._pull = pull
        self.wake()

    def stop_feeding(self) -> None:
        """Ask nobody for more; what was taken already is still written."""
        self._pull = None

    def write(self, parts: list[Buffer]) -> None:
        """Queue one frame. The buffers must not change until they are written."""
        self._unsent.extend(memoryview(part).cast("B") for part in parts)
        self.wake()

    def wake(self) -> None:
        """There is something to write."""
        if self._state == "open" and not self._is_flush_due and not self._is_writer_on:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def write_now(self, parts: list[Buffer]) -> bool:
        """Write one frame without waiting for the loop's next turn; False, and nothing done, where others come first.

        The owner hears of a loss in that turn all the same, not within this call.
        """
        if self._state != "open" or self._is_flush_due or self._is_writer_on or self._unsent:
            return False
        if len(parts) > 1 and sum(size_bytes(part) for part in parts) <= _JOINED_BYTES:
            parts = [b"".join(parts)]
        self._unsent.extend(memoryview(part).cast("B") for part in parts)
        self._flush()
        return True

    def detach(self) -> tuple[ssl.SSLSocket, list[memoryview], bytes]:
        """Give the open connection away: its socket, what is still to be written, and what was received after the
        frame that is handed out now, if one is. The owner hears no more of it.
        """
        assert self._state == "open"
        received = self._decoder.rest()
        self._state = "closed"
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        unsent = list(self._unsent)
        self._unsent.clear()
        self._pull = None
        return self._socket, unsent, received

    def close_when_sent(self) -> None:
        """Send what is queued, then say end-of-file and close; `on_lost` follows within a second or so."""
        self._is_closing = True
        self._loop.call_later(_LINGER_S, self.close)
        self.wake()

    def end_frames(self) -> tuple[ssl.SSLSocket, bytes]:
        """The socket, and what was received after the last frame: no frames follow. The owner hears no more.

        To be called while nothing waits to be written. Raises InvalidInput in the middle of a frame.
        """
        assert self._state == "open"
        assert not self._unsent
        received = self._decoder.rest()
        self._state = "detached"
        self._loop.remove_reader(self._fd)
        self._want_writer(None)
        return self._socket, received

    def close(self, loss: Loss = CLOSED_HERE) -> None:
        """Close now and tell the owner why, unless it was told before."""
        if self._state in ("closed", "detached"):
            return
        self._state = "closed"
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        self._unsent.clear()
        self._pull = None
        self._owner.on_lost(self, loss)

    def _shake_hands(self) -> None:
        if self._state != "handshake":
            return
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self._want_writer(None)
        except ssl.SSLWantWriteError:
            self._want_writer(self._shake_hands)
        except OSError as error:
            self._fail(error)
        else:
            self._want_writer(None)
            self._state = "open"
            self._owner.on_open(self)
            self.wake()

    def _on_readable(self) -> None:
        if self._state == "handshake":
            self._shake_hands()
        elif self._state == "lingering" or self._is_closing:
            self._discard()
        elif self._state == "open":
            self._read_turn()

    def _read_turn(self) -> None:
        n_left = _READ_TURN_BYTES
        while n_left > 0:
            try:
                n_bytes = self._socket.recv_into(self._decoder.get_buffer())
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self._fail(error)
                return
            if n_bytes == 0:
                self.close(Loss("eof", "the peer closed the connection"))
                return
            n_left -= n_bytes
            if not self._hand_over(n_bytes):
                return
        if self._socket.pending():  # decrypted already: the selector will not tell of it
            self._loop.call_soon(self._on_readable)

    def _hand_over(self, n_bytes: int) -> bool:
        """Give complete frames to the owner; False when the connection is not open any more."""
        try:
            for frame in self._decoder.advance(n_bytes):
                self._owner.on_frame(self, frame)
                if self._state != "open" or self._is_closing:
                    return False
        except InvalidInput as error:
            self.close(Loss("protocol", error.message))
            return False
        return True

    def _discard(self) -> None:
        try:
            if self._socket.recv(_READ_TURN_BYTES):
                return
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            return
        except OSError:
            pass
        self.close()

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._state != "open":
            return
        n_left = _WRITE_TURN_BYTES
        while n_left > 0:
            if not self._unsent and not self._refill():
                self._want_writer(None)
                if self._is_closing:
                    self._linger()
                return
            chunk = self._unsent[0]
            try:
                n_bytes = self._socket.send(chunk)
            except ssl.SSLWantWriteError:
                break
            except ssl.SSLWantReadError:  # TLS 1.3 has no renegotiation, so this is not expected
                break
            except OSError as error:
                self._loop.call_soon(self._fail, error)
                return
            n_left -= n_bytes
            if n_bytes == len(chunk):
                self._unsent.popleft()
            else:
                self._unsent[0] = chunk[n_bytes:]
        self._want_writer(self._flush)

    def _refill(self) -> bool:
        if self._pull is not None:
            self._unsent.extend(memoryview(part).cast("B") for part in self._pull())
        return bool(self._unsent)

    def _linger(self) -> None:
        """Say end-of-file and wait for the peer's: closing over unread data would reset what was sent."""
        self._state = "lingering"
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def _want_writer(self, callback: Callable[[], None] | None) -> None:
        if callback is not None:
            self._loop.add_writer(self._fd, callback)
        elif self._is_writer_on:
            self._loop.remove_writer(self._fd)
        self._is_writer_on = callback is not None

    def _fail(self, error: OSError) -> None:
        self.close(loss_of(error))


def loss_of(error: OSError) -> Loss:
    """What a socket's error says about its connection."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Loss("eof", "the peer closed the connection")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Loss("tls", f"the peer's certificate does not hold: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        if error.reason == "UNEXPECTED_EOF_WHILE_READING":
            return Loss("eof", "the peer closed the connection")
        return Loss("tls", f"TLS failed: {error.reason or error}")
    if isinstance(error, TimeoutError):
        return Loss("timeout", "the peer did not answer in time")
    return Loss("reset", _words(error))


def _words(error: OSError) -> str:
    """The system's words: those of asyncio name the call and the address."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)
