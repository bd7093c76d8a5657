"""A peer connection in the hands of a thread: blocking TLS, so that bytes by the gigabyte never pass the event loop."""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from hexmesh.errors import Lost
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId, short
from hexmesh.wire.frames import Buffer, Frame, FrameDecoder, FrameLimits


class BulkSocket:
    """Owns a greeted connection with one member. One thread uses it; `abort` may come from any."""

    def __init__(
        self, member: MemberIdentity, sock: ssl.SSLSocket, unsent: list[memoryview], received: bytes
    ) -> None:
        self.member = member
        self._socket = sock
        self._unsent: list[Buffer] = list(unsent)
        self._decoder = FrameDecoder()
        self._frames: Iterator[Frame] = self._decoder.feed(received)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def node_id(self) -> NodeId:
        return self.member.node_id

    def prepare(self, limits: FrameLimits, timeout_s: float) -> None:
        """To be called first, in the thread: what may come in, and how long the peer may stand still.

        Sends what the event loop has left unsent, such as the greeting.
        """
        self._decoder.limits = limits
        self._socket.settimeout(timeout_s)
        self.send([])

    def send(self, parts: list[Buffer]) -> None:
        """Write one frame. Raises Lost when the peer is gone or stands still."""
        with self._losses():
            for part in [*self._unsent, *parts]:
                self._socket.sendall(part)
            self._unsent.clear()

    def receive(self, deadline_s: float = math.inf) -> Frame:
        """The next frame, by `deadline_s` on the monotonic clock.

        Raises Lost when the peer is gone, stands still or is too slow, InvalidInput for a frame over the limit.
        """
        with self._losses():
            while (frame := next(self._frames, None)) is None:
                if time.monotonic() >= deadline_s:
                    raise Lost(f"node {short(self.node_id)} is too slow")
                n_bytes = self._socket.recv_into(self._decoder.get_buffer())
                if n_bytes == 0:
                    raise Lost(f"node {short(self.node_id)} closed the connection")
                self._frames = self._decoder.advance(n_bytes)
        return frame

    def close(self) -> None:
        """No thread uses it any more, or ever will."""
        self._socket.close()

    def abort(self) -> None:
        """Make a thread that waits here fail soon. The descriptor stays open until that thread closes it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(
                self._socket, socket.SHUT_RDWR
            )  # not SSLSocket's, which drops the TLS state

    @contextlib.contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise Lost(f"node {short(self.node_id)} stood still") from error
        except (OSError, ValueError) as error:  # ValueError: the TLS state is gone
            raise Lost(f"the connection to node {short(self.node_id)} broke: {error}") from error
