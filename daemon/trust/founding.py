"""How a process becomes a member: it founds a mesh, joins one with a token, or rejoins the one it was in."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from daemon.compute.devices import DeviceSpec, choose_devices
from daemon.compute.inventory import take_inventory
from daemon.config import JoinOptions
from daemon.discovery.libp2p import ensure_identity
from daemon.models.mesh_model import Dial, LocalModel, find_model, load_model
from daemon.peering.address import (
    Address,
    bound_address,
    listen_tcp,
    parse_address,
)
from daemon.peering.bulk import BulkSocket
from daemon.peering.bulk_dial import BulkDialler
from daemon.peering.greeting import LocalPeer
from daemon.peering.listening import listen_host
from daemon.peering.outgoing import NoVerdicts
from daemon.peering.tls import client_context
from daemon.trust.admission import found_mesh
from daemon.trust.attestor import Attestor
from daemon.trust.joining import Joiner, join_mesh
from daemon.trust.ports import port_to_bind
from daemon.trust.rejoining import attestor_of, come_back
from daemon.trust.state import Membership, StateFolder
from daemon.trust.told_token import check_told_token, told_token
from hexmesh.cost import default_dtype
from hexmesh.errors import Refused
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import Revocations
from hexmesh.ids import NodeId, short
from hexmesh.wire.peering import MemberAddress

progress = logging.getLogger("hexmesh.progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """This process's membership and what it holds for it: the locked state folder and the listening socket."""

    state: StateFolder
    membership: Membership
    attestor: Attestor
    revocations: Revocations
    """What was known when the process started, and is learned since."""
    model: LocalModel
    devices: tuple[DeviceSpec, ...]
    listener: socket.socket
    address: Address
    """Where other nodes dial this one."""
    is_rejoined: bool

    @property
    def node_id(self) -> NodeId:
        return NodeId(self.attestor.node_id)

    @property
    def listen_host(self) -> str:
        return bound_address(self.listener).host


@asynccontextmanager
async def become_member(options: JoinOptions) -> AsyncIterator[Member]:
    """Found, join or rejoin. Raises HexmeshError naming what is in the way and what to do."""
    with StateFolder(options.state_dir) as state:
        known = await asyncio.to_thread(state.membership)
        check_told_token(options, known)
        host, before = listen_host(options), await asyncio.to_thread(state.ports)
        port = port_to_bind(host, options.peer_port, before.peer, flag="--peer-port")
        with listen_tcp(host, port, flag="--peer-port") as listener:
            yield await _member(options, state, known, listener)


async def _member(
    options: JoinOptions, state: StateFolder, known: Membership | None, listener: socket.socket
) -> Member:
    address = parse_address(options.advertise) if options.advertise else bound_address(listener)
    key = await asyncio.to_thread(state.node_key)
    dht_peer_id = await asyncio.to_thread(ensure_identity, state.dht_identity_file)
    devices = choose_devices(
        ",".join(options.device),
        await asyncio.to_thread(take_inventory),
        threads=options.threads,
        memory_bytes=options.memory_bytes,
    )

    async def join() -> Membership:
        return await _join(options, key, dht_peer_id, address)

    if known is not None:
        membership = await come_back(state, known, key, join if options.token is not None else None)
        model = await _find_model(options, state, key, membership)
        progress.info("rejoining mesh %s", short(known.mesh_id), extra={"event": "rejoining"})
    elif options.founds:
        model = await load_model(options.model, options)
        membership = await _found(options, state, key, dht_peer_id, model, devices)
    else:
        membership = await join()
        await asyncio.to_thread(state.save_membership, membership)
        model = await _find_model(options, state, key, membership)
        progress.info("joined mesh %s", short(membership.mesh_id), extra={"event": "joined"})
    _check_dtype(options, membership)
    revocations = Revocations(membership.root_der, await asyncio.to_thread(state.revocations))
    return Member(
        state=state,
        membership=membership,
        attestor=attestor_of(key, membership, revocations),
        revocations=revocations,
        model=model,
        devices=devices,
        listener=listener,
        address=address,
        is_rejoined=known is not None,
    )


async def _found(
    options: JoinOptions,
    state: StateFolder,
    key: NodeKey,
    dht_peer_id: str,
    model: LocalModel,
    devices: tuple[DeviceSpec, ...],
) -> Membership:
    dtype = options.dtype or default_dtype(spec.kind for spec in devices)
    now = datetime.now(UTC)
    membership = await asyncio.to_thread(found_mesh, state, key, dht_peer_id, model.reference, dtype, now)
    progress.info(
        "founded mesh %s for model %s in %s",
        short(membership.mesh_id),
        model.name,
        dtype,
        extra={"event": "mesh_founded"},
    )
    return membership


async def _join(options: JoinOptions, key: NodeKey, dht_peer_id: str, address: Address) -> Membership:
    token = told_token(options)
    peer = parse_address(options.peer) if options.peer else None
    progress.info("joining through %s", peer or token.address, extra={"event": "joining"})
    named = await load_model(options.model, options) if options.model is not None else None
    joiner = Joiner(
        key=key,
        dht_peer_id=dht_peer_id,
        name=options.name,
        address=str(address),
        model_id=named.id if named is not None else None,
    )
    return await join_mesh(joiner, token, peer)


async def _find_model(
    options: JoinOptions, state: StateFolder, key: NodeKey, membership: Membership
) -> LocalModel:
    others = [member for member in membership.members if member.node_id != key.node_id]
    return await find_model(options, membership.model, others, _dialler(options, state, key, membership))


def _dialler(options: JoinOptions, state: StateFolder, key: NodeKey, membership: Membership) -> Dial:
    """Bulk connections to members, before there is a network."""
    local = LocalPeer(
        node_id=NodeId(key.node_id), boot=1, name=options.name, address="", tls=state.tls_files(membership)
    )

    async def dial(member: MemberAddress) -> BulkSocket:
        dialler = BulkDialler(local, client_context(local.tls), NoVerdicts())
        return await dialler.dial(NodeId(member.node_id), parse_address(member.address))

    return dial


def _check_dtype(options: JoinOptions, membership: Membership) -> None:
    if options.dtype is not None and options.dtype != membership.dtype:
        raise Refused(
            f"this mesh computes in {membership.dtype}, not in {options.dtype}",
            code="dtype_mismatch",
            next_step="leave --dtype out",
        )
