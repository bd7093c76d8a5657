"""Node records: what a node says of itself, signed, and the directory of what all nodes say.

A record is good by itself, wherever it comes from (DHT, a direct message, a third node): it carries the
signer's certificates and a signature over the DHT key's hash, the subkey, the body and the expiration. The
newest record of a node is the one with the highest sequence number, which grows across restarts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec

from hexmesh.calibration.factors import Factors, applied
from hexmesh.calibration.ways import MOST_WAY_S, lengthened
from hexmesh.cluster import Availability, Cluster, Device, Link, Node, Role
from hexmesh.errors import Refused
from hexmesh.ids import short
from hexmesh.wire.peering import MAX_TEXT
from hexmesh.wire.peering import Text as _Text

Sign = Callable[[bytes], bytes]
"""Signs a payload with the node's key."""

Chain = tuple[bytes, ...]
"""A node's certificate and the issuers' up to the root's, each DER."""

VerifyMember = Callable[[Chain, bytes, bytes], str]
"""(chain, payload, signature) -> node id of the member that signed; raises Refused."""

MAX_RECORD_BYTES = 256 * 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
REFRESH_S = 20.0
LIFETIME_S = 60.0
MAX_LIFETIME_S = 2 * LIFETIME_S
"""A record that claims to be good for longer is refused: it could not be replaced or forgotten."""

_Certificate = Annotated[bytes, msgspec.Meta(max_length=4096)]


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A device as measured, with the spread of the measurement and its time."""

    device: Device
    n_threads: int
    flops_spread: float
    bytes_spread: float
    measured_at_unix_s: float
    factors: Factors | None = None
    """What the steps that ran on it say of its figures; None while they are too few."""


class LinkFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A link as measured by its source."""

    link: Link
    measured_at_unix_s: float
    relayed: bool = False


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a node tells the mesh about itself. `peer_address` is host:port."""

    mesh_id: _Text
    node: _Text
    boot: int
    sequence: int
    made_at_unix_s: float
    name: _Text
    site: _Text
    peer_address: _Text
    dht_maddrs: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=16)]
    hexmesh_version: _Text
    protocol_version: int
    model_id: _Text
    roles: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=16)] = ()
    capabilities: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=64)] = ()
    devices: Annotated[tuple[DeviceFacts, ...], msgspec.Meta(max_length=64)] = ()
    """Empty until they are measured: a node without devices takes no part in plans."""
    has_all_weights: bool = True
    """Whether the whole model is in a folder there; else it fetches its stages' tensors from others."""
    links: Annotated[tuple[LinkFacts, ...], msgspec.Meta(max_length=1024)] = ()
    way_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_WAY_S)] | None = None
    """What a way between hosts takes beside its link, by steps that this node drove; None while they are too few."""
    availability: Availability = "active"
    tp_degrees: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1, le=64)], ...], msgspec.Meta(max_length=64)
    ] = (1,)
    """Numbers of its devices that its workers can share a stage over."""
    phases: Annotated[tuple[Role, ...], msgspec.Meta(max_length=3)] = ("mixed",)
    """What its stages can be part of; handing KV over is "prefill", taking it over "decode"."""
    dialable: bool = True
    """False when more members failed to dial this node than did."""


class SignedRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A record as it travels. `subkey` is the signer's node id."""

    key_hash: Annotated[bytes, msgspec.Meta(min_length=20, max_length=20)]
    subkey: _Text
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    expires_at_unix_s: float
    chain: Annotated[tuple[_Certificate, ...], msgspec.Meta(max_length=4)]
    signature: Annotated[bytes, msgspec.Meta(max_length=512)]

    def payload(self) -> bytes:
        """What the signature is over."""
        return b"hexmesh-record-1\0" + msgspec.msgpack.encode(
            (self.key_hash, self.subkey, self.body, self.expires_at_unix_s)
        )


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A verified record, how long it is good for, and the bytes to pass on."""

    record: NodeRecord
    key_hash: bytes
    expires_at_unix_s: float
    signed: bytes


def facts_key(mesh_id: str) -> bytes:
    """The DHT key under which the records of a mesh lie."""
    return f"hexmesh/{mesh_id}/nodes".encode()


def key_hash(key: bytes) -> bytes:
    """A DHT key as hivemind's validators see it: 20 bytes of SHA-1."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def sign_record(record: NodeRecord, *, expires_at_unix_s: float, chain: Chain, sign: Sign) -> bytes:
    """The record as bytes that any member can verify and pass on. Raises Refused where others would."""
    _check_figures(record)
    unsigned = SignedRecord(
        key_hash=key_hash(facts_key(record.mesh_id)),
        subkey=record.node,
        body=msgspec.msgpack.encode(record),
        expires_at_unix_s=expires_at_unix_s,
        chain=chain,
        signature=b"",
    )
    signed = msgspec.structs.replace(unsigned, signature=sign(unsigned.payload()))
    data = msgspec.msgpack.encode(signed)
    _read(data)
    return data


def open_record(data: bytes, *, mesh_id: str, verify: VerifyMember, now_unix_s: float) -> KnownRecord:
    """The record in `data`. Raises Refused unless a member of this mesh signed exactly this about itself."""
    signed, record = _read(data)
    if signed.key_hash != key_hash(facts_key(mesh_id)) or record.mesh_id != mesh_id:
        raise _bad(f"a record of {short(record.node)} is of another mesh")
    _check_lifetime(signed, now_unix_s)
    signer = verify(signed.chain, signed.payload(), signed.signature)
    if not signer == signed.subkey == record.node:
        raise _bad(f"{short(signer)} signed a record of {short(record.node)} under {short(signed.subkey)}")
    _check_figures(record)
    return KnownRecord(
        record=record,
        key_hash=signed.key_hash,
        expires_at_unix_s=signed.expires_at_unix_s,
        signed=data,
    )


class RecordHead(NamedTuple):
    """Where a record belongs in the DHT, and until when."""

    subkey: str
    expires_at_unix_s: float
    sequence: int


def record_head(data: bytes) -> RecordHead:
    """The head of a record; nothing is verified. Raises Refused."""
    signed, record = _read(data)
    return RecordHead(signed.subkey, signed.expires_at_unix_s, record.sequence)


class Directory:
    """The newest record of every node, and the cluster that they add up to.

    Pure: it never looks at a clock. Records stay after they expire, because a host that still answers beats is
    planned with its last known facts even when its records stop coming.
    """

    def __init__(self) -> None:
        self._known: dict[str, KnownRecord] = {}

    def merge(self, known: KnownRecord) -> bool:
        """Take in a verified record; True when it is newer than what was known of its node."""
        mine = self._known.get(known.record.node)
        if mine is not None and _age_order(known) <= _age_order(mine):
            return False
        self._known[known.record.node] = known
        return True

    def is_news(self, head: RecordHead) -> bool:
        """Whether a record with this head, were it genuine, would replace what is known of its node."""
        mine = self._known.get(head.subkey)
        return mine is None or (head.sequence, head.expires_at_unix_s) > _age_order(mine)

    def forget(self, node: str) -> None:
        """The node was removed or left for good."""
        self._known.pop(node, None)

    def record(self, node: str) -> NodeRecord | None:
        known = self._known.get(node)
        return known.record if known is not None else None

    def name_of(self, node: str) -> str:
        """The node's name, else the first digits of its id."""
        record = self.record(node)
        return record.name if record is not None else short(node)

    def records(self) -> tuple[NodeRecord, ...]:
        """Every record, by node id."""
        return tuple(self._known[node].record for node in sorted(self._known))

    def signed(self) -> tuple[bytes, ...]:
        """Every record as bytes to pass on to a node that has just come."""
        return tuple(self._known[node].signed for node in sorted(self._known))

    def availability(self, nodes: Iterable[str]) -> dict[str, Availability]:
        """What each of `nodes` that is known says of itself."""
        return {node: self._known[node].record.availability for node in nodes if node in self._known}

    def cluster(self, nodes: Iterable[str]) -> Cluster:
        """What is known of `nodes`, to plan over: only measured devices, only measured links among them.

        Figures are corrected by what steps say of them.
        """
        wanted = tuple(node for node in sorted(set(nodes)) if self._has_devices(node))
        records = tuple(self._known[node].record for node in wanted)
        links = (link for link in self._links(records) if link.dst in wanted)
        told_s = [record.way_s for record in records if record.way_s is not None]
        return Cluster(nodes=tuple(_as_node(record) for record in records), links=lengthened(links, told_s))

    def measured_links(self) -> dict[tuple[str, str], Link]:
        """All links by (source, destination), as measured."""
        return {(link.src, link.dst): link for link in self._links(self.records())}

    @staticmethod
    def _links(records: Iterable[NodeRecord]) -> Iterator[Link]:
        return (facts.link for record in records for facts in record.links)

    def _has_devices(self, node: str) -> bool:
        known = self._known.get(node)
        return known is not None and bool(known.record.devices)


_SIGNED = msgspec.msgpack.Decoder(SignedRecord)
_RECORD = msgspec.msgpack.Decoder(NodeRecord)


def _as_node(record: NodeRecord) -> Node:
    node = Node(
        id=record.node,
        name=record.name,
        site=record.site,
        devices=tuple(facts.device for facts in record.devices),
        tp_degrees=record.tp_degrees,
        roles=record.phases,
    )
    return applied(
        node, {facts.device.index: facts.factors for facts in record.devices if facts.factors is not None}
    )


def _age_order(known: KnownRecord) -> tuple[int, float]:
    return (known.record.sequence, known.expires_at_unix_s)


def _bad(message: str) -> Refused:
    return Refused(message, code="bad_record")


def _read(data: bytes) -> tuple[SignedRecord, NodeRecord]:
    _check_size(data)
    try:
        signed = _SIGNED.decode(data)
        return signed, _RECORD.decode(signed.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"a node record cannot be read: {error}") from error


def _check_size(data: bytes) -> None:
    if len(data) > MAX_RECORD_BYTES:
        raise _bad(f"a node record of {len(data)} bytes is over the limit of {MAX_RECORD_BYTES}")


def _check_lifetime(signed: SignedRecord, now_unix_s: float) -> None:
    left_s = signed.expires_at_unix_s - now_unix_s
    if not left_s > 0:
        raise _bad(f"the record of {short(signed.subkey)} expired {-left_s:.1f} s ago")
    if left_s > MAX_LIFETIME_S:
        raise _bad(
            f"the record of {short(signed.subkey)} claims {left_s:.0f} s of life, over {MAX_LIFETIME_S:.0f} s"
        )


def _check_figures(record: NodeRecord) -> None:
    """Refuse figures that no measurement gives: a planner divides by them."""
    for facts in record.devices:
        device = facts.device
        if _CONTROL.search(device.name) or len(device.name) > MAX_TEXT:
            raise _bad(f"{short(record.node)} gives device {device.index} a name that nobody can show")
        rates = device.flops_per_s, device.bytes_per_s
        if not (all(map(_is_rate, rates)) and device.budget_bytes > 0 and 0 <= device.row_s < math.inf):
            raise _bad(f"{short(record.node)} reports impossible figures for device {device.index}: {device}")
    if len({facts.device.index for facts in record.devices}) != len(record.devices):
        raise _bad(f"{short(record.node)} reports two devices of one index")
    for measured in record.links:
        link = measured.link
        is_own = link.src == record.node != link.dst
        if not (is_own and _is_rate(link.bytes_per_s) and 0 <= link.rtt_p50_s <= link.rtt_p95_s < math.inf):
            raise _bad(f"{short(record.node)} reports an impossible link: {link}")


def _is_rate(value: float) -> bool:
    return 0 < value < math.inf
