"""Two sites behind NATs and a bootstrap node that both reach, in network namespaces, with real daemons.

Where no lab can be made this fails, unless HEXMESH_ALLOW_SKIP names `lab`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabDaemon, LabMesh

QUESTION = "What is a KV cache?"
N_TOKENS = 60
KILL_AFTER = 15
DIRECT_S = 0.010
THROUGH_RELAY_S = 0.080
RELAY_PORTS = ("--peer-port", "7701", "--dht-port", "7702")
"""A bootstrap node comes back where others look for it."""


def links_between(mesh: LabMesh, one: LabDaemon, other: LabDaemon) -> list[dict[str, Any]]:
    """The links of the pair in both directions, as the first of them shows them."""
    pair = {one.node_id, other.node_id}
    return [link for link in one.get("/admin/links") if {link["from"], link["to"]} == pair]


def await_links(mesh: LabMesh, one: LabDaemon, other: LabDaemon, *, relayed: bool, timeout_s: float) -> None:
    """Until both directions are measured on the path that is meant."""

    def find() -> bool | None:
        links = links_between(mesh, one, other)
        return True if [link["relayed"] for link in links] == [relayed] * 2 else None

    mesh.await_value(find, timeout_s=timeout_s, what=f"links with relayed {relayed}", living=[one, other])


def await_rtt(mesh: LabMesh, one: LabDaemon, other: LabDaemon, below_s: float, timeout_s: float) -> None:
    """Until both directions are measured on the direct path, and on the direct path back."""

    def find() -> bool | None:
        links = links_between(mesh, one, other)
        return True if len(links) == 2 and all(link["rtt_p50_s"] < below_s for link in links) else None

    mesh.await_value(find, timeout_s=timeout_s, what=f"round trips below {below_s} s", living=[one, other])


def is_alone(daemon: LabDaemon) -> bool:
    """Whether it has lost every other node."""
    return [member["state"] for member in daemon.get("/admin/members")].count("alive") == 1


def await_blocker(mesh: LabMesh, daemon: LabDaemon, code: str, timeout_s: float) -> dict[str, Any]:
    def find() -> dict[str, Any] | None:
        blocker = daemon.client.get_json("/ready", also_ok=(503,))["blocker"]
        return blocker if blocker is not None and blocker["code"] == code else None

    return mesh.await_value(find, timeout_s=timeout_s, what=f"the blocker {code}", living=[daemon])


def test_two_hosts_behind_nats_serve_through_a_bootstrap_node(tmp_path: Path) -> None:
    spec = model_spec_from_config(resolve_model().config)
    flags = ("--device", "cpu", "--threads", "1", "--min-nodes", "2")
    memory = ("--memory", str(memory_for_exactly(spec, 2)))
    sites = {"tokyo": ("t1",), "osaka": ("o1",), "cloud": ("c1",)}
    far = Link(latency_s=0.020, rate_bytes_per_s=1.25e8)
    near = Link(latency_s=DIRECT_S / 2, rate_bytes_per_s=1.25e8)
    links = both_ways({("tokyo", "osaka"): near, ("tokyo", "cloud"): far, ("osaka", "cloud"): far})
    prompt = token_ids(QUESTION)
    with Lab(Topology(sites=sites, links=links)) as lab, LabMesh(tmp_path / "mesh") as mesh:
        tokyo = mesh.found_on(lab.hosts["t1"], *flags, *memory)
        token = tokyo.fresh_token(uses=2)
        relay = mesh.start_on(lab.hosts["c1"], *RELAY_PORTS, token=token, verb="bootstrap")
        osaka = mesh.start_on(lab.hosts["o1"], *flags, *memory, token=token)
        for daemon in (relay, osaka):
            mesh.await_up(daemon)
        ends = [tokyo, osaka]
        mesh.await_ready(ends, plan_reaches=2, timeout_s=80)
        await_links(mesh, tokyo, osaka, relayed=False, timeout_s=20)

        # The NATs come up, and what was connected is cut: from here on only the bootstrap node can be dialled.
        for name in ("t1", "o1"):
            lab.set_dialable(name, False)
        lab.partition(("t1",), ("o1",), ("c1",))
        mesh.await_value(lambda: is_alone(relay) or None, timeout_s=20, what="connections to be lost")
        lab.heal("c1", "t1")
        lab.heal("c1", "o1")
        await_links(mesh, tokyo, osaka, relayed=True, timeout_s=40)
        lab.heal("t1", "o1")
        mesh.await_ready(ends, plan_reaches=2, timeout_s=40)
        through = links_between(mesh, tokyo, osaka)
        assert min(link["rtt_p50_s"] for link in through) >= THROUGH_RELAY_S, through
        assert {member["name"]: member["state"] for member in tokyo.get("/admin/members")}["c1"] == "alive"
        assert Stream(tokyo.client, prompt, N_TOKENS).run() == expected(prompt, N_TOKENS)
        assert osaka.get("/admin/status")["dialable"] is False
        mesh.await_value(
            lambda: "DHT role is client" in osaka.log.read_text() or None, timeout_s=20, what="a DHT client"
        )

        # The relay dies under a request, is missed by name, and comes back: the client sees one stream.
        def lose_the_relay(n_tokens: int) -> None:
            nonlocal relay
            if n_tokens != KILL_AFTER:
                return
            relay.kill_group()
            blocker = await_blocker(mesh, tokyo, "unreachable_node", timeout_s=30)
            assert "o1" in blocker["message"]
            assert "hexmesh bootstrap" in blocker["next_step"]
            relay = mesh.start_on(lab.hosts["c1"], *RELAY_PORTS, verb="bootstrap")

        stream = Stream(tokyo.client, prompt, N_TOKENS)
        stream.run(lose_the_relay)
        assert stream.token_ids == expected(prompt, N_TOKENS)

        # The NATs are opened: both move to the direct path and measure it.
        for name in ("t1", "o1"):
            lab.set_dialable(name, True)
        await_links(mesh, tokyo, osaka, relayed=False, timeout_s=60)
        await_rtt(mesh, tokyo, osaka, THROUGH_RELAY_S / 2, timeout_s=20)
        mesh.await_ready(ends, plan_reaches=2, timeout_s=30)
        assert Stream(osaka.client, prompt, 10).run() == stream.token_ids[:10]
