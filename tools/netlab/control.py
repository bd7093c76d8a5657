"""The owner's end of the switch: one JSON request, one JSON answer, over a Unix socket that keeps messages apart.

The socket is also the switch's lifeline: when the owner is gone, the switch reads its end and leaves.
"""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

from hexmesh.errors import Internal, Lost

MESSAGE_BYTES = 1 << 20
ANSWER_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Control:
    """Asks the switch; usable from any thread."""

    socket: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer. Raises Lost when the switch is gone, Internal with its words when it failed."""
        with self.lock:
            try:
                self.socket.settimeout(ANSWER_TIMEOUT_S)
                self.socket.send(json.dumps(request).encode())
                answer = self.socket.recv(MESSAGE_BYTES)
            except OSError as error:
                raise Lost(f"the lab's switch does not answer: {error}") from None
        if not answer:
            raise Lost("the lab's switch has ended")
        decoded = json.loads(answer)
        if "error" in decoded:
            raise Internal(f"the lab's switch: {decoded['error']}")
        return decoded

    def close(self) -> None:
        self.socket.close()


def control_pair() -> tuple[Control, socket.socket]:
    """The owner's end, and the one for the switch."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
    return Control(ours), theirs
