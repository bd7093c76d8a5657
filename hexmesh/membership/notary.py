"""Signs and checks the two statements that others pass on: a decided epoch, and released hosts."""

from __future__ import annotations

from collections.abc import Callable

from hexmesh.wire.control import Ballot, Cert, Epoch, Release, cert_payload, release_payload

Sign = Callable[[bytes], bytes]
Verify = Callable[[str, bytes, bytes], bool]


class Notary:
    """Holds the injected `sign(payload)` and `verify(node, payload, signature)`."""

    def __init__(self, sign: Sign, verify: Verify) -> None:
        self._sign = sign
        self._verify = verify

    def certify(self, epoch: Epoch, digest: str) -> Cert:
        return Cert(epoch=epoch, digest=digest, signature=self._sign(cert_payload(epoch, digest)))

    def is_genuine(self, cert: Cert) -> bool:
        """Whether the epoch's own coordinator signed it."""
        payload = cert_payload(cert.epoch, cert.digest)
        return self._verify(cert.epoch.ballot.node, payload, cert.signature)

    def release(self, ballot: Ballot, to_node: str, to_boot: int) -> Release:
        signature = self._sign(release_payload(ballot, to_node, to_boot))
        return Release(ballot=ballot, to_node=to_node, to_boot=to_boot, signature=signature)

    def frees(self, release: Release, promised: Ballot, to: tuple[str, int]) -> bool:
        """Whether `release` lets a host that promised `promised` go to the coordinator `to`.

        A release of an earlier ballot is void: the host may have been won back since.
        """
        return (
            release.ballot.owner == promised.owner
            and release.ballot >= promised
            and (release.to_node, release.to_boot) == to
            and self._verify(
                release.ballot.node,
                release_payload(release.ballot, release.to_node, release.to_boot),
                release.signature,
            )
        )
