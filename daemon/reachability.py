"""Which members run and cannot get a connection to each other, as a blocker that names them and the next step."""

from __future__ import annotations

from collections.abc import Callable, Collection

from daemon.peering.peer_events import PeerInfo
from daemon.views import Blocker
from hexmesh.membership.reach import RELAY_ROLE, OwnReach, unlinked_pairs
from hexmesh.membership.records import Directory, NodeRecord

CODE = "unreachable_node"
_STEP = (
    "see that {names} runs and a bootstrap node does, at an address that both reach (hexmesh bootstrap); or open "
    "its peer port to the others, or give it --advertise IP:PORT"
)


def find_apart(
    directory: Directory,
    peer_of: Callable[[str], PeerInfo | None],
    *,
    own: str,
    alive: Collection[str],
    now_unix_s: float,
) -> Blocker | None:
    """The first pair that should be connected and is not: this node and a member, else two other members."""
    for record in directory.records():
        if record.node != own and (reason := _why_unreached(record, peer_of(record.node), now_unix_s)):
            return _blocker(
                f"{record.name} has no connection with this node: dialling it at {record.peer_address} fails "
                f"({reason}), it does not dial this node, and no relay joins the two",
                record.name,
            )
    for one, other in unlinked_pairs(directory.records(), alive):
        return _blocker(
            f"{one.name} and {other.name} have no measured link: neither {one.name} at {one.peer_address} nor "
            f"{other.name} at {other.peer_address} can be dialled by others",
            f"{one.name} or {other.name}",
        )
    return None


def undialable_by(reach: OwnReach, directory: Directory) -> list[str]:
    """The members that cannot dial this node, each with its reason, for people."""
    return [f"{directory.name_of(node)} ({reason})" for node, reason in sorted(reach.missed_by.items())]


def is_relay(record: NodeRecord) -> bool:
    """Whether the node only carries connections: it takes no part in coordination, so it says no Hellos."""
    return RELAY_ROLE in record.roles


def _why_unreached(record: NodeRecord, peer: PeerInfo | None, now_unix_s: float) -> str | None:
    """Why there is no connection, if the node has shown since dialling failed first that it ran."""
    if peer is None or peer.is_up or peer.undialable_s is None:
        return None
    return peer.why_undialable if record.made_at_unix_s > now_unix_s - peer.undialable_s else None


def _blocker(message: str, names: str) -> Blocker:
    return Blocker(code=CODE, message=message, next_step=_STEP.format(names=names))
