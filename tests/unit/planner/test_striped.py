"""Pairs of replicas side by side over the same hosts."""

from __future__ import annotations

from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.model_spec.known import KNOWN
from hexmesh.planner.objective import Throughput
from hexmesh.planner.pools import team_of
from hexmesh.planner.problem import Problem
from hexmesh.planner.striped import striped
from hexmesh.score.places import Place, spans_of
from hexmesh.workload import Workload

FLEET = """
name = "two"
[defaults]
nic = "1Gbit/s"
[[host]]
name = "h0"
site = "here"
devices = [{ type = "A100-SXM-40GB", count = 2 }, { type = "H100-SXM", count = 2 }]
[[host]]
name = "h1"
site = "here"
devices = [{ type = "L4", count = 2 }]
"""


def _problem() -> Problem:
    return Problem(
        cluster=cluster_of(read_fleet(FLEET), "float16"),
        spec=model_spec_from_config(KNOWN["OPT-30B"]),
        dtype="float16",
        workload=Workload(prompt_tokens=512, output_tokens=128),
        objective=Throughput(),
    )


def test_a_kind_of_devices_may_go_to_one_of_the_two() -> None:
    """The fast memory decodes, the rest prefills, and of the second host either has one."""
    given = _problem()
    pairs = list(striped(given, given.whole))
    wanted = [
        (p, d)
        for p, d in pairs
        if team_of(p.parts) == ((0, 2), (2, 1)) and team_of(d.parts) == ((1, 2), (2, 1))
    ]
    assert wanted
    for prefill, decode in wanted:
        moved = Place(spans_of(given.held(prefill.parts))).layers_sent(
            Place(spans_of(given.held(decode.parts)))
        )
        assert not moved
    assert max(given.judge(pair).flow.requests_per_s for pair in wanted) > 6.0


def test_both_are_there_and_share_no_device() -> None:
    given = _problem()
    sizes = dict(given.whole)
    for prefill, decode in striped(given, given.whole):
        p, d = dict(team_of(prefill.parts)), dict(team_of(decode.parts))
        assert p
        assert d
        assert all(p.get(pool, 0) + d.get(pool, 0) <= n for pool, n in sizes.items())
