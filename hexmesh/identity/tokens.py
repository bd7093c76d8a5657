"""Join tokens: one line that a person copies from a member to a new host.

A token holds where to dial, the SHA-256 of the mesh's root certificate (so that a man in the middle is
noticed before the secret is sent), the node that minted it and alone can redeem it, and the secret. The
issuer keeps only a hash of the secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from typing import Literal

import msgspec

from hexmesh.errors import InvalidInput, Refused
from hexmesh.ids import NodeId, is_node_id, short

TokenFault = Literal["token_unknown", "token_expired", "token_spent"]

SECRET_BYTES = 20
MIN_SECRET_BYTES = 16
KEEP_DEAD_S = 7 * 86400.0
"""A spent or expired token is remembered this long, so that its holder is told what is wrong with it."""

_PREFIX = "hm1_"
_FORMAT = re.compile(_PREFIX + r"[A-Za-z0-9_-]+")
_CHECK_BYTES = 4
_NEXT_STEP = "ask for a new token: `hexmesh token create` on a member"


class TokenRefused(Refused):
    """The token is not, or no longer, good here; `fault` says which."""

    def __init__(self, fault: TokenFault, message: str) -> None:
        super().__init__(message, code=fault, next_step=_NEXT_STEP)
        self.fault = fault


class JoinToken(msgspec.Struct, frozen=True, array_like=True):
    """What a token says. Its repr leaves the secret out."""

    address: str
    """A member to dial, host:port."""
    root_sha256: bytes
    issuer: bytes
    """Node id of the minting issuer, 20 bytes."""
    secret: bytes

    @property
    def issuer_id(self) -> NodeId:
        return NodeId(self.issuer.hex())

    def __repr__(self) -> str:
        return f"JoinToken(address={self.address!r}, issuer={short(self.issuer.hex())})"


def make_token(address: str, root_sha256: bytes, issuer: NodeId, secret: bytes) -> JoinToken:
    """A token of checked parts. Raises InvalidInput."""
    if not is_node_id(issuer):
        raise InvalidInput(f"{issuer!r} is not a node id")
    token = JoinToken(address, root_sha256, bytes.fromhex(issuer), secret)
    _check(token)
    return token


def format_token(token: JoinToken) -> str:
    """The token as one word, `hm1_` and base64url."""
    body = msgspec.msgpack.encode(token)
    text = base64.urlsafe_b64encode(body + _checksum(body)).rstrip(b"=").decode("ascii")
    return _PREFIX + text


def parse_token(text: str) -> JoinToken:
    """The token in a copied line. Raises InvalidInput, without repeating what was given."""
    word = text.strip()
    if not word.startswith(_PREFIX):
        raise _bad_token(f"it does not begin with {_PREFIX}")
    if not _FORMAT.fullmatch(word):
        raise _bad_token("it has characters that no token has")
    digits = word.removeprefix(_PREFIX)
    try:
        packed = base64.b64decode(digits + "=" * (-len(digits) % 4), altchars=b"-_", validate=True)
        body, checksum = packed[:-_CHECK_BYTES], packed[-_CHECK_BYTES:]
        if checksum != _checksum(body):
            raise _bad_token("its checksum is wrong, so it was cut or changed on the way")
        token = msgspec.msgpack.decode(body, type=JoinToken)
    except (binascii.Error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad_token("it was cut or changed on the way") from error
    _check(token)
    return token


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the issuer remembers of a token; the secret cannot be had from it."""

    secret_sha256: bytes
    expires_unix_s: float
    uses: int
    redeemed_by: tuple[str, ...] = ()
    """Node ids that joined with it, in order."""
    is_revoked: bool = False

    @property
    def token_id(self) -> str:
        """A name for lists and logs that gives nothing away."""
        return self.secret_sha256.hex()[:12]

    @property
    def uses_left(self) -> int:
        return max(0, self.uses - len(self.redeemed_by))


class TokenLedger(msgspec.Struct, frozen=True):
    """All tokens that this issuer minted: a value; every change gives the next one."""

    records: tuple[TokenRecord, ...] = ()

    def mint(self, secret: bytes, *, now_unix_s: float, ttl_s: float, uses: int) -> TokenLedger:
        """The ledger with one more token. Raises InvalidInput."""
        if len(secret) < MIN_SECRET_BYTES:
            raise InvalidInput(f"a token's secret has at least {MIN_SECRET_BYTES} bytes, not {len(secret)}")
        if not 0 < ttl_s < float("inf"):
            raise InvalidInput(
                f"a token's time to live is positive, not {ttl_s} s", next_step="give --ttl 1h"
            )
        if uses < 1:
            raise InvalidInput(f"a token has at least one use, not {uses}", next_step="give --uses 1")
        record = TokenRecord(
            secret_sha256=_hash(secret),
            expires_unix_s=now_unix_s + ttl_s,
            uses=uses,
        )
        kept = (one for one in self.records if one.expires_unix_s + KEEP_DEAD_S > now_unix_s)
        return TokenLedger((*kept, record))

    def redeem(self, secret: bytes, node_id: NodeId, *, now_unix_s: float) -> TokenLedger:
        """The ledger after `node_id` joined with this secret; write it down before letting the node in.

        A node that already joined with the token may ask again and no use is counted: its answer may have
        been lost. Raises TokenRefused.
        """
        record = self._find(secret)
        if record is None:
            raise TokenRefused("token_unknown", "this mesh does not know the token")
        if record.is_revoked:
            raise TokenRefused("token_spent", "the token was revoked")
        if now_unix_s >= record.expires_unix_s:
            late_s = now_unix_s - record.expires_unix_s
            raise TokenRefused("token_expired", f"the token expired {late_s:.0f} s ago")
        if node_id in record.redeemed_by:
            return self
        if record.uses_left == 0:
            raise TokenRefused("token_spent", f"the token is spent: all its {record.uses} use(s) are taken")
        return self._replace(record, redeemed_by=(*record.redeemed_by, node_id))

    def revoke(self, token_id: str) -> TokenLedger:
        """The ledger in which this token admits nobody any more. Raises InvalidInput."""
        for record in self.records:
            if record.token_id == token_id:
                return self._replace(record, is_revoked=True)
        raise InvalidInput(f"no token {token_id!r}", next_step="list them with `hexmesh token ls`")

    def live(self, now_unix_s: float) -> tuple[TokenRecord, ...]:
        """Tokens that still admit somebody."""
        return tuple(
            one
            for one in self.records
            if not one.is_revoked and one.uses_left > 0 and now_unix_s < one.expires_unix_s
        )

    def _find(self, secret: bytes) -> TokenRecord | None:
        wanted = _hash(secret)
        for record in self.records:
            if hmac.compare_digest(record.secret_sha256, wanted):
                return record
        return None

    def _replace(self, old: TokenRecord, **changes: object) -> TokenLedger:
        new = msgspec.structs.replace(old, **changes)
        return TokenLedger(tuple(new if record is old else record for record in self.records))


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(b"hexmesh-token-1\0" + secret).digest()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


def _check(token: JoinToken) -> None:
    if len(token.root_sha256) != 32 or len(token.issuer) != 20 or len(token.secret) < MIN_SECRET_BYTES:
        raise _bad_token("one of its parts has the wrong length")
    host, colon, port = token.address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise _bad_token("its peer address is not host:port")


def _bad_token(why: str) -> InvalidInput:
    return InvalidInput(
        f"not a join token: {why}",
        code="token_unreadable",
        next_step="copy the whole join line again, or make a token with `hexmesh token create`",
    )
