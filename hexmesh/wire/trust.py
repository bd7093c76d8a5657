"""What members tell each other about trust: issuers are appointed, certificates renewed, nodes revoked.

Everything proves itself: the sender matters only where a message asks for something.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hexmesh.identity.revocations import MAX_REVOCATION_BYTES
from hexmesh.wire.peering import Sentence, Text

_Certificate = Annotated[bytes, msgspec.Meta(max_length=4096)]
Chain = Annotated[tuple[_Certificate, ...], msgspec.Meta(max_length=4)]


class Appointed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The root certified the receiver as an issuer."""

    certificate: _Certificate


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To an issuer: here is my present certificate, give me the next."""

    chain: Chain


class Renewed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The next certificate, then its issuer's."""

    chain: Chain


class RenewRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why not, and what to do next."""

    code: Text
    message: Sentence
    next_step: Sentence = ""


class Revoked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A signed revocation: the sender's own, or one that it passes on."""

    revocation: Annotated[bytes, msgspec.Meta(max_length=MAX_REVOCATION_BYTES)]


TrustMessage = Appointed | Renew | Renewed | RenewRefused | Revoked
TRUST_MESSAGE = TrustMessage
