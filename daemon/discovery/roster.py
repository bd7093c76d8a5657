"""Whom this node knows: verified records from wherever they come, and what follows from a new one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from daemon.complaints import Complaints
from daemon.peering.address import parse_address
from daemon.trust.attestor import Attestor
from hexmesh.errors import HexmeshError, Refused
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import short
from hexmesh.membership.records import Directory, NodeRecord, SignedRecord, open_record, record_head

log = logging.getLogger("hexmesh.roster")

_SIGNED = msgspec.msgpack.Decoder(SignedRecord)


class Roster:
    """Owner of the directory and of what the members' certificates say."""

    def __init__(
        self,
        attestor: Attestor,
        *,
        on_address: Callable[[str, str, int], None],
        on_change: Callable[[NodeRecord], None],
    ) -> None:
        self.directory = Directory()
        self._attestor = attestor
        self._on_address = on_address
        self._on_change = on_change
        self._identities: dict[str, MemberIdentity] = {}
        self._complaints = Complaints()

    def learn(self, signed: bytes) -> bool:
        """Take in a record; one that no member of this mesh signed about itself is logged once and dropped.

        False for such a one. What is old, known or expired (peers pass such records on) is dropped before anything
        is verified, which is what costs time.
        """
        now_unix_s = time.time()
        try:
            head = record_head(signed)
            if head.expires_at_unix_s <= now_unix_s or not self.directory.is_news(head):
                return True
            known = open_record(
                signed,
                mesh_id=self._attestor.mesh_id,
                verify=self._attestor.verify,
                now_unix_s=now_unix_s,
            )
        except Refused as refused:
            if self._complaints.is_news("record", refused.message, time.monotonic()):
                log.warning("record refused reason=%s", refused.message)
            return False
        if not self.directory.merge(known):
            return True
        record = known.record
        self._identities[record.node] = self._attestor.identify(_SIGNED.decode(signed).chain)
        self._note_address(record)
        self._on_change(record)
        return True

    def has_signed(self, node: str, payload: bytes, signature: bytes) -> bool:
        """Whether `node`, as far as it is known here, signed exactly this payload."""
        identity = self.identity(node)
        return identity is not None and identity.has_signed(payload, signature)

    def identity(self, node: str) -> MemberIdentity | None:
        """Whom the certificate of the node's newest record names; None for a node that is not known."""
        if node == self._attestor.node_id:
            return self._attestor.identity
        return self._identities.get(node)

    def forget(self, node: str) -> None:
        """The node was removed: its record and its word count no more."""
        self._identities.pop(node, None)
        self.directory.forget(node)

    def _note_address(self, record: NodeRecord) -> None:
        if record.node == self._attestor.node_id:
            return
        try:
            address = parse_address(record.peer_address)
        except HexmeshError as error:
            log.warning("address ignored node=%s reason=%s", short(record.node), error.message)
            return
        self._on_address(record.node, address.host, address.port)
