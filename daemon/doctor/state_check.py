"""Can a daemon use the state folder, and does what it holds still make sense? Nothing in it is changed."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from daemon.discovery.libp2p import peer_id_of
from daemon.doctor.finding import Finding, failed, not_run, passed, warned
from daemon.peering.tls import client_context
from daemon.runfile import ADMIN_KEY_FILE, Run
from daemon.trust.removals import refusal_of
from daemon.trust.state import Membership, StateFolder
from hexmesh.errors import HexmeshError, InvalidInput
from hexmesh.identity.certificates import MemberIdentity, verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import Revocations
from hexmesh.ids import short
from hexmesh.units import show_bytes

_NODE_KEY, _DHT_KEY, _LOCK = "node.key", "dht.key", "lock"
_SECRETS = (_NODE_KEY, "authority.key", _DHT_KEY, ADMIN_KEY_FILE)
_OTHERS = 0o077
_LEAST_FREE_BYTES = 16 * 2**20
_LITTLE_FREE_BYTES = 256 * 2**20
_AGAIN = "restore it from a backup, or delete the folder and join again with a new token"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a state folder holds that could be read. A node that never joined has no membership."""

    key: NodeKey | None = None
    membership: Membership | None = None


def check_state_folder(path: Path, user_id: int, run: Run | None) -> Finding:
    """Owner, rights and lock. `run` is the daemon that says it runs there."""
    check = "state folder"
    if not os.path.exists(path):
        parent = existing_parent(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            return failed(
                check,
                f"{path} is not there and cannot be made in {parent}",
                "give a folder that this user owns with --state-dir",
            )
        return passed(check, f"{path} will be made")
    if not path.is_dir():
        return failed(check, f"{path} is not a folder", "give another with --state-dir")
    status = path.stat()
    if status.st_uid != user_id:
        return failed(
            check,
            f"{path} belongs to user {status.st_uid}, and this is user {user_id}",
            "run as its owner, correct the owner with chown -R, or give another with --state-dir",
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return failed(check, f"{path} is not writable (mode {_mode(path)})", f"chmod 700 {path}")
    return _check_rights(path) or _check_lock(path, run)


def read_stored(path: Path) -> tuple[Stored, Finding]:
    """What the folder holds, and whether any of its files is damaged."""
    check, folder = "state files", StateFolder(path)
    try:
        key_pem = _read(path / _NODE_KEY)
        key = NodeKey.from_pem(key_pem) if key_pem is not None else None
    except InvalidInput as error:
        return Stored(), failed(check, f"{path / _NODE_KEY}: {error.message}", _AGAIN)
    try:
        membership = folder.membership()
    except HexmeshError as error:
        return Stored(key), failed(check, error.message, error.next_step or _AGAIN)
    stored = Stored(key, membership)
    try:
        folder.ledger()
        folder.highest_term()
        folder.revocations()
        folder.appointed()
        _read(path / ADMIN_KEY_FILE)
        _check_dht_key(path)
    except HexmeshError as error:
        return stored, failed(check, error.message, error.next_step or _AGAIN)
    try:
        folder.authority()
    except HexmeshError as error:
        return stored, failed(check, f"{path / 'authority.key'}: {error.message}", error.next_step or _AGAIN)
    if membership is not None and key is None:
        return stored, failed(check, f"{path} holds a membership and no {_NODE_KEY}", _AGAIN)
    if membership is None:
        return stored, passed(check, "no membership: this node founds a mesh or joins one")
    return stored, passed(check, f"a member of mesh {short(membership.mesh_id)}")


def check_certificate(path: Path, stored: Stored, now: datetime) -> Finding:
    """Is the certificate valid now, under the mesh's root, and this node's own?"""
    check, membership = "certificate", stored.membership
    if membership is None or stored.key is None:
        return not_run(check, "there is no membership with its key")
    try:
        identity = verify_member(membership.certificates, membership.root_der, now)
        refusal = refusal_of(Revocations(membership.root_der, StateFolder(path).revocations()), identity)
    except HexmeshError as error:
        if error.code == "certificate_expired" and membership.issuer_der:
            return passed(check, "expired; this node is an issuer and renews it when it starts")
        return failed(check, error.message, error.next_step)
    if refusal is not None:
        return failed(check, refusal.message, refusal.next_step)
    if identity.node_id != stored.key.node_id:
        return failed(
            check,
            f"the certificate belongs to another key: it names node {short(identity.node_id)}, "
            f"and {path / _NODE_KEY} is that of {short(stored.key.node_id)}",
            "restore the folder as a whole, or delete it and join again with a new token; never copy "
            "one node's folder to another",
        )
    if _dht_peer_id(path) not in (None, identity.dht_peer_id):
        return failed(check, f"the certificate names another DHT key than {path / _DHT_KEY}", _AGAIN)
    try:
        client_context(StateFolder(path).tls_files(membership))
    except OSError as error:  # ssl.SSLError is one
        return failed(check, f"TLS does not take {path / 'certificate.pem'}: {error}", _AGAIN)
    return _check_age(identity, now, is_issuer=bool(membership.issuer_der))


def _check_age(identity: MemberIdentity, now: datetime, *, is_issuer: bool) -> Finding:
    check, validity = "certificate", identity.validity
    if is_issuer:
        return passed(
            check, f"an issuer's own, renewed at each start; valid until {_moment(validity.expires_at)}"
        )
    if validity.standing(now) == "grace":
        return warned(
            check,
            f"expired at {_moment(validity.expires_at)}; others accept it until {_moment(validity.refused_at)}",
            "start this node while an issuer is up: it renews the certificate",
        )
    return passed(check, f"valid until {_moment(validity.expires_at)}, renewed while the daemon runs")


def check_disk(path: Path, free_bytes: Callable[[Path], int]) -> Finding:
    """Room for what a daemon writes into its state folder."""
    check, n_free = "disk", free_bytes(existing_parent(path))
    said = f"{show_bytes(n_free)} are free where {path} is"
    if n_free < _LEAST_FREE_BYTES:
        return failed(check, said, "free space, or give a folder on another disk with --state-dir")
    if n_free < _LITTLE_FREE_BYTES:
        return warned(check, said, "free space before the disk is full")
    return passed(check, said)


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next((one for one in (path, *path.parents) if os.path.exists(one)), Path("/"))


def _check_rights(path: Path) -> Finding | None:
    if not path.stat().st_mode & _OTHERS:
        return None
    for name in _SECRETS:
        file = path / name
        if file.exists() and file.stat().st_mode & _OTHERS:
            return failed(
                "state folder",
                f"others may read {file} (mode {_mode(file)}, the folder {_mode(path)})",
                f"chmod 700 {path} && chmod 600 {file}; if others had access to this machine, join anew",
            )
    return warned(
        "state folder", f"others may look into {path} (mode {_mode(path)})", "join closes it: chmod 700"
    )


def _check_lock(path: Path, run: Run | None) -> Finding:
    holder = _lock_holder(path / _LOCK)
    if run is not None:
        return passed("state folder", f"{path} is used by this host's daemon, process {run.pid}")
    if holder is not None:
        return warned(
            "state folder",
            f"{path} is locked by process {holder or 'unknown'}, which says nothing of HTTP: it starts or ends",
            "wait for it, or stop it; a second daemon needs a --state-dir of its own",
        )
    return passed("state folder", f"{path} is this user's, mode {_mode(path)}")


def _lock_holder(lock: Path) -> str | None:
    """The process id that the lock file tells while somebody holds it; None when nobody does.

    A shared lock is taken and given back at once: it shows a daemon's exclusive one.
    """
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        held = error.errno in (errno.EACCES, errno.EAGAIN)
        return os.pread(handle, 20, 0).decode("ascii", "replace").strip() if held else None
    finally:
        os.close(handle)
    return None


def _check_dht_key(path: Path) -> None:
    data = _read(path / _DHT_KEY)
    if data is not None and _dht_peer_id(path) is None:
        raise InvalidInput(f"{path / _DHT_KEY} is damaged", next_step=_AGAIN)


def _dht_peer_id(path: Path) -> str | None:
    """The libp2p peer id of the folder's DHT key; None where there is none that can be read."""
    try:
        data = _read(path / _DHT_KEY)
        return peer_id_of(data) if data is not None else None
    except (InvalidInput, ValueError):
        return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", next_step=_AGAIN) from None


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):o}"
