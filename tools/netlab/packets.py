"""What the switch reads off a packet: IPv4 behind a virtio_net header, as a TUN device with offload gives it."""

from __future__ import annotations

VNET_HEADER_BYTES = 10
FRAME_OVERHEAD_BYTES = 38
"""Ethernet header, checksum, preamble and gap."""
_TCP = 6
_SYN, _ACK = 0x02, 0x10


def is_ipv4(packet: bytes) -> bool:
    """Whether the other functions may look at `packet`."""
    return len(packet) >= VNET_HEADER_BYTES + 20 and packet[VNET_HEADER_BYTES] >> 4 == 4


def destination(packet: bytes) -> bytes:
    """The address it goes to, 4 bytes."""
    return packet[VNET_HEADER_BYTES + 16 : VNET_HEADER_BYTES + 20]


def opens_connection(packet: bytes) -> bool:
    """Whether it asks for a new TCP connection."""
    tcp = _tcp_offset(packet)
    return tcp is not None and packet[tcp + 13] & (_SYN | _ACK) == _SYN


def wire_bytes(packet: bytes) -> int:
    """Its size on Ethernet; a large TCP packet counts as the segments that it would be cut into."""
    n_bytes = len(packet) - VNET_HEADER_BYTES
    segment_bytes = int.from_bytes(packet[4:6], "little") if packet[1] else 0
    tcp = _tcp_offset(packet) if segment_bytes else None
    if tcp is None:
        return n_bytes + FRAME_OVERHEAD_BYTES
    # The header length that the kernel notes is a hint and may cover payload: the packet itself says.
    header_bytes = tcp - VNET_HEADER_BYTES + 4 * (packet[tcp + 12] >> 4)
    n_segments = max(-(-(n_bytes - header_bytes) // segment_bytes), 1)
    return n_bytes + (n_segments - 1) * header_bytes + n_segments * FRAME_OVERHEAD_BYTES


def _tcp_offset(packet: bytes) -> int | None:
    """Where the TCP header starts; None without one (another protocol, or a later fragment)."""
    if packet[VNET_HEADER_BYTES + 9] != _TCP:
        return None
    if int.from_bytes(packet[VNET_HEADER_BYTES + 6 : VNET_HEADER_BYTES + 8], "big") & 0x1FFF:
        return None
    offset = VNET_HEADER_BYTES + 4 * (packet[VNET_HEADER_BYTES] & 0x0F)
    return offset if offset + 14 <= len(packet) else None
