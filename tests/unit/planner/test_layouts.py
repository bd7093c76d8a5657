"""Layouts of teams against trying everything, the compiled kernel against its twin, and what must always hold."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hexmesh.cluster import Cluster, Role
from hexmesh.cost import CostModel, StepLimits
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.native import load
from hexmesh.planner import layout_kernel
from hexmesh.planner.layouts import Layout, Layouts
from hexmesh.planner.pools import ROLES, Part, Team, pools_of, team_of
from hexmesh.score import Capacities, density_of
from hexmesh.workload import Slo, Workload
from tools.bench.layout_groups import (
    Scene,
    brute_alone_s,
    brute_rate,
    pipeline_of_parts,
    random_scene,
    replace_slo,
    whole,
)

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
LLAMA_2_70B = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
)


def _rate(layout: Layout | None) -> float:
    return 0.0 if layout is None else layout.requests_per_s


def _twin(scene: Scene) -> Layouts:
    return Layouts(scene.cluster, scene.pools, scene.capacities, compiled=False)


def _fleet(name: str) -> Cluster:
    return cluster_of(read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8")), "float16")


def _layouts(cluster: Cluster, workload: Workload | None = None) -> Layouts:
    capacities = Capacities(CostModel(LLAMA_2_70B, "float16", 16, StepLimits()), workload or Workload())
    return Layouts(cluster, pools_of(cluster, LLAMA_2_70B), capacities)


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_the_best_layout_is_that_of_trying_everything(first: int) -> None:
    n_found = 0
    for seed in range(first, first + 40):
        scene = random_scene(seed, most_devices=4, most_layers=6)
        layouts, team = scene.layouts(), whole(scene.pools)
        for role in ROLES:
            expected = brute_rate(scene, role)
            assert _rate(layouts.best(team, role)) == pytest.approx(expected, rel=1e-8), (seed, role)
            n_found += expected > 0
    assert n_found >= 40


def test_a_pool_with_no_way_past_it_gets_a_layer_though_others_could_hold_more() -> None:
    scene = random_scene(1951)
    for layouts in (scene.layouts(), _twin(scene)):
        layout = layouts.best(whole(scene.pools), "prefill")
        assert layout is not None
        assert [part.pool for part in layout.parts] == [2, 1, 0]
        assert layout.requests_per_s == pytest.approx(brute_rate(scene, "prefill"), rel=1e-8)


def test_the_quickest_layout_is_that_of_trying_everything() -> None:
    for seed in range(30):
        scene = replace_slo(random_scene(seed, most_devices=3, most_layers=5), Slo())
        layouts, team = scene.layouts(), whole(scene.pools)
        for role in ROLES:
            found = layouts.quickest(team, role)
            alone_s = float("inf") if found is None else found.alone_s
            assert alone_s == pytest.approx(brute_alone_s(scene, role), rel=1e-9), (seed, role)


@pytest.mark.skipif(load("layout") is None, reason="the kernel is not built")
def test_the_kernel_finds_what_its_twin_finds() -> None:
    for seed in range(1000, 1025):
        scene = random_scene(seed)
        compiled, twin, team = scene.layouts(), _twin(scene), whole(scene.pools)
        for role in ROLES:
            one, other = compiled.best(team, role), twin.best(team, role)
            assert _rate(one) == pytest.approx(_rate(other), rel=1e-9), (seed, role)
            one, other = compiled.quickest(team, role), twin.quickest(team, role)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.alone_s == pytest.approx(other.alone_s, rel=1e-9), (seed, role)


def test_rates_are_the_scores_own() -> None:
    n_rated = 0
    for seed in range(300, 360):
        scene = random_scene(seed)
        layouts, capacities = scene.layouts(), scene.capacities
        for role in ROLES:
            layout = layouts.best(whole(scene.pools), role)
            if layout is None:
                continue
            n_rated += 1
            pipeline = pipeline_of_parts(scene, layout.parts)
            assert pipeline is not None
            prefill, decode, mixed = (
                rates(pipeline) for rates in (capacities.prefill, capacities.decode, capacities.mixed)
            )
            close = {"rel": 1e-9}
            expected = {"prefill": prefill, "decode": decode, "mixed": mixed}[role].requests_per_s
            assert layout.requests_per_s == pytest.approx(expected, **close)
            assert layout.prefill_latency_s == pytest.approx(prefill.latency_s, **close)
            assert layout.prefill == pytest.approx(0 if role == "decode" else prefill.requests_per_s, **close)
            assert layout.decode == pytest.approx(0 if role == "prefill" else decode.requests_per_s, **close)
            if role != "prefill":
                tokens = decode if role == "decode" else mixed
                assert layout.batch == pytest.approx(tokens.batch, **close)
                assert layout.tpot_s == pytest.approx(tokens.tpot_s, **close)
                assert layout.micro_batches == tokens.micro_batches
            for found, wanted in zip(layout.uses, mixed.uses if role == "mixed" else (), strict=True):
                assert found == pytest.approx(wanted, **close)
    assert n_rated > 60


def test_a_layout_places_every_layer_once_on_devices_that_the_team_has() -> None:
    for seed in range(60):
        scene = random_scene(seed)
        team = whole(scene.pools)
        for role in ROLES:
            layout = scene.layouts().best(team, role)
            if layout is not None:
                ends = [0, *(part.stop for part in layout.parts)]
                assert [*(part.start for part in layout.parts), scene.spec.n_layers] == ends
                assert all(n <= dict(team)[pool] for pool, n in team_of(layout.parts))
                assert all(part.tp in scene.pools[part.pool].degrees for part in layout.parts)


def test_one_more_device_never_lowers_a_rate() -> None:
    n_compared = 0
    for seed in range(100):
        scene = random_scene(seed)
        layouts, team = scene.layouts(), whole(scene.pools)
        for at, (pool, count) in enumerate(team):
            fewer: Team = tuple(one for one in (*team[:at], (pool, count - 1), *team[at + 1 :]) if one[1])
            for role in ROLES:
                n_compared += _rate(layouts.best(fewer, role)) > 0
                less = _rate(layouts.best(fewer, role)) * (1 - 1e-8)
                assert _rate(layouts.best(team, role)) >= less, (seed, role, fewer)
    assert n_compared > 100


def test_no_rate_exceeds_what_the_devices_give_one_by_one() -> None:
    for seed in range(100):
        scene = random_scene(seed)
        layouts, team = scene.layouts(), whole(scene.pools)
        bounds = [
            (pool.size, density_of(pool.node, pool.device, pool.degrees, pool.roles, scene.capacities))
            for pool in scene.pools
        ]
        prefill = sum(n * density.prefill for n, density in bounds)
        decode = sum(n * density.decode for n, density in bounds)
        assert _rate(layouts.best(team, "prefill")) <= prefill * (1 + 1e-9)
        assert _rate(layouts.best(team, "decode")) <= decode * (1 + 1e-9)
        assert _rate(layouts.best(team, "mixed")) <= min(prefill, decode) * (1 + 1e-9)


def test_teams_that_look_alike_share_one_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    kernel_for = layout_kernel.Kernels.of

    def counted(self: layout_kernel.Kernels, graph: object) -> object:
        made.append(graph)
        return kernel_for(self, graph)  # type: ignore[arg-type]

    monkeypatch.setattr(layout_kernel.Kernels, "of", counted)
    layouts = _layouts(_fleet("mixed-24"))
    one = layouts.best(((3, 4), (4, 4)), "decode")
    other = layouts.best(((4, 4), (5, 4)), "decode")
    assert len(made) == 1
    assert one is not None
    assert other is not None
    assert one.requests_per_s == other.requests_per_s
    assert {part.pool for part in other.parts} == {4, 5}
    assert layouts.best(((3, 4), (4, 3)), "decode") != other
    assert len(made) == 2


def test_a_team_of_hosts_that_all_differ_is_laid_out_in_some_order() -> None:
    """Twelve hosts, each with links of its own: too many orders to try, so some, and more devices still help."""
    cluster = _fleet("helix-24")
    links = tuple(
        msgspec.structs.replace(link, rtt_p50_s=link.rtt_p50_s * (1 + at % 97 / 1000))
        for at, link in enumerate(cluster.links)
    )
    layouts = _layouts(msgspec.structs.replace(cluster, links=links))
    four = layouts.best(tuple((at, 1) for at in range(4)), "decode")
    twelve = layouts.best(tuple((at, 1) for at in range(12)), "decode")
    assert four is not None
    assert twelve is not None
    assert twelve.requests_per_s > four.requests_per_s


def test_devices_that_may_not_have_the_role_are_left_idle() -> None:
    cluster = _fleet("mixed-24")
    nodes = tuple(
        msgspec.structs.replace(node, roles=("prefill",)) if node.name == "l40" else node
        for node in cluster.nodes
    )
    layouts = _layouts(msgspec.structs.replace(cluster, nodes=nodes))
    decode = layouts.best(((1, 4), (2, 4)), "decode")
    assert decode == layouts.best(((1, 4),), "decode")
    assert layouts.best(((2, 4),), "decode") is None
    prefill = layouts.best(((1, 4), (2, 4)), "prefill")
    assert prefill is not None
    assert {part.pool for part in prefill.parts} == {1, 2}


@pytest.mark.parametrize("role", ROLES)
def test_what_cannot_be_has_no_layout(role: Role) -> None:
    layouts = _layouts(_fleet("mixed-24"))
    assert layouts.best(((2, 1),), role) is None
    assert layouts.quickest(((2, 1),), role) is None
    assert layouts.best((), role) is None
    assert layouts.rated((Part(pool=2, tp=1, start=0, stop=80),), role) is None
    alone = Cluster(nodes=_fleet("mixed-24").nodes, links=())
    assert (
        _layouts(alone).rated(
            (Part(pool=1, tp=4, start=0, stop=60), Part(pool=2, tp=4, start=60, stop=80)), role
        )
        is None
    )


def test_wrong_arrays_are_refused() -> None:
    kernel = load("layout")
    if kernel is None:
        pytest.skip("the kernel is not built")
    for counts, figures in ((b"", b""), (b"\0" * 24, b""), (b"\xff" * 32, b"\0" * 8)):
        with pytest.raises(ValueError, match="wrong"):
            kernel.tables(counts, figures)
    with pytest.raises(ValueError, match="PyCapsule"):
        kernel.graph(object(), b"", b"")
