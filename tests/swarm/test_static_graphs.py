"""Fixed graphs of one-way links (rows 1 and 2): leases come to rest, and nobody is left out."""

from __future__ import annotations

import pytest

from tests.swarm.scenes import settle_one_way_graph


@pytest.mark.parametrize("missing", [0.1, 0.3, 0.5])
def test_no_lease_moves_and_every_host_is_planned_for(missing: float) -> None:
    for seed in range(24):
        settled = settle_one_way_graph(seed, 2 + seed % 8, missing, end_s=60)
        assert settled.n_late_moves == 0, f"seed={seed}"
        assert settled.orphans == [], f"seed={seed}"
