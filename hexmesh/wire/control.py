"""Control messages of the mesh: leases on hosts, plans in two phases, and the names that order them.

`Ballot` and `Epoch` are ordered as the tuples of their fields. Every name carries a boot nonce, so that
nothing has to survive on disk for safety. Messages are tagged structs; `ControlMessage` is their union.
"""

from __future__ import annotations

import msgspec


class Ballot(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """A coordinator's claim; `rank` is the operator's preference, `boot` a nonce of the daemon's start."""

    term: int
    rank: int
    node: str
    boot: int

    @property
    def owner(self) -> tuple[str, int]:
        """The coordinator itself, (node, boot), whatever the term."""
        return (self.node, self.boot)


LEAST_BALLOT = Ballot(term=0, rank=-(2**62), node="", boot=0)
"""Below every ballot that is ever made: terms start at 1."""


class Epoch(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """Name of one plan: the planning coordinator's ballot and its count of plans; globally unique."""

    ballot: Ballot
    n: int


class Cert(msgspec.Struct, frozen=True, kw_only=True):
    """'This epoch was decided', signed by the epoch's own coordinator. Anyone may pass it on."""

    epoch: Epoch
    digest: str
    signature: bytes


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """'Whoever is leased to `ballot` may be leased to `to_node`', signed by the ballot's node."""

    ballot: Ballot
    to_node: str
    to_boot: int
    signature: bytes


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Who speaks to whom: `to_boot` is the receiver's boot as the sender knows it, `hears` that it lives."""

    src: str
    boot: int
    to_boot: int | None
    hears: bool


class Complaint(msgspec.Struct, frozen=True, kw_only=True):
    """A host asks for a new plan although the hosts are the same; `n` tells one complaint from the next."""

    n: int
    epoch: Epoch
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A host's actual state, the answer to the wanted state in a beat."""

    committed: Cert | None = None
    prepared: Epoch | None = None
    is_ready: bool = False
    failure: str | None = None
    fetched_bytes: int = 0
    """Weights fetched for `prepared` so far: while this grows, getting ready may take longer."""
    draining: Epoch | None = None
    complaint: Complaint | None = None
    is_leaving: bool = False


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    rank: int
    is_free: bool
    is_leaving: bool
    promised: Ballot
    is_coordinator: bool
    ballot: Ballot
    n_held: int
    cert: Cert | None


class Ask(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    ballot: Ballot
    release: Release | None


class Grant(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    ballot: Ballot
    rank: int
    report: Report


class Nack(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    promised: Ballot
    is_free: bool


class Beat(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The wanted state. `seq` counts all beats and prepares of the coordinator's boot."""

    header: Header
    ballot: Ballot
    seq: int
    cur: Cert | None
    prep: Epoch | None
    heirs: tuple[str, ...]


class Ack(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    ballot: Ballot
    report: Report


class Prepare(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """`plan` is opaque here; `hosts` names every host of it with the boot that it is meant for."""

    header: Header
    ballot: Ballot
    seq: int
    epoch: Epoch
    digest: str
    hosts: dict[str, int]
    plan: bytes
    idle: tuple[str, ...] = ()
    """Hosts without a part in the plan: it stays good when they go."""


class CertMessage(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    cert: Cert


class Yield(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    header: Header
    ballot: Ballot
    held: dict[str, int]
    release: Release


ControlMessage = Hello | Ask | Grant | Nack | Beat | Ack | Prepare | CertMessage | Yield
CONTROL_MESSAGE = ControlMessage


def cert_payload(epoch: Epoch, digest: str) -> bytes:
    """What the coordinator of `epoch` signs to decide it."""
    return b"hexmesh-cert-1\0" + msgspec.msgpack.encode((epoch, digest))


def release_payload(ballot: Ballot, to_node: str, to_boot: int) -> bytes:
    """What the holder signs to let its hosts go."""
    return b"hexmesh-release-1\0" + msgspec.msgpack.encode((ballot, to_node, to_boot))
