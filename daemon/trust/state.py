"""The state folder: a node's key, its membership, its tokens, and a lock so that two daemons cannot share it.

The folder is readable by its owner alone. Every file is replaced as a whole and is on the disk before the
call returns. The membership file is written last and deleted first: where it is, the rest is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from daemon.peering.tls import TlsFiles
from daemon.runfile import ADMIN_KEY_FILE
from daemon.trust.ports import Ports
from hexmesh.cluster import Availability
from hexmesh.errors import HexmeshError, InvalidInput
from hexmesh.identity.authority import Issuer, MeshAuthority
from hexmesh.identity.certificates import to_pem
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.tokens import TokenLedger
from hexmesh.ids import NodeId
from hexmesh.wire.peering import MemberAddress, ModelReference

_log = logging.getLogger("hexmesh.state")

_NODE_KEY = "node.key"
_AUTHORITY_KEY = "authority.key"
_CERTIFICATE = "certificate.pem"
_MEMBERSHIP = "membership.json"
_TOKENS = "tokens.json"
_TERM = "term.json"
_AVAILABILITY = "availability.json"
_PORTS = "ports.json"
_REVOCATIONS = "revocations.json"
_APPOINTED = "appointed.json"
_DHT_IDENTITY = "dht.key"
_LOCK = "lock"
_OF_MEMBERSHIP = (
    *(_MEMBERSHIP, _AUTHORITY_KEY, _TOKENS, _CERTIFICATE, _TERM),
    *(_AVAILABILITY, _REVOCATIONS, _APPOINTED),
)

T = TypeVar("T")


class StateInUse(HexmeshError):
    """Another daemon runs on this state folder."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """What makes this node a member, and where to find the others after a restart."""

    mesh_id: str
    root_der: bytes
    certificates: list[bytes]
    """This node's certificate, then issuers'; DER."""
    model: ModelReference
    dtype: str
    members: list[MemberAddress] = []
    """Cached peers: who was there when this was written last."""
    dht_initial_peers: list[str] = []
    issuer_der: bytes = b""
    """This node's issuer certificate; empty where it is none."""


class _Kept(msgspec.Struct, frozen=True):
    availability: Availability


class StateFolder:
    """Owner of the folder while entered. Its methods wait for the disk: call them in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Make the folder if there is none, and lock it. Raises StateInUse or InvalidInput."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(
                f"state folder {self.path} cannot be used: {error.strerror}",
                code="bad_state_dir",
                next_step="give a folder that this user owns with --state-dir",
            ) from error
        try:
            # A POSIX lock: unlike flock it is not inherited by forked children that outlive the daemon.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise StateInUse(
                f"state folder {self.path} is in use by another daemon" + (f", process {pid}" if pid else ""),
                code="state_in_use",
                next_step="stop it, or give this one a folder of its own with --state-dir",
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        self._lock = lock
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def dht_identity_file(self) -> Path:
        """Where the DHT process keeps its key."""
        return self.path / _DHT_IDENTITY

    def node_key(self) -> NodeKey:
        """This node's key, made at the first call. Raises InvalidInput."""
        pem = self._read(_NODE_KEY)
        if pem is not None:
            return NodeKey.from_pem(pem)
        key = NodeKey.generate()
        self._write(_NODE_KEY, key.to_pem())
        return key

    def admin_key(self) -> str:
        """The key for routes that change the mesh, made at the first call."""
        text = self._read(ADMIN_KEY_FILE)
        if text is not None and text.strip():
            return text.decode("ascii", "replace").strip()
        key = secrets.token_urlsafe(32)
        self._write(ADMIN_KEY_FILE, key.encode("ascii") + b"\n")
        return key

    def membership(self) -> Membership | None:
        """The stored membership; None if this node is in no mesh. Raises InvalidInput for a damaged file."""
        return self._read_json(_MEMBERSHIP, Membership)

    def save_membership(self, membership: Membership) -> None:
        """Become, or stay, a member."""
        self._write(_CERTIFICATE, to_pem(membership.certificates))
        self._write_json(_MEMBERSHIP, membership)

    def authority(self) -> MeshAuthority | None:
        """The mesh's authority where the root key lies, else None. The key may come and go at any time."""
        pem = self._read(_AUTHORITY_KEY)
        if pem is None or (membership := self.membership()) is None:
            return None
        return MeshAuthority.from_pem(pem, membership.root_der)

    def save_authority(self, authority: MeshAuthority) -> None:
        """Keep the root key; written before the membership."""
        self._write(_AUTHORITY_KEY, authority.key_to_pem())

    def issuer(self) -> Issuer | None:
        """This node's right to admit and renew, where it has it. Raises InvalidInput or Refused."""
        membership = self.membership()
        if membership is None or not membership.issuer_der:
            return None
        return Issuer(self.node_key().private, membership.root_der, membership.issuer_der)

    def revocations(self) -> list[bytes]:
        """Every revocation heard of, as it travels."""
        return self._read_json(_REVOCATIONS, list[bytes]) or []

    def save_revocations(self, signed: Sequence[bytes]) -> None:
        self._write_json(_REVOCATIONS, list(signed))

    def appointed(self) -> list[NodeId]:
        """The nodes that this node made issuers with the root key, in order."""
        return [NodeId(node) for node in self._read_json(_APPOINTED, list[str]) or []]

    def save_appointed(self, nodes: Sequence[NodeId]) -> None:
        self._write_json(_APPOINTED, list(nodes))

    def ledger(self) -> TokenLedger:
        """The tokens minted here. Raises InvalidInput for a damaged file."""
        return self._read_json(_TOKENS, TokenLedger) or TokenLedger()

    def save_ledger(self, ledger: TokenLedger) -> None:
        """On the disk when this returns: only then may a certificate leave."""
        self._write_json(_TOKENS, ledger)

    def highest_term(self) -> int:
        """The highest coordination term seen before; 0 if none was."""
        return self._read_json(_TERM, int) or 0

    def save_highest_term(self, term: int) -> None:
        self._write_json(_TERM, term)

    def availability(self) -> Availability:
        """Whether plans may use this node, by its operator's last word. Raises InvalidInput for a damaged file."""
        kept = self._read_json(_AVAILABILITY, _Kept)
        return kept.availability if kept is not None else "active"

    def save_availability(self, availability: Availability) -> None:
        """On the disk when this returns: the word outlives the process."""
        self._write_json(_AVAILABILITY, _Kept(availability))

    def ports(self) -> Ports:
        """Where this node listened before."""
        return self._read_json(_PORTS, Ports) or Ports()

    def save_ports(self, ports: Ports) -> None:
        self._write_json(_PORTS, ports)

    def tls_files(self, membership: Membership) -> TlsFiles:
        """The key and certificate as TLS contexts load them."""
        return TlsFiles(self.path / _NODE_KEY, self.path / _CERTIFICATE, membership.root_der)

    def forget(self) -> None:
        """Delete the membership, tokens and authority. The node keeps its key, and so its id."""
        for name in _OF_MEMBERSHIP:
            (self.path / name).unlink(missing_ok=True)
        self._sync_folder()
        _log.info("membership deleted folder=%s", self.path)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidInput(f"{self.path / name} cannot be read: {error.strerror}") from error

    def _read_json(self, name: str, kind: type[T]) -> T | None:
        data = self._read(name)
        if data is None:
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as error:
            raise InvalidInput(
                f"{self.path / name} is damaged: {error}",
                code="damaged_state",
                next_step="restore it from a backup, or delete the folder and join again with a new token",
            ) from error

    def _write_json(self, name: str, value: object) -> None:
        self._write(name, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")

    def _write(self, name: str, data: bytes) -> None:
        unfinished = self.path / f".{name}.unfinished"
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o600)
                file.write(data)
                file.flush()
                os.fsync(handle)
            unfinished.replace(self.path / name)
            self._sync_folder()
        except OSError as error:
            raise HexmeshError(
                f"{self.path / name} cannot be written: {error.strerror}",
                code="state_not_written",
                next_step="free space on the disk, or correct the folder's owner",
            ) from error

    def _sync_folder(self) -> None:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
