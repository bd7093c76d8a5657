"""A TUN device inside a network namespace, held from outside: the switch's end of a host's cable."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Self

DEVICE = "lab0"
"""What hosts call it."""
MAX_PACKET_BYTES = 65_536 + 64
_PATH = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CHECKSUM, _TCP4, _TCP6 = 0x01, 0x02, 0x04
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class TunDevice:
    """IP packets behind a virtio_net header, as `packets` reads them."""

    fd: int

    @classmethod
    def open(cls, namespace: str) -> Self:
        """A new device in `namespace`, where this thread then is. It ends with its descriptor."""
        enter_namespace(namespace)
        fd = os.open(_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        device = cls(fd)
        device.set_offload(True)
        return device

    def read(self) -> bytes:
        return os.read(self.fd, MAX_PACKET_BYTES)

    def write(self, packet: bytes) -> None:
        os.write(self.fd, packet)

    def set_offload(self, is_on: bool) -> None:
        """Let the kernel hand over TCP packets of up to 64 KiB, or have it cut them to the MTU first."""
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _CHECKSUM | _TCP4 | _TCP6 if is_on else 0)


def why_no_tun() -> str | None:
    """Why this process cannot make such devices."""
    try:
        os.close(os.open(_PATH, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_PATH}: {error.strerror}"
    return None


def enter_namespace(path: str) -> None:
    """Move this thread, and it alone, into the network namespace at `path`. Sockets stay where they were made."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.setns(fd, _CLONE_NEWNET))
    finally:
        os.close(fd)


def enter_new_namespace() -> None:
    """Move this thread into a network namespace of its own, which ends with it."""
    _checked(_libc.unshare(_CLONE_NEWNET))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
