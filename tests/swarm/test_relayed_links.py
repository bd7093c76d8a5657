"""What a relay would give: a link that is missing costs nothing once a third host passes control messages on.

To the rules a relayed message is a late one, so the soak and the hunt relay in a quarter of their schedules.
"""

from __future__ import annotations

import pytest

from hexmesh.membership.outputs import Output, PlanWanted
from tests.swarm.scenes import calm_mesh, leader_of
from tests.swarm.schedule import is_whole
from tests.swarm.world import Habits, count_lease_moves

CUT_S = 30.0


@pytest.mark.parametrize("one_way", [True, False])
def test_a_missing_link_to_the_coordinator_costs_nothing_with_a_relay_and_the_host_without(
    one_way: bool,
) -> None:
    for seed in range(4):
        for relays in (True, False):
            world = calm_mesh(seed, 3 + seed % 7, Habits(relays=relays, request_every_s=None))
            leader = leader_of(world).name
            one = next(host.name for host in world.alive() if host.name != leader)
            plans: list[str] = []

            def observe(_: float, host: str, output: Output, plans: list[str] = plans) -> None:
                if isinstance(output, PlanWanted):
                    plans.append(host)

            moves = count_lease_moves(world)
            world.observers.append(observe)
            world.cut = {(leader, one)} if one_way else {(leader, one), (one, leader)}
            world.run_until(world.now_s + CUT_S)
            assert is_whole(world) is relays, f"seed={seed}"
            if relays:
                assert (moves, plans) == ([], []), f"seed={seed}"
