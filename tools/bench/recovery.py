"""How long a stream stalls when something on its way is killed, and how soon another coordinator leads.

Three nodes on loopback, of which any two hold the model, or four, which make two replicas; a greedy stream runs through
a node that survives, the driver of the replica that loses a host if it can. The stall is the longest gap between two
tokens at the client, and every stream must have the tokens of an undisturbed one.
Run: `python tools/bench/recovery.py [--quick] [--json]`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import least_memory_bytes, memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tools.bench.report import Report, bench_arguments, print_report, progress

QUESTION = "What is a KV cache?"
N_TOKENS = 300
KILL_AT_TOKEN = 60
Stall = tuple[float, list[int]]


def main() -> int:
    arguments = bench_arguments(__doc__ or "").parse_args()
    n_runs = 1 if arguments.quick else 5
    report = Report(
        name="recovery",
        method=(
            "shipped model, three nodes on loopback of which two hold it (four with a spare replica), "
            f"SIGKILL at token {KILL_AT_TOKEN} of {N_TOKENS}; "
            f"stall = longest gap between tokens at the client; {n_runs} fresh meshes a case"
        ),
        not_run=["host cut off: needs the lab"],
    )
    for name, (n_nodes, find_victim) in CASES.items():
        stalls_s, exact, leads_s = [], 0, []
        for index in range(n_runs):
            progress(f"{name}: run {index + 1}/{n_runs}")
            with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as folder:
                stall_s, is_exact, lead_s = run_case(Path(folder) / "mesh", n_nodes, find_victim)
            stalls_s.append(stall_s)
            exact += is_exact
            if lead_s is not None:
                leads_s.append(lead_s)
        report.add(f"stall, {name}", stalls_s, "s")
        report.add(f"stall p50, {name}", statistics.median(stalls_s), "s", at_most=4.0)
        report.add(f"streams with exactly the right tokens, {name}", exact / n_runs, "", at_least=1.0)
        if leads_s:
            report.add(f"another coordinator leads, {name}", leads_s, "s", at_most=5.0)
    print_report(report, "json" if arguments.json else "text")
    return 0


def run_case(
    folder: Path, n_nodes: int, find_victim: Callable[[LocalMesh], LocalDaemon]
) -> tuple[float, bool, float | None]:
    """One mesh, one kill: the stall, whether the tokens were right, and when another coordinator led."""
    spec = model_spec_from_config(resolve_model().config)
    # Just too little for one node, so that two pairs are better than one pipeline over more; or half way.
    memory_bytes = least_memory_bytes(spec, 1) * 97 // 100 if n_nodes > 3 else memory_for_exactly(spec, 2)
    flags = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--memory",
        str(memory_bytes),
        "--min-nodes",
        str(n_nodes),
    ]
    with LocalMesh(folder) as mesh:
        mesh.found("one", *flags)
        for name in ("two", "three", "four")[: n_nodes - 1]:
            mesh.join(name, *flags)
        mesh.await_ready()
        before = mesh.daemons[0].get("/admin/topology")
        victim = find_victim(mesh)
        survivors = [daemon for daemon in mesh.daemons if daemon is not victim]
        gateway = gateway_beside(mesh, victim)
        undisturbed = stream(gateway, lambda n: None)[1]
        killed_s = 0.0

        def kill(n_tokens: int) -> None:
            nonlocal killed_s
            if n_tokens == KILL_AT_TOKEN:
                victim.kill_group()
                killed_s = time.monotonic()

        stall_s, tokens = stream(gateway, kill)
        lead_s = None
        if victim.node_id == before["coordinator"]:
            lead_s = wait_for_another(mesh, survivors, victim) - killed_s
        return stall_s, tokens == undisturbed, lead_s


def wait_for_another(mesh: LocalMesh, survivors: list[LocalDaemon], victim: LocalDaemon) -> float:
    """When a survivor was seen to be coordinator; an upper bound, since the stream ran before anyone looked."""
    mesh.await_value(
        lambda: survivors[0].get("/admin/topology")["coordinator"] not in (None, victim.node_id) or None,
        timeout_s=30,
        what="another coordinator",
    )
    return time.monotonic()


def stream(daemon: LocalDaemon, on_token: Callable[[int], None]) -> Stall:
    """The longest gap between two tokens, and all tokens."""
    body = {"prompt": QUESTION, "max_tokens": N_TOKENS, "ignore_eos": True, "stream": True}
    tokens: list[int] = []
    longest_s, last_s = 0.0, 0.0
    for line in daemon.client.stream("/generate", body):
        token = json.loads(line).get("token_id")
        if token is None:
            continue
        now_s = time.monotonic()
        if tokens:
            longest_s = max(longest_s, now_s - last_s)
        last_s = now_s
        tokens.append(token)
        on_token(len(tokens))
    return longest_s, tokens


def gateway_beside(mesh: LocalMesh, victim: LocalDaemon) -> LocalDaemon:
    """The driver of the victim's replica, which its own requests run in; another node if that is the victim."""
    topology = mesh.daemons[0].get("/admin/topology")
    pipelines = [[stage["node"] for stage in one["stages"]] for one in topology["replicas"]]
    drivers = [nodes[0] for nodes in pipelines if victim.node_id in nodes[1:]]
    others = [daemon for daemon in mesh.daemons if daemon is not victim]
    return next((daemon for daemon in others if daemon.node_id in drivers), others[0])


def stage_node(mesh: LocalMesh, index: int) -> LocalDaemon:
    """The node of one of the first replica's stages."""
    replica, *_ = mesh.daemons[0].get("/admin/topology")["replicas"]
    node_id = replica["stages"][index]["node"]
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


def coordinator(mesh: LocalMesh) -> LocalDaemon:
    node_id = mesh.daemons[0].get("/admin/topology")["coordinator"]
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


CASES: dict[str, tuple[int, Callable[[LocalMesh], LocalDaemon]]] = {
    "last stage's host": (3, lambda mesh: stage_node(mesh, -1)),
    "driver's host": (3, lambda mesh: stage_node(mesh, 0)),
    "coordinator's host": (3, coordinator),
    "last stage's host, a spare replica present": (4, lambda mesh: stage_node(mesh, -1)),
}


if __name__ == "__main__":
    sys.exit(main())
