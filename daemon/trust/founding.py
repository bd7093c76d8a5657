"""How a process becomes a member: it founds a mesh, joins one with a token, or rejoins the one it was in."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from daemon.compute.devices import DeviceSpec, choose_devices
from daemon.compute.inventory import take_inventory
from daemon.config import JoinOptions
from daemon.discovery.libp2p import ensure_identity
from daemon.models.model_id import model_id
from daemon.models.model_source import SHIPPED_NAME, ModelFolder, resolve_model
from daemon.peering.address import (
    Address,
    bound_address,
    listen_tcp,
    parse_address,
)
from daemon.peering.listening import listen_host
from daemon.trust.admission import found_mesh
from daemon.trust.attestor import Attestor
from daemon.trust.joining import Joiner, join_mesh
from daemon.trust.rejoining import still_member
from daemon.trust.state import Membership, StateFolder
from hexmesh.architectures import check_supported
from hexmesh.cost import default_dtype
from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity.certificates import root_sha256
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import Revocations
from hexmesh.identity.tokens import JoinToken, parse_token
from hexmesh.ids import NodeId, short
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.units import show_bytes
from hexmesh.wire.peering import ModelReference

progress = logging.getLogger("hexmesh.progress")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The mesh's model with its files here."""

    id: str
    name: str
    files: ModelFolder
    spec: ModelSpec


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
        _check_token(options, known)
        with listen_tcp(listen_host(options), options.peer_port, flag="--peer-port") as listener:
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
    if known is not None:
        membership = await _come_back(options, state, key, dht_peer_id, address, known)
        model = await _find_model(options, membership.model)
        progress.info("rejoining mesh %s", short(known.mesh_id), extra={"event": "rejoining"})
    elif options.founds:
        model = await _load_model(options.model, options)
        membership = await _found(options, state, key, dht_peer_id, model, devices)
    else:
        membership = await _join(options, key, dht_peer_id, address)
        await asyncio.to_thread(state.save_membership, membership)
        model = await _find_model(options, membership.model)
        progress.info("joined mesh %s", short(membership.mesh_id), extra={"event": "joined"})
    _check_dtype(options, membership)
    revocations = Revocations(membership.root_der, await asyncio.to_thread(state.revocations))
    return Member(
        state=state,
        membership=membership,
        attestor=Attestor(
            key,
            tuple(membership.certificates),
            membership.root_der,
            is_refused=lambda member: revocations.grounds(member) is not None,
        ),
        revocations=revocations,
        model=model,
        devices=devices,
        listener=listener,
        address=address,
        is_rejoined=known is not None,
    )


async def _come_back(
    options: JoinOptions,
    state: StateFolder,
    key: NodeKey,
    dht_peer_id: str,
    address: Address,
    known: Membership,
) -> Membership:
    """The stored membership; where its certificate is good no more, a token may bring a new one."""
    try:
        return await asyncio.to_thread(still_member, state, known, key, datetime.now(UTC))
    except Refused as refused:
        if options.token is None or refused.code == "removed":
            raise
        progress.info("joining anew: %s", refused.message, extra={"event": "joining_anew"})
    membership = await _join(options, key, dht_peer_id, address)
    await asyncio.to_thread(state.save_membership, membership)
    return membership


async def _found(
    options: JoinOptions,
    state: StateFolder,
    key: NodeKey,
    dht_peer_id: str,
    model: LocalModel,
    devices: tuple[DeviceSpec, ...],
) -> Membership:
    reference = ModelReference(name=model.name, model_id=model.id, root=_root_of(model.files))
    dtype = options.dtype or default_dtype(spec.kind for spec in devices)
    now = datetime.now(UTC)
    membership = await asyncio.to_thread(found_mesh, state, key, dht_peer_id, reference, dtype, now)
    progress.info(
        "founded mesh %s for model %s in %s",
        short(membership.mesh_id),
        model.name,
        dtype,
        extra={"event": "mesh_founded"},
    )
    return membership


async def _join(options: JoinOptions, key: NodeKey, dht_peer_id: str, address: Address) -> Membership:
    token = _token(options)
    peer = parse_address(options.peer) if options.peer else None
    progress.info("joining through %s", peer or token.address, extra={"event": "joining"})
    named = await _load_model(options.model, options) if options.model is not None else None
    joiner = Joiner(
        key=key,
        dht_peer_id=dht_peer_id,
        name=options.name,
        address=str(address),
        model_id=named.id if named is not None else None,
    )
    return await join_mesh(joiner, token, peer)


async def _find_model(options: JoinOptions, reference: ModelReference) -> LocalModel:
    """The mesh's model on this host: where --model says, else where the founder has it. Must be the same."""
    try:
        model = await _load_model(options.model or reference.root, options)
    except InvalidInput as error:
        if options.model is not None:
            raise
        raise InvalidInput(
            f"the mesh's model {reference.name} is not at {reference.root} on this host: {error.message}",
            code="model_not_here",
            next_step="copy its folder here and give its place with --model",
        ) from error
    if model.id != reference.model_id:
        raise Refused(
            f"the model at {model.files.folder} ({short(model.id)}) is not the mesh's "
            f"{reference.name} ({short(reference.model_id)})",
            code="model_mismatch",
            next_step="give --model the folder that holds the mesh's model",
        )
    return LocalModel(id=model.id, name=reference.name, files=model.files, spec=model.spec)


async def _load_model(text: str | None, options: JoinOptions) -> LocalModel:
    """Find the model's files and judge its architecture before anything else is done with it."""
    source = None if text in (None, SHIPPED_NAME) else text
    files = await asyncio.to_thread(resolve_model, source, progress=DownloadProgress())
    check_supported(files.config)
    spec = model_spec_from_config(files.config, generation_config=files.generation_config)
    digest = await asyncio.to_thread(model_id, files, options.state_dir)
    return LocalModel(id=digest, name=options.served_name or files.name, files=files, spec=spec)


class DownloadProgress:
    """Logs a download at each tenth; called from the download's threads."""

    def __init__(self) -> None:
        self._told_tenths = -1

    def __call__(self, n_done_bytes: int, n_total_bytes: int) -> None:
        tenths = 10 * n_done_bytes // max(1, n_total_bytes)
        if tenths > self._told_tenths:
            self._told_tenths = tenths
            progress.info(
                "downloading the model: %s of %s", show_bytes(n_done_bytes), show_bytes(n_total_bytes)
            )


def _root_of(files: ModelFolder) -> str:
    """The model as other hosts should look for it: an absolute folder, or a name that means the same everywhere."""
    return (
        str(Path(files.root).expanduser().resolve()) if Path(files.root).expanduser().is_dir() else files.root
    )


def _token(options: JoinOptions) -> JoinToken:
    if options.token is None:
        raise InvalidInput(
            "joining needs a token",
            code="no_token",
            next_step="get one with `hexmesh token create` on a member, and give it in HEXMESH_TOKEN or --token-file",
        )
    return parse_token(options.token)


def _check_token(options: JoinOptions, known: Membership | None) -> None:
    """A member keeps its mesh: a token for it is not needed, one for another mesh is a mistake."""
    if known is None or options.token is None:
        return
    if parse_token(options.token).root_sha256 != root_sha256(known.root_der):
        raise Refused(
            f"{options.state_dir} belongs to a member of mesh {short(known.mesh_id)}, and the token is for another",
            code="other_mesh",
            next_step="leave that mesh with `hexmesh leave --forget`, or give another --state-dir",
        )


def _check_dtype(options: JoinOptions, membership: Membership) -> None:
    if options.dtype is not None and options.dtype != membership.dtype:
        raise Refused(
            f"this mesh computes in {membership.dtype}, not in {options.dtype}",
            code="dtype_mismatch",
            next_step="leave --dtype out",
        )
