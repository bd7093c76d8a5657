"""Switches off one rule at a time, in memory: `test_mutations` shows that each turns some test red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hexmesh.membership.coordination import Coordination
from hexmesh.membership.coordinator import Coordinator
from hexmesh.membership.epochs import EpochSlots
from hexmesh.membership.flaps import Flaps
from hexmesh.membership.host import Host
from hexmesh.membership.lease import Lease
from hexmesh.membership.merge import Merge
from hexmesh.membership.outputs import Accepted, Admission
from hexmesh.membership.peers import Peers
from hexmesh.wire.control import Ballot, Epoch
from tests.swarm.world import World


def _yes(*_: Any, **__: Any) -> bool:
    return True


def _no(*_: Any, **__: Any) -> bool:
    return False


ADMIT = Host.admit


def _admit_if_any_plan(self: Host, epoch: Epoch, **step: Any) -> Admission:
    """Takes a step by its place in the pipeline, whatever its epoch (row 4)."""
    return ADMIT(self, epoch, **step) if self.slots.committed is None else Accepted()


def _keep_draining(self: EpochSlots, *, is_forced: bool) -> None:
    """Forgets to free what drained (row 8)."""
    self.draining = None


def _choose_by_ballot(self: Merge, n_held: int, ballot: Ballot, heirs: tuple[str, ...], now_s: float) -> None:
    """Merges by the highest ballot, whatever the sizes (row 9)."""
    views = [p.view for p in self._peers.two_way(now_s) if p.view is not None and p.view.is_coordinator]
    best = max(views, key=lambda view: view.ballot, default=None)
    self.yielding_to = best.header.src if best is not None and best.ballot > ballot else None


def _stand_untimely(self: Coordination, now_s: float) -> bool:
    """Stands when a lease is free, even while it should only listen."""
    return self._lease.is_free(now_s) and now_s >= self._standing.due_s(self._lease, self._peers, now_s)


def _same_boot(_: World) -> int:
    """Every start of a host has the same name (row 3)."""
    return 1


Patch = tuple[type, str, Callable[..., Any]]

MUTANTS: dict[str, list[Patch]] = {
    "fence": [(Lease, "is_fenced", _no)],
    "cert fence": [(Host, "obeys", _yes)],
    "steal": [(Lease, "is_free", lambda self, now_s: not self.is_own)],
    "seq": [(Lease, "is_overtaken", _no)],
    "epoch check": [(Host, "admit", _admit_if_any_plan)],
    "hears": [(Host, "hears_me", _yes)],
    "two-way": [
        (Host, "hears_me", _yes),
        (Peers, "is_two_way", _yes),
        (Peers, "two_way", lambda self, now_s: list(self)),
        (Coordinator, "_is_candidate", lambda self, peer, now_s: peer.node not in self.held),
    ],
    "one slot each": [(EpochSlots, "_release", _keep_draining)],
    "listening": [(Coordination, "_may_stand", _stand_untimely)],
    "boot nonce": [(World, "_draw_boot", _same_boot)],
    "spread": [(Host, "commit", lambda self, cert, now_s: self.slots.commit(cert, now_s))],
    "damping": [(Flaps, "reason", lambda self, node, boot, now_s: None)],
    "size first": [(Merge, "choose", _choose_by_ballot)],
}


@contextmanager
def mutant(name: str) -> Iterator[None]:
    """Run with the rule `name` switched off."""
    with ExitStack() as patches:
        for owner, attribute, naive in MUTANTS[name]:
            patches.enter_context(mock.patch.object(owner, attribute, naive))
        yield
