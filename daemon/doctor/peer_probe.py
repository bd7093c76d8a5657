"""What one peer shows to a stranger: does it answer, under which root, and what time does it have?

Plain blocking sockets: each probe runs in a thread of its own that nobody waits for past the deadline.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daemon.peering.address import Address
from daemon.peering.connection import loss_of
from daemon.peering.tls import stranger_context, unverified_context
from hexmesh.errors import InvalidInput
from hexmesh.wire import codec
from hexmesh.wire.frames import FrameDecoder
from hexmesh.wire.peering import JOIN_LIMITS, JOIN_REPLY_LIMITS, MeshRoot, WantRoot

_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """A peer to probe. `node_id` is empty where only its address is known."""

    address: Address
    name: str
    is_asked_for: bool
    """Named by --peer or a token, not merely remembered."""
    node_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a probe. Without a root there is `trouble`."""

    root_der: bytes | None = None
    is_verified: bool = False
    """Its certificate held under the root that was expected."""
    clock_unix_s: float | None = None
    own_unix_s: float = 0.0
    """This host's clock in the middle of the question that `clock_unix_s` answers."""
    trouble: str = ""
    is_reached: bool = False
    """TCP connected, whatever came after."""


def probe_all(
    addresses: Sequence[Address],
    root_der: bytes | None,
    clock: Callable[[], float],
    deadline_s: float,
) -> list[Answer]:
    """Probe all at once; who has not answered by the deadline gets that as its trouble."""
    late = Answer(trouble=f"no answer within {deadline_s:g} s")
    answers = [late] * len(addresses)

    def run(i: int) -> None:
        answers[i] = probe(addresses[i], root_der, clock, deadline_s)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(addresses))]
    stop_s = time.monotonic() + deadline_s + _GRACE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, stop_s - time.monotonic()))
    return list(answers)


def probe(address: Address, root_der: bytes | None, clock: Callable[[], float], deadline_s: float) -> Answer:
    """Ask for root and clock; first with the root verified where it is known, then without."""
    stop_s = time.monotonic() + deadline_s
    is_reached, trouble = False, ""
    contexts = [] if root_der is None else [stranger_context(root_der)]
    for context in (*contexts, unverified_context()):
        try:
            with socket.create_connection((address.host, address.port), _left_s(stop_s)) as raw:
                is_reached = True
                raw.settimeout(_left_s(stop_s))
                with context.wrap_socket(raw) as tls:
                    told, own_unix_s = _ask(tls, clock, stop_s)
        except ssl.SSLCertVerificationError as error:
            trouble = error.verify_message
            continue
        except (OSError, InvalidInput) as error:
            return Answer(trouble=_words(error, is_reached, deadline_s), is_reached=is_reached)
        return Answer(
            root_der=told.root,
            is_verified=context.verify_mode is ssl.CERT_REQUIRED,
            clock_unix_s=told.clock_unix_s or None,
            own_unix_s=own_unix_s,
            trouble=trouble,
            is_reached=True,
        )
    return Answer(trouble=trouble, is_reached=is_reached)


def _ask(tls: ssl.SSLSocket, clock: Callable[[], float], stop_s: float) -> tuple[MeshRoot, float]:
    asked_unix_s = clock()
    tls.sendall(b"".join(codec.PEERING.frame(WantRoot(), limits=JOIN_LIMITS)))
    decoder = FrameDecoder(JOIN_REPLY_LIMITS)
    while True:
        tls.settimeout(_left_s(stop_s))
        n_bytes = tls.recv_into(decoder.get_buffer())
        if n_bytes == 0:
            raise InvalidInput("it hung up")
        for frame in decoder.advance(n_bytes):
            message = codec.PEERING.decode(frame.header)
            if not isinstance(message, MeshRoot):
                raise InvalidInput("it did not show a mesh's root")
            return message, (asked_unix_s + clock()) / 2


def _left_s(stop_s: float) -> float:
    return max(0.01, stop_s - time.monotonic())


def _words(error: OSError | InvalidInput, is_reached: bool, deadline_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {deadline_s:g} s"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return loss_of(error).message
    return "what answers there is not a hexmesh peer port" if is_reached else str(error)
