"""Forward reachability of peers, and this host's clock against theirs."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.config import JoinOptions
from daemon.doctor.finding import Finding, failed, not_run, passed, warned
from daemon.doctor.peer_probe import Answer, Target
from daemon.doctor.state_check import Stored
from daemon.peering.address import parse_address
from daemon.trust.admission import check_clocks
from hexmesh.errors import HexmeshError
from hexmesh.identity.certificates import mesh_id_of, root_sha256
from hexmesh.identity.tokens import parse_token
from hexmesh.ids import short
from hexmesh.wire.peering import MAX_CLOCK_DIFFERENCE_S

_MOST_TARGETS = 16
_PORT_HINT = "the peer port is 7701 by default, not that of HTTP or of the DHT"


def choose_targets(options: JoinOptions, stored: Stored) -> list[Target]:
    """The peer that was asked for, else the token's, and the members that the state folder remembers."""
    asked = options.peer or (parse_token(options.token).address if options.token else None)
    targets = [Target(parse_address(asked), asked, is_asked_for=True)] if asked else []
    own = stored.key.node_id if stored.key is not None else ""
    for member in stored.membership.members if stored.membership is not None else ():
        if member.node_id != own and member.address != asked:
            address = parse_address(member.address)
            targets.append(
                Target(address, f"{member.name} ({address})", is_asked_for=False, node_id=member.node_id)
            )
    return targets[:_MOST_TARGETS]


def check_clock(targets: Sequence[Target], answers: Sequence[Answer]) -> Finding:
    """Fails where this host's clock and a peer's differ by more than the mesh takes."""
    told = [
        (target, answer, answer.clock_unix_s)
        for target, answer in zip(targets, answers, strict=True)
        if answer.clock_unix_s is not None
    ]
    if not told:
        why = "no peer told its clock" if targets else "no peer is known to compare with"
        return not_run("clock", why, "name one with --peer HOST:PORT")
    for target, answer, clock_unix_s in told:
        try:
            check_clocks("this host", answer.own_unix_s, target.name, clock_unix_s)
        except HexmeshError as error:
            return failed("clock", error.message, error.next_step)
    target, worst_s = max(
        ((target, abs(clock_unix_s - answer.own_unix_s)) for target, answer, clock_unix_s in told),
        key=lambda pair: pair[1],
    )
    said = f"within {worst_s:.1f} s of {target.name}"
    if worst_s > MAX_CLOCK_DIFFERENCE_S / 2:
        return warned("clock", said, "synchronise both with NTP")
    return passed("clock", f"{said}, the furthest of {len(told)}" if len(told) > 1 else said)


def check_peers(
    options: JoinOptions, stored: Stored, targets: Sequence[Target], answers: Sequence[Answer]
) -> list[Finding]:
    """A finding for each peer. One that is merely remembered may be switched off, while another is reached."""
    if not targets:
        return [not_run("peer", "no peer is known", "name one with --peer HOST:PORT")]
    any_holds = any(
        answer.root_der is not None and _mismatch(options, stored, answer.root_der) is None
        for answer in answers
    )
    return [
        _check_peer(options, stored, target, answer, any_holds)
        for target, answer in zip(targets, answers, strict=True)
    ]


def _check_peer(
    options: JoinOptions, stored: Stored, target: Target, answer: Answer, any_holds: bool
) -> Finding:
    name, address = target.name, target.address
    if answer.root_der is None:
        said = f"{name} is not reached: {answer.trouble}"
        step = (
            f"check that {address.host} is its address as seen from here; {_PORT_HINT}"
            if answer.is_reached
            else f"check that the node runs, that {address.host} is its address as seen from here, and that no "
            f"firewall closes TCP port {address.port}"
        )
        return (
            warned("peer", said, step)
            if any_holds and not target.is_asked_for
            else failed("peer", said, step)
        )
    if (wrong := _mismatch(options, stored, answer.root_der)) is not None:
        return failed(
            "peer", f"{name} is a node of another mesh: {wrong}", "check its address, or join its mesh"
        )
    if stored.membership is not None and not answer.is_verified:
        return failed(
            "peer",
            f"{name} shows this mesh's root and its certificate does not hold: {answer.trouble}",
            "run hexmesh doctor there; its certificate or either clock may be wrong",
        )
    return passed("peer", f"{name} is reached from here and is of mesh {short(mesh_id_of(answer.root_der))}")


def _mismatch(options: JoinOptions, stored: Stored, shown: bytes) -> str | None:
    """How the root that a peer shows is not the one of the membership or the token; None where it is."""
    if stored.membership is not None:
        expected, whose = root_sha256(stored.membership.root_der), "this node is a member of"
    elif options.token is not None:
        expected, whose = parse_token(options.token).root_sha256, "the token is for"
    else:
        return None
    if root_sha256(shown) == expected:
        return None
    return f"its root certificate is {root_sha256(shown).hex()[:16]}, and {whose} {expected.hex()[:16]}"
