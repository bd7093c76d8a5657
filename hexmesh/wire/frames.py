"""Sans-I/O framing: [u32 header_len][u32 payload_len][header][payload], lengths big-endian and bounded.

The decoder lends out the buffer to receive into: a large payload is received straight into the memory that
the caller keeps, and the loop that owns the socket decides how many bytes it reads at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hexmesh.errors import InvalidInput

Buffer = bytes | bytearray | memoryview

_LENGTHS = struct.Struct("!II")
_SCRATCH_BYTES = 64 * 1024
_UNTOUCHED_FROM_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """Largest header and payload that one frame may have; a channel's two ends agree on them."""

    header_bytes: int = 1024 * 1024
    payload_bytes: int = 256 * 1024 * 1024

    def check(self, header_bytes: int, payload_bytes: int) -> None:
        """Raise FrameTooLarge if a frame of these sizes is over a limit."""
        if header_bytes > self.header_bytes:
            raise FrameTooLarge("header", header_bytes, self.header_bytes)
        if payload_bytes > self.payload_bytes:
            raise FrameTooLarge("payload", payload_bytes, self.payload_bytes)


DEFAULT_LIMITS = FrameLimits()


class FrameTooLarge(InvalidInput):
    """A frame is over the channel's limit. Nothing after it can be read: close the connection."""

    def __init__(self, part: str, n_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"frame {part} of {n_bytes} bytes is over the limit of {limit_bytes}", code="frame_too_large"
        )
        self.n_bytes = n_bytes
        self.limit_bytes = limit_bytes


class Frame(NamedTuple):
    """One received frame. The payload is writable, aligned for tensors, and the receiver's to keep."""

    header: bytearray
    payload: memoryview


def frame_parts(header: Buffer, payload: Buffer = b"", limits: FrameLimits = DEFAULT_LIMITS) -> list[Buffer]:
    """What to write for one frame, in order; the payload is not copied. Raises FrameTooLarge."""
    header_bytes, payload_bytes = size_bytes(header), size_bytes(payload)
    limits.check(header_bytes, payload_bytes)
    first = b"".join((_LENGTHS.pack(header_bytes, payload_bytes), header))
    return [first, payload] if payload_bytes else [first]


def size_bytes(data: Buffer) -> int:
    """Length in bytes, also of a memoryview whose items are wider than a byte."""
    return data.nbytes if isinstance(data, memoryview) else len(data)


class FrameDecoder:
    """Turns received bytes into frames.

    Either hand in chunks with `feed`, or receive into `get_buffer()` and tell `advance` how many bytes came.
    Both give an iterator that must be run to its end; it raises FrameTooLarge after the frames before.
    """

    def __init__(self, limits: FrameLimits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        """Holds from the next frame on; a connection may raise it once it knows its peer."""
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = 0
        self._stop = 0
        self._header: bytearray | None = None
        self._payload_bytes = 0
        self._part: memoryview | None = None
        self._filled = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here without cutting a frame in two."""
        return self._part is None and self._start == self._stop

    def rest(self) -> bytes:
        """What came after the frame handed out last: the stream goes on with something else than frames.

        Raises InvalidInput where another frame has begun.
        """
        if self._part is not None:
            raise InvalidInput("a frame where none was to come", code="bad_message")
        return bytes(self._scratch[self._start : self._stop])

    def get_buffer(self) -> memoryview:
        """Where to receive the next bytes; never empty."""
        if self._part is not None:
            return self._part[self._filled :]
        return self._scratch[self._stop :]

    def advance(self, n_bytes: int) -> Iterator[Frame]:
        """The frames that became complete with the n_bytes just written to the front of `get_buffer()`."""
        if self._part is not None:
            self._filled += n_bytes
        else:
            self._stop += n_bytes
        return self._frames()

    def feed(self, chunk: Buffer) -> Iterator[Frame]:
        """The frames that became complete with `chunk`."""
        rest = memoryview(chunk).cast("B")
        while rest:
            buffer = self.get_buffer()
            n_bytes = min(len(buffer), len(rest))
            buffer[:n_bytes] = rest[:n_bytes]
            rest = rest[n_bytes:]
            yield from self.advance(n_bytes)

    def _frames(self) -> Iterator[Frame]:
        while True:
            frame = self._whole_frame()
            if frame is None:
                if not self._fill_part():
                    break
                frame = self._next_part()
            if frame is not None:
                yield frame
        self._move_rest_to_front()

    def _whole_frame(self) -> Frame | None:
        """The next frame, if it has come as a whole; mostly it has."""
        header_at = self._start + _LENGTHS.size
        if self._part is not None or self._stop < header_at:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._scratch, self._start)
        payload_at = header_at + header_bytes
        stop = payload_at + payload_bytes
        if self._stop < stop:
            return None
        self.limits.check(header_bytes, payload_bytes)
        self._start = stop
        header = bytearray(self._scratch[header_at:payload_at])
        return Frame(header, memoryview(bytearray(self._scratch[payload_at:stop])))

    def _fill_part(self) -> bool:
        """Move scratch bytes into the part being received; True when that part is complete."""
        if self._part is None and not self._begin_header():
            return False
        assert self._part is not None
        n_bytes = min(self._stop - self._start, len(self._part) - self._filled)
        if n_bytes:
            self._part[self._filled : self._filled + n_bytes] = self._scratch[
                self._start : self._start + n_bytes
            ]
            self._start += n_bytes
            self._filled += n_bytes
        return self._filled == len(self._part)

    def _begin_header(self) -> bool:
        if self._stop - self._start < _LENGTHS.size:
            return False
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._scratch, self._start)
        self.limits.check(header_bytes, payload_bytes)
        self._start += _LENGTHS.size
        self._header = None
        self._payload_bytes = payload_bytes
        self._begin_part(header_bytes)
        return True

    def _begin_part(self, n_bytes: int) -> None:
        self._part = _new_buffer(n_bytes)
        self._filled = 0

    def _next_part(self) -> Frame | None:
        """Go from the header to its payload, or from the payload to the finished frame."""
        assert self._part is not None
        if self._header is None:
            self._header = _underlying(self._part)
            self._begin_part(self._payload_bytes)
            return None
        frame = Frame(self._header, self._part)
        self._header = None
        self._part = None
        return frame

    def _move_rest_to_front(self) -> None:
        """At most the first bytes of a frame's lengths are left over."""
        n_bytes = self._stop - self._start
        self._scratch[:n_bytes] = self._scratch[self._start : self._stop]
        self._start, self._stop = 0, n_bytes


def _new_buffer(n_bytes: int) -> memoryview:
    """Writable memory; large memory is not zeroed, so a claimed length costs nothing until bytes arrive."""
    if n_bytes < _UNTOUCHED_FROM_BYTES:
        return memoryview(bytearray(n_bytes))
    return np.empty(n_bytes, dtype=np.uint8).data


def _underlying(part: memoryview) -> bytearray:
    owner = part.obj
    return owner if isinstance(owner, bytearray) else bytearray(part)
