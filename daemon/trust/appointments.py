"""Where the root key lies, the mesh's first nodes are made issuers as soon as they are up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from daemon.trust.credentials import Now, utc_now
from daemon.trust.state import StateFolder
from hexmesh.errors import HexmeshError
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.identity.issuers import whom_to_appoint
from hexmesh.ids import NodeId, short
from hexmesh.wire.trust import Appointed

log = logging.getLogger("hexmesh.trust")

LOOK_S = 1.0


class Appointments:
    """Owner of the list of appointed nodes. The root key is read for each appointment and not kept in memory."""

    def __init__(
        self,
        state: StateFolder,
        *,
        members_up: Callable[[], Sequence[MemberIdentity]],
        revoked: Callable[[], Collection[NodeId]],
        send: Callable[[NodeId, Appointed], None],
        now: Now = utc_now,
    ) -> None:
        """Raises InvalidInput for a damaged state folder."""
        self._state = state
        self._members_up = members_up
        self._revoked = revoked
        self._send = send
        self._now = now
        self._appointed = state.appointed()

    async def run(self) -> NoReturn:
        """Look around now and then. The root key may be taken away and brought back at any time."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Appoint whom there is to appoint."""
        wanted = whom_to_appoint(self._members_up(), self._appointed, self._revoked())
        if not wanted:
            return
        try:
            certificates = await asyncio.to_thread(self._appoint, wanted)
        except HexmeshError as error:
            log.error("no issuer appointed reason=%s", error.one_line())
            await asyncio.sleep(LOOK_S)
            return
        for node, certificate in certificates:
            log.info("issuer appointed node=%s", short(node))
            self._send(node, Appointed(certificate=certificate))

    def _appoint(self, wanted: Sequence[MemberIdentity]) -> list[tuple[NodeId, bytes]]:
        """Certificates, with the nodes written down before any of them leaves."""
        authority = self._state.authority()
        if authority is None:
            return []
        new = [one.node_id for one in wanted if one.node_id not in self._appointed]
        if new:
            self._state.save_appointed([*self._appointed, *new])
            self._appointed = [*self._appointed, *new]
        return [(one.node_id, authority.appoint(one.public_bytes, self._now())) for one in wanted]
