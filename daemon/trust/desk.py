"""Everything about trust that runs in a daemon, put together: who may talk to us, who joins, renews, issues, goes.

The node gives it its peers and carries out what follows; the parts do not know each other.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from datetime import datetime
from typing import NoReturn, Protocol, assert_never

from daemon.naming import find_node
from daemon.peering.address import Address
from daemon.trust.admission import Admission
from daemon.trust.appointments import Appointments
from daemon.trust.attestor import Attestor
from daemon.trust.credentials import Credentials, Now, utc_now
from daemon.trust.removals import VOID_STEP, Removals
from daemon.trust.renewal import Reminder, Renewal
from daemon.trust.state import Membership, StateFolder
from daemon.views import CertificateState, CertificateView, Removed
from hexmesh.errors import HexmeshError, InvalidInput, NotReady, Refused
from hexmesh.identity.authority import Issuer
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.identity.revocations import Revocations
from hexmesh.ids import NodeId, is_node_id, short
from hexmesh.wire.peering import JoinAccepted, JoinRefused, JoinRequest, MemberAddress, PeerRefused
from hexmesh.wire.trust import Appointed, Renew, Renewed, RenewRefused, Revoked, TrustMessage

log = logging.getLogger("hexmesh.trust")

REVIEW_S = 5.0


class MeshAround(Protocol):
    """The node, as far as trust needs it."""

    def send_trust(self, node: NodeId, message: TrustMessage) -> None:
        """Queue a message for a node, this one included."""

    def nodes_up(self) -> Sequence[NodeId]:
        """Peers that a connection is up with."""

    def member_addresses(self) -> list[MemberAddress]:
        """Everybody known, this node included."""

    def identity_of(self, node: str) -> MemberIdentity | None:
        """Whom the newest certificate of a node names."""

    def on_certificate_renewed(self) -> None: ...

    def on_nodes_removed(self, nodes: frozenset[NodeId]) -> None:
        """Have nothing to do with these any more."""

    def review_connections(self) -> None:
        """Close those of members that are refused by now."""

    def cast_out(self, reason: Refused) -> None:
        """This node is no member any more: stop."""


class Held(Protocol):
    """A membership, as far as trust needs it."""

    @property
    def state(self) -> StateFolder: ...
    @property
    def membership(self) -> Membership: ...
    @property
    def attestor(self) -> Attestor: ...
    @property
    def revocations(self) -> Revocations: ...
    @property
    def address(self) -> Address: ...
    @property
    def node_id(self) -> NodeId: ...


class TrustDesk:
    """Owner of the parts; `run` keeps them going."""

    def __init__(self, member: Held, mesh: MeshAround, *, now: Now = utc_now) -> None:
        """Raises HexmeshError for a damaged state folder."""
        self._mesh = mesh
        self._now = now
        self._node_id = member.node_id
        self._authority = member.state.authority
        self._reminder = Reminder()
        self.removals = Removals(
            member.state,
            member.revocations,
            tell=self._tell,
            on_revoked=self._on_revoked,
            now_unix_s=self._now_unix_s,
        )
        self.credentials = Credentials(
            member.state,
            member.membership,
            member.attestor,
            on_renewed=mesh.on_certificate_renewed,
            now=now,
        )
        self.admission = Admission(
            member.state,
            member.membership,
            member.node_id,
            str(member.address),
            mesh.member_addresses,
            issuers=self._issuers_up,
            is_removed=lambda node: node in self.removals.revoked,
            clock=self._now_unix_s,
        )
        self.renewal = Renewal(
            self.credentials,
            ask=mesh.send_trust,
            issuers=lambda: [
                NodeId(one.node_id) for one in self._issuers_up() if one.node_id != self._node_id
            ],
            may_renew=lambda member: self.removals.judge(member) is None,
            is_void=lambda member: member.issuer_id in self.removals.revoked,
            on_expired=mesh.cast_out,
            rng=random.SystemRandom(),
            now=now,
        )
        self.appointments = Appointments(
            member.state,
            members_up=self._members_up,
            revoked=lambda: self.removals.revoked,
            send=mesh.send_trust,
            now=now,
        )
        self._appointment_wanted: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)

    async def run(self) -> NoReturn:
        """Renew, appoint, keep and watch, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.renewal.run(), name="renew-certificate")
            group.create_task(self.appointments.run(), name="appoint-issuers")
            group.create_task(self.removals.run(), name="keep-revocations")
            group.create_task(self._accept_appointments(), name="become-issuer")
            group.create_task(self._watch(), name="watch-certificates")
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Write down what was heard last."""
        try:
            await self.removals.save()
        except HexmeshError as error:
            log.error("revocations not saved reason=%s", error.one_line())

    # --- what peers say ---

    def receive(self, src: NodeId, message: TrustMessage) -> None:
        """A message of a member."""
        match message:
            case Appointed():
                self._on_appointed(message)
            case Renew():
                self._mesh.send_trust(src, self._answer(src, message))
            case Renewed() | RenewRefused():
                self.renewal.hear(src, message)
            case Revoked():
                self.removals.learn(message.revocation)
            case _:
                assert_never(message)

    def peer_up(self, node: NodeId) -> None:
        """A peer has come: it may not have heard of every removal; and it may be an issuer."""
        self.removals.tell_all_to(node)
        self.renewal.look_now()

    async def admit(self, request: JoinRequest) -> JoinAccepted | JoinRefused:
        """The answer to a stranger that asks to join."""
        return await self.admission.admit(request)

    def judge(self, member: MemberIdentity) -> PeerRefused | None:
        """Why a member is refused, by the newest certificate known of it; None if it is not."""
        newest = self._mesh.identity_of(member.node_id)
        if newest is not None and newest.not_after > member.not_after:
            member = newest
        refusal = self.removals.judge(member)
        if refusal is None and member.validity.standing(self._now()) == "expired":
            message = f"the certificate of node {short(member.node_id)} expired, grace included"
            return PeerRefused(code="certificate_expired", message=message, next_step=VOID_STEP)
        return refusal

    # --- what operators ask ---

    async def remove(self, name_or_id: str) -> Removed:
        """Remove a node from the mesh for good. Raises HexmeshError.

        A whole id is taken at its word: the node may have been gone for long.
        """
        names = {one.node_id: one.name for one in self._everybody()}
        node = NodeId(name_or_id if is_node_id(name_or_id) else find_node(names, name_or_id))
        name = names.get(node, short(node))
        if node == self._node_id:
            raise InvalidInput(
                "a node does not remove itself",
                next_step="run `hexmesh leave --forget` here, or remove it on another issuer",
            )
        if node in self.removals.revoked:
            raise InvalidInput(f"node {name} ({short(node)}) is removed already")
        issuer = await asyncio.to_thread(self._revoker)
        members = [NodeId(one.node_id) for one in self._everybody()]
        await self.removals.revoke(issuer, node, members)
        return Removed(id=node, name=name)

    # --- what views show ---

    def certificate(self) -> CertificateView:
        """This node's own."""
        identity, now = self.credentials.identity, self._now()
        return CertificateView(
            state=_shown(identity, now),
            expires_s=(identity.validity.expires_at - now).total_seconds(),
            refused_s=(identity.validity.refused_at - now).total_seconds(),
            issuer=identity.issuer_id,
        )

    def certificate_state(self, node: str) -> CertificateState | None:
        """A member's, by its newest record; None where that is not known."""
        identity = self._mesh.identity_of(node)
        return _shown(identity, self._now()) if identity is not None else None

    def is_issuer(self, node: str) -> bool:
        """Whether the node has proven to be one."""
        identity = self._mesh.identity_of(node)
        return identity is not None and identity.is_issuer

    # --- parts ---

    def _now_unix_s(self) -> float:
        return self._now().timestamp()

    def _tell(self, node: NodeId | None, message: Revoked) -> None:
        for one in self._mesh.nodes_up() if node is None else (node,):
            self._mesh.send_trust(one, message)

    def _on_revoked(self, nodes: frozenset[NodeId]) -> None:
        self._mesh.on_nodes_removed(nodes - {self._node_id})
        refusal = self.removals.judge(self.credentials.identity)
        if refusal is not None:
            self._mesh.cast_out(Refused(refusal.message, code=refusal.code, next_step=refusal.next_step))
        self.renewal.look_now()

    def _on_appointed(self, message: Appointed) -> None:
        if self.credentials.issuer is None and self._appointment_wanted.empty():
            self._appointment_wanted.put_nowait(message.certificate)

    async def _accept_appointments(self) -> NoReturn:
        while True:
            certificate = await self._appointment_wanted.get()
            try:
                await self.credentials.accept_appointment(certificate)
            except HexmeshError as error:
                log.warning("appointment as an issuer refused reason=%s", error.one_line())
            self.admission.issuer = self.credentials.issuer

    async def _watch(self) -> NoReturn:
        """Close what expired, and name members that run on grace, each once an hour."""
        while True:
            self._mesh.review_connections()
            now = self._now()
            others = [self._mesh.identity_of(node) for node in self._mesh.nodes_up()]
            for identity in (one for one in others if one is not None):
                in_grace = identity.validity.standing(now) == "grace"
                if in_grace and self._reminder.is_due(identity.node_id, now.timestamp()):
                    log.warning(
                        "certificate in grace node=%s expired=%s refused_from=%s "
                        "next_step=see that it reaches an issuer",
                        short(identity.node_id),
                        f"{identity.validity.expires_at:%Y-%m-%d %H:%M:%S}",
                        f"{identity.validity.refused_at:%Y-%m-%d %H:%M:%S} UTC",
                    )
            await asyncio.sleep(REVIEW_S)

    def _answer(self, src: NodeId, message: Renew) -> Renewed | RenewRefused:
        """A member may renew its own certificate only; it proved to hold the key when it connected."""
        try:
            shown = self.credentials.identify(message.chain)
        except Refused as error:
            return RenewRefused(code=error.code, message=error.message, next_step=error.next_step)
        if shown.node_id != src:
            return RenewRefused(
                code="bad_certificate", message="this is not the certificate of the one who asks"
            )
        return self.renewal.answer(shown)

    def _members_up(self) -> list[MemberIdentity]:
        nodes = [self._node_id, *self._mesh.nodes_up()]
        return [identity for node in nodes if (identity := self._mesh.identity_of(node)) is not None]

    def _issuers_up(self) -> list[MemberAddress]:
        up = {one.node_id for one in self._members_up() if one.is_issuer}
        return [one for one in self._mesh.member_addresses() if one.node_id in up]

    def _everybody(self) -> list[MemberAddress]:
        """Nodes seen lately, then those that were members when this was last written down."""
        known = {one.node_id: one for one in self.credentials.membership.members}
        known |= {one.node_id: one for one in self._mesh.member_addresses()}
        return list(known.values())

    def _revoker(self) -> Issuer:
        """The strongest word that this node has: the root's if its key lies here, else its own as an issuer."""
        word = self._authority() or self.credentials.issuer
        if word is None:
            others = " or ".join(one.name for one in self._issuers_up()[:3]) or "an issuer"
            raise NotReady(
                "this node may not remove others: it is no issuer",
                code="not_an_issuer",
                next_step=f"run `hexmesh node remove` on {others}",
            )
        return word


def _shown(identity: MemberIdentity, now: datetime) -> CertificateState:
    """A certificate that is due for renewal is as good as a fresh one."""
    match identity.validity.standing(now):
        case "fresh" | "due":
            return "valid"
        case "grace":
            return "grace"
        case "expired":
            return "expired"
