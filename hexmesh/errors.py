"""What can go wrong, sorted by whose doing it was and so by what the caller does next.

    HexmeshError
    +-- InvalidInput   you passed nonsense            exit 2   HTTP 400
    +-- Refused        they said no (trust, version)  exit 4   HTTP 403
    |   +-- NoRoom     no memory for what was asked   exit 4   HTTP 409
    +-- NotReady       not now, maybe later           exit 3   HTTP 503
    |   +-- Busy       full at this moment            exit 3   HTTP 429
    +-- Lost           the world did it               exit 1   HTTP 502
    |   +-- TimedOut   a deadline passed              exit 1   HTTP 504
    +-- Closed         we shut it ourselves           exit 1   HTTP 503
    +-- Internal       our bug                        exit 1   HTTP 500

A message names the blocker; `next_step` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class HexmeshError(Exception):
    """Any failure that hexmesh foresees."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, code: str = "", next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.next_step = next_step

    def one_line(self) -> str:
        """Blocker and next step on one line, as the command line prints it."""
        return f"{self.message}; {self.next_step}" if self.next_step else self.message


class InvalidInput(HexmeshError):
    """The caller's input cannot mean anything; the same input will never work."""

    exit_code = 2
    http_status = 400


class Refused(HexmeshError):
    """Somebody with the right to do so said no: identity, token, key, version, model."""

    exit_code = 4
    http_status = 403


class NoRoom(Refused):
    """What was asked would leave the mesh with too little memory; carries the bytes."""

    http_status = 409

    def __init__(
        self, message: str, *, needed_bytes: int, room_bytes: int, code: str = "", next_step: str = ""
    ) -> None:
        super().__init__(message, code=code, next_step=next_step)
        self.needed_bytes = needed_bytes
        self.room_bytes = room_bytes


class NotReady(HexmeshError):
    """It cannot be done now and may be possible later; carries bytes where memory is the blocker."""

    exit_code = 3
    http_status = 503

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        next_step: str = "",
        needed_bytes: int | None = None,
        room_bytes: int | None = None,
        retry_after_s: float = 2.0,
    ) -> None:
        super().__init__(message, code=code, next_step=next_step)
        self.needed_bytes = needed_bytes
        self.room_bytes = room_bytes
        self.retry_after_s = retry_after_s


class Busy(NotReady):
    """Everything that could serve this is full at the moment."""

    http_status = 429


class Lost(HexmeshError):
    """A peer, process or link went away in the middle."""

    http_status = 502


class TimedOut(Lost):
    """A deadline passed before the answer came."""

    http_status = 504


class Closed(HexmeshError):
    """We closed it ourselves; nobody should retry here."""

    http_status = 503


class Internal(HexmeshError):
    """A bug of ours."""
