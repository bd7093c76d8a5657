"""Nodes that were removed from the mesh: what is known of them here, how it spreads, and how it is kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from daemon.trust.state import StateFolder
from hexmesh.errors import HexmeshError, Refused
from hexmesh.identity.authority import Issuer
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.identity.revocations import Revocations, sign_revocation
from hexmesh.ids import NodeId, short
from hexmesh.wire.peering import PeerRefused
from hexmesh.wire.trust import Revoked

log = logging.getLogger("hexmesh.trust")

REMOVED_STEP = "to bring the host back, start it with a fresh --state-dir and a new token"
VOID_STEP = "start it with a new token (`hexmesh token create` on an issuer)"
_RETRY_S = 30.0


class Removals:
    """Owner of the revocations while the daemon runs.

    `tell(None, message)` reaches every peer that is up, `tell(node, message)` one. `on_revoked(nodes)` is called
    with those that were members a moment ago, and with nobody when certificates alone became void.
    """

    def __init__(
        self,
        state: StateFolder,
        revocations: Revocations,
        *,
        tell: Callable[[NodeId | None, Revoked], None],
        on_revoked: Callable[[frozenset[NodeId]], None],
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._state = state
        self._revocations = revocations
        self._tell = tell
        self._on_revoked = on_revoked
        self._now_unix_s = now_unix_s
        self._changed = asyncio.Event()
        self._saving = asyncio.Lock()
        self._on_disk = revocations.signed()

    @property
    def revoked(self) -> frozenset[NodeId]:
        return self._revocations.revoked

    def judge(self, member: MemberIdentity) -> PeerRefused | None:
        """Why this member is refused, with the proof; None if it is not."""
        return refusal_of(self._revocations, member)

    def learn(self, revocation: bytes) -> None:
        """Take in what a peer sent, and pass on what is news. What nobody in charge signed is logged and dropped."""
        before = self.revoked
        try:
            if not self._revocations.learn(revocation):
                return
        except Refused as error:
            log.warning("revocation ignored reason=%s", error.message)
            return
        self._changed.set()
        self._take_effect(revocation, before)

    def tell_all_to(self, node: NodeId) -> None:
        """Everything, to a peer that has just come: it may have heard of nothing."""
        for revocation in self._revocations.signed():
            self._tell(node, Revoked(revocation=revocation))

    async def revoke(self, issuer: Issuer, node: NodeId, members: Iterable[NodeId]) -> None:
        """Remove a node for good; on the disk when this returns. Raises Refused or HexmeshError.

        What a removed issuer had revoked stays revoked, now on this issuer's word.
        """
        upholds = frozenset(members) - self.revoked - {node}
        before = self.revoked
        new = []
        for target in (node, *self._revocations.revoked_by(node)):
            now_unix_s = self._now_unix_s()
            revocation = sign_revocation(
                issuer,
                target,
                now_unix_s=now_unix_s,
                sequence=self._revocations.next_sequence(now_unix_s),
                upholds=upholds,
            )
            self._revocations.learn(revocation)
            new.append(revocation)
        await self.save()
        for revocation in new:
            self._take_effect(revocation, before)

    async def save(self) -> None:
        """Write down what is known. Raises HexmeshError."""
        async with self._saving:
            signed = self._revocations.signed()
            if signed != self._on_disk:
                await asyncio.to_thread(self._state.save_revocations, signed)
                self._on_disk = signed

    async def run(self) -> NoReturn:
        """Keep on disk what was heard."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.save()
            except HexmeshError as error:
                log.error("revocations not saved reason=%s", error.one_line())
                self._changed.set()
                await asyncio.sleep(_RETRY_S)

    def _take_effect(self, revocation: bytes, before: frozenset[NodeId]) -> None:
        new = self.revoked - before
        for node in new:
            log.warning("node removed from the mesh node=%s", short(node))
        self._tell(None, Revoked(revocation=revocation))
        self._on_revoked(new)


def refusal_of(revocations: Revocations, member: MemberIdentity) -> PeerRefused | None:
    """Why a member is refused by what is known, with the proof; None if it is not."""
    proof = revocations.grounds(member)
    if proof is None:
        return None
    if revocations.is_revoked(member.node_id):
        message = f"node {short(member.node_id)} was removed from the mesh"
        return PeerRefused(code="removed", message=message, next_step=REMOVED_STEP, proof=proof)
    message = (
        f"the certificate of node {short(member.node_id)} is void: its issuer {short(member.issuer_id or '')} "
        "was removed from the mesh"
    )
    return PeerRefused(code="issuer_removed", message=message, next_step=VOID_STEP, proof=proof)
