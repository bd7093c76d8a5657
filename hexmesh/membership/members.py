"""The members of the mesh as one host sees them; for people and for routing hints, never for decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hexmesh.membership.flaps import Flaps
from hexmesh.membership.peers import NEVER_S, Peer, Peers
from hexmesh.membership.quarantine import Quarantine

MemberState = Literal["self", "coordinator", "held", "free", "leased", "leaving", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """A node as this host sees it; `state` is from its last Hello, only `held` is the coordinator's own."""

    last_heard_s: float | None
    boot: int | None
    two_way: bool
    state: MemberState
    why_excluded: str | None


def view_self(boot: int, now_s: float) -> MemberView:
    return MemberView(last_heard_s=now_s, boot=boot, two_way=True, state="self", why_excluded=None)


def view_peer(
    peer: Peer, peers: Peers, quarantine: Quarantine, flaps: Flaps, *, is_held: bool, now_s: float
) -> MemberView:
    boot = peer.boot
    why_excluded = None
    if boot is not None:
        why_excluded = quarantine.reason(peer.node, boot, now_s) or flaps.reason(peer.node, boot, now_s)
    return MemberView(
        last_heard_s=None if boot is None or peer.last_heard_s == NEVER_S else peer.last_heard_s,
        boot=boot,
        two_way=peers.is_two_way(peer.node, now_s),
        state=_state(peer, is_heard=peers.is_heard(peer, now_s), is_held=is_held),
        why_excluded=why_excluded,
    )


def _state(peer: Peer, *, is_heard: bool, is_held: bool) -> MemberState:
    if is_held:
        return "held"
    if not is_heard or peer.view is None:
        return "silent"
    if peer.view.is_leaving:
        return "leaving"
    if peer.view.is_coordinator:
        return "coordinator"
    return "free" if peer.view.is_free else "leased"
