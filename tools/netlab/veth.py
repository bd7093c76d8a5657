"""The same cable where /dev/net/tun may not be used: a veth pair, and a packet socket on the switch's end of it.

Slower under load than TUN, but open to root of any user namespace. Both ends of every pair have one address and no
ARP, so that a frame fits every host as it is.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tools.netlab.namespaces import ip
from tools.netlab.packets import VNET_HEADER_BYTES
from tools.netlab.tun import DEVICE, MAX_PACKET_BYTES, enter_namespace

_MAC = "02:00:00:00:00:01"
_FRAME_HEADER = 2 * bytes.fromhex(_MAC.replace(":", "")) + b"\x08\x00"
_FRAME_HEADER_BYTES = 14
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 1 << 25
_ETH_P_IP = 0x0800
_SIOCETHTOOL, _ETHTOOL_SET_TSO = 0x8946, 0x1F


@dataclass(frozen=True, slots=True)
class VethDevice:
    """IP packets behind a virtio_net header; the header's offsets count from the frame, on both ways alike."""

    link: socket.socket
    inside: socket.socket
    """Any socket of the host's namespace: through it the host's end is configured."""

    @classmethod
    def open(cls, namespace: str) -> Self:
        """A pair between this thread's namespace and `namespace`. It ends with either."""
        name, host = f"to-{len(socket.if_nameindex())}", Path(namespace).name
        peer = ("peer", "name", DEVICE, "address", _MAC, "netns", host)
        ip("link", "add", name, "address", _MAC, "type", "veth", *peer)
        ip("link", "set", name, "arp", "off", "up")
        ip("-n", host, "link", "set", DEVICE, "arp", "off")
        link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        link.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
            with contextlib.suppress(PermissionError):
                link.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        link.bind((name, _ETH_P_IP))  # this protocol alone: what the switch sends does not come back to it
        return cls(link, _socket_in(namespace))

    @property
    def fd(self) -> int:
        return self.link.fileno()

    def read(self) -> bytes:
        frame = os.read(self.fd, MAX_PACKET_BYTES)
        return frame[:VNET_HEADER_BYTES] + frame[VNET_HEADER_BYTES + _FRAME_HEADER_BYTES :]

    def write(self, packet: bytes) -> None:
        os.writev(self.fd, (packet[:VNET_HEADER_BYTES], _FRAME_HEADER, packet[VNET_HEADER_BYTES:]))

    def set_offload(self, is_on: bool) -> None:
        """Let the host send TCP packets of up to 64 KiB, or have it cut them to the MTU first."""
        value = array.array("B", struct.pack("II", _ETHTOOL_SET_TSO, is_on))
        request = struct.pack("16sP16x", DEVICE.encode(), value.buffer_info()[0])
        fcntl.ioctl(self.inside, _SIOCETHTOOL, request)


def _socket_in(namespace: str) -> socket.socket:
    """A socket made there; this thread comes back."""
    back = f"/proc/{os.getpid()}/task/{os.getpid()}/ns/net"
    own = os.open(back, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_namespace(namespace)
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    finally:
        enter_namespace(f"/proc/self/fd/{own}")
        os.close(own)
