"""One way to send to any node of the mesh, this one included."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

Channel = Literal["control", "data", "probe", "bulk"]
Payload = bytes | bytearray | memoryview


class Courier(Protocol):
    """Sends messages between nodes. A message may be lost; whoever needs an answer keeps a deadline."""

    @property
    def node_id(self) -> str: ...

    def send(
        self, to: str, message: msgspec.Struct, payload: Payload = b"", *, channel: Channel = "data"
    ) -> bool:
        """Queue a message; False when it is known already that it will not arrive."""
        ...
