"""What this node shows of itself while it runs: its membership on disk, its certificate, its right to issue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from daemon.trust.attestor import Attestor
from daemon.trust.state import Membership, StateFolder
from hexmesh.errors import Refused
from hexmesh.identity.authority import Issuer
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import short
from hexmesh.membership.records import Chain
from hexmesh.wire.peering import MemberAddress

log = logging.getLogger("hexmesh.trust")

Now = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Credentials:
    """Owner of the membership while the daemon runs. `on_renewed` is called once a new certificate is in place."""

    def __init__(
        self,
        state: StateFolder,
        membership: Membership,
        attestor: Attestor,
        *,
        on_renewed: Callable[[], None],
        now: Now = utc_now,
    ) -> None:
        """Raises HexmeshError for a damaged state folder."""
        self.membership = membership
        self.issuer = state.issuer()
        """This node's right to admit and renew; None where it has none."""
        self._state = state
        self._attestor = attestor
        self._on_renewed = on_renewed
        self._now = now
        self._saving = asyncio.Lock()

    @property
    def identity(self) -> MemberIdentity:
        return self._attestor.identity

    @property
    def chain(self) -> Chain:
        return self._attestor.chain

    def identify(self, chain: Chain) -> MemberIdentity:
        """Whom a chain names. Raises Refused."""
        return self._attestor.identify(chain)

    async def install(self, chain: Chain) -> None:
        """Show this certificate from now on. Raises Refused unless it is this node's; HexmeshError: not written."""
        identity = self._attestor.identify(chain)
        mine = self.identity
        if (identity.node_id, identity.dht_peer_id) != (mine.node_id, mine.dht_peer_id):
            raise Refused("the renewed certificate is another node's", code="bad_certificate")
        await self._save(certificates=list(chain))
        self._attestor.renew(chain)
        log.info("certificate renewed issuer=%s", short(identity.issuer_id or "the root"))
        self._on_renewed()

    async def renew_self(self) -> None:
        """As an issuer: certify this very node anew."""
        assert self.issuer is not None
        certificate = self.issuer.renew(self.identity, self._now())
        await self.install((certificate, *self.issuer.chain))

    async def accept_appointment(self, certificate: bytes) -> None:
        """Become an issuer. Raises Refused or InvalidInput unless the root certified this very node as one."""
        key = await asyncio.to_thread(self._state.node_key)
        issuer = Issuer(key.private, self.membership.root_der, certificate)
        await self._save(issuer_der=certificate)
        self.issuer = issuer
        log.info("this node is an issuer now: it admits others and renews certificates")
        await self.renew_self()

    async def remember(self, members: list[MemberAddress]) -> None:
        """Keep on disk whom to dial after a restart."""
        if members != self.membership.members:
            maddrs = [maddr for member in members for maddr in member.dht_maddrs]
            await self._save(members=members, dht_initial_peers=maddrs)

    async def _save(self, **changes: object) -> None:
        async with self._saving:
            membership = msgspec.structs.replace(self.membership, **changes)
            await asyncio.to_thread(self._state.save_membership, membership)
            self.membership = membership
