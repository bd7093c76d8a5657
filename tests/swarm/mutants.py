"""Switches off one rule at a time, to see that the swarm notices: each mutant must turn some test red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hexmesh.membership.coordinator import Coordinator
from hexmesh.membership.epochs import EpochSlots
from hexmesh.membership.host import Host
from hexmesh.membership.lease import Lease
from hexmesh.membership.merge import Merge
from hexmesh.membership.outputs import Accepted, Admission
from hexmesh.membership.peers import Peers
from hexmesh.wire.control import Ballot, Epoch


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
    "spread": [(Host, "commit", lambda self, cert, now_s: self.slots.commit(cert, now_s))],
    "size first": [(Merge, "choose", _choose_by_ballot)],
}


@contextmanager
def mutant(name: str) -> Iterator[None]:
    """Run with the rule `name` switched off."""
    with ExitStack() as patches:
        for owner, attribute, naive in MUTANTS[name]:
            patches.enter_context(mock.patch.object(owner, attribute, naive))
        yield
