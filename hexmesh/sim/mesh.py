"""The replicas of a plan as hosts die and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hexmesh.plan import Plan, Replica
from hexmesh.serving.router import broken_stages
from hexmesh.sim.replica import SimulatedReplica


class Mesh:
    """Owns the replicas, and knows what is known to be gone."""

    def __init__(self, plan: Plan, start: Callable[[Replica], SimulatedReplica]) -> None:
        self._plan = plan
        self._start = start
        self._dead_nodes: set[str] = set()
        self.lost_nodes: set[str] = set()
        """Those that are known to be dead."""
        self.replicas = {replica.id: start(replica) for replica in plan.replicas}

    def whole(self) -> Iterator[SimulatedReplica]:
        """Replicas that run."""
        return (replica for replica in self.replicas.values() if not replica.is_dead)

    def kill(self, node: str) -> None:
        """A host dies, and every replica with a stage on it; nobody knows yet."""
        self._dead_nodes.add(node)
        for replica in list(self.whole()):
            if broken_stages(replica.replica, self._dead_nodes):
                replica.die()

    def note_lost(self, node: str) -> None:
        """It is known that the host is dead."""
        if node in self._dead_nodes:
            self.lost_nodes.add(node)

    def revive(self, node: str) -> None:
        """A host is back: replicas that are whole again start with nothing."""
        self._dead_nodes.discard(node)
        self.lost_nodes.discard(node)
        for name, dead in self.replicas.items():
            if dead.is_dead and not broken_stages(dead.replica, self._dead_nodes):
                self.replicas[name] = self._start(dead.replica)
