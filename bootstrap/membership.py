"""How a bootstrap node becomes a member: it joins with a token, or comes back; it needs no model's files."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from daemon.config import JoinOptions
from daemon.discovery.libp2p import ensure_identity
from daemon.peering.address import Address, bound_address, listen_tcp, parse_address
from daemon.peering.listening import listen_host
from daemon.trust.attestor import Attestor
from daemon.trust.joining import Joiner, join_mesh
from daemon.trust.rejoining import attestor_of, come_back
from daemon.trust.state import Membership, StateFolder
from daemon.trust.told_token import check_told_token, told_token
from hexmesh.identity.revocations import Revocations
from hexmesh.ids import NodeId, short

progress = logging.getLogger("hexmesh.progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapMember:
    """The membership and what this process holds for it: the locked state folder and the listening socket."""

    state: StateFolder
    membership: Membership
    attestor: Attestor
    revocations: Revocations
    """What was known when the process started, and is learned since."""
    listener: socket.socket
    address: Address
    """Where other nodes dial this one."""

    @property
    def node_id(self) -> NodeId:
        return NodeId(self.attestor.node_id)


@asynccontextmanager
async def become_bootstrap_member(options: JoinOptions) -> AsyncIterator[BootstrapMember]:
    """Join or rejoin. Raises HexmeshError naming what is in the way and what to do."""
    with StateFolder(options.state_dir) as state:
        known = await asyncio.to_thread(state.membership)
        check_told_token(options, known)
        with listen_tcp(listen_host(options), options.peer_port, flag="--peer-port") as listener:
            address = parse_address(options.advertise) if options.advertise else bound_address(listener)
            key = await asyncio.to_thread(state.node_key)

            async def join() -> Membership:
                return await _join(options, state, address)

            if known is not None:
                progress.info("rejoining mesh %s", short(known.mesh_id), extra={"event": "rejoining"})
                membership = await come_back(state, known, key, join if options.token is not None else None)
            else:
                membership = await join()
                await asyncio.to_thread(state.save_membership, membership)
            revocations = Revocations(membership.root_der, await asyncio.to_thread(state.revocations))
            yield BootstrapMember(
                state=state,
                membership=membership,
                attestor=attestor_of(key, membership, revocations),
                revocations=revocations,
                listener=listener,
                address=address,
            )


async def _join(options: JoinOptions, state: StateFolder, address: Address) -> Membership:
    token = told_token(options)
    peer = parse_address(options.peer) if options.peer else None
    progress.info("joining through %s", peer or token.address, extra={"event": "joining"})
    joiner = Joiner(
        key=await asyncio.to_thread(state.node_key),
        dht_peer_id=await asyncio.to_thread(ensure_identity, state.dht_identity_file),
        name=options.name,
        address=str(address),
    )
    membership = await join_mesh(joiner, token, peer)
    progress.info("joined mesh %s", short(membership.mesh_id), extra={"event": "joined"})
    return membership
