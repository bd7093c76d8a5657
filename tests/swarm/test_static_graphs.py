"""Fixed graphs of one-way links (rows 1 and 2): leases come to rest, and nobody is left out."""

from __future__ import annotations

import pytest

from tests.swarm.mutants import mutant
from tests.swarm.scenes import settle_one_way_graph


@pytest.mark.parametrize("missing", [0.1, 0.3, 0.5])
def test_no_lease_moves_and_every_host_is_planned_for(missing: float) -> None:
    for seed in range(24):
        settled = settle_one_way_graph(seed, 2 + seed % 8, missing, end_s=60)
        assert settled.n_late_moves == 0, f"seed={seed}"
        assert settled.orphans == [], f"seed={seed}"


@pytest.mark.parametrize("rule", ["steal", "two-way"])
def test_naive_leases_leave_hosts_out_or_never_rest(rule: str) -> None:
    with mutant(rule):
        settled = [settle_one_way_graph(seed, 2 + seed % 8, 0.3, end_s=60) for seed in range(12)]
    assert any(graph.orphans or graph.n_late_moves for graph in settled)
