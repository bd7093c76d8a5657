"""How long a stream stalls when something on its way is killed, hangs or is cut off; how soon another node coordinates.

A greedy stream runs through a node that survives; at a token in its middle something happens. The stall is the longest
gap between two tokens at the client, and every stream must have the tokens of an undisturbed one.
Run: `python tools/bench/recovery.py [--quick] [--json] [--only CASE] [--runs N]`; cuts need the lab (see tools/netlab).
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import least_memory_bytes, memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tools.bench.disturbed_stream import AT_TOKEN, N_TOKENS, DisturbedStream
from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabMesh
from tools.netlab.namespaces import why_unavailable

FLAGS = ("--device", "cpu", "--threads", "1", "--min-nodes", "3", "--memory")
NAMES = ("one", "two", "three")
CUT_TOKENS = {0.020: 120, 0.220: 40}
"""Round trip of every link, and tokens of a stream: each takes several round trips."""
FIRST_ANSWER_TOKENS = 8


@dataclass(slots=True)
class Samples:
    """What the runs of one case gave."""

    stalls_s: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    leads_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Bench:
    """Owner of the samples, by case."""

    n_runs: int
    only: str | None
    samples: dict[str, Samples] = field(default_factory=dict)
    firsts_s: list[float] = field(default_factory=list)
    """From the restart of all nodes to the first answer."""
    not_run: list[str] = field(default_factory=list)
    undisturbed: list[int] = field(default_factory=list)
    """The answer of a mesh in which nothing happened."""

    def run(self, case: str, stream: DisturbedStream) -> None:
        """Run a stream and note how it went."""
        samples = self.samples.setdefault(case, Samples())
        if len(self.undisturbed) < stream.n_tokens:
            self.undisturbed = DisturbedStream(stream.daemon, stream.n_tokens).run().tokens
        stream.run()
        samples.stalls_s.append(stream.stall_s)
        samples.exact.append(stream.tokens == self.undisturbed[: stream.n_tokens])
        run = f"{len(samples.stalls_s)}/{self.n_runs}"
        progress(f"{case}: run {run}: stall {stream.stall_s:.2f} s, exact {samples.exact[-1]}")

    def wants(self, case: str) -> bool:
        return self.only is None or self.only in case


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--runs", type=int, help="how often each case is run (default 5, with --quick once)")
    arguments = parser.parse_args()
    bench = Bench(n_runs=arguments.runs or (1 if arguments.quick else 5), only=arguments.only)
    on_loopback(bench)
    without_the_coordinator(bench)
    with_a_spare(bench)
    for rtt_s, n_tokens in CUT_TOKENS.items():
        cut_off(bench, rtt_s, n_tokens)
    print_report(as_report(bench), "json" if arguments.json else "text")
    return 0


def as_report(bench: Bench) -> Report:
    report = Report(
        name="recovery",
        method=(
            f"shipped model, disturbed at token {AT_TOKEN} of {N_TOKENS}; stall = longest gap between tokens "
            f"at the client; {bench.n_runs} runs a case; three nodes on loopback of which two hold the model, "
            "unless the case says otherwise"
        ),
        not_run=bench.not_run,
    )
    for case, samples in bench.samples.items():
        report.add(f"stall, {case}", samples.stalls_s, "s")
        report.add(f"stall p50, {case}", statistics.median(samples.stalls_s), "s", at_most=goal_s(case))
        exact = statistics.fmean(samples.exact)
        report.add(f"streams with exactly the right tokens, {case}", exact, "", at_least=1.0)
        if samples.leads_s:
            report.add(f"another coordinator leads, {case}", samples.leads_s, "s", at_most=5.0)
    if bench.firsts_s:
        report.add("first answer after the restart of all nodes", bench.firsts_s, "s")
    return report


def goal_s(case: str) -> float:
    """Weights load in 0.1 s here, so that "weight load time + 3 s" is 3.1 s."""
    if case.startswith("cut"):
        return 5.0
    if case.startswith("coordinator without a stage"):
        return 0.25
    return 1.0 if case.startswith("spare") else 3.1


# --- on loopback: one mesh after the other, in which everything happens once ---


def on_loopback(bench: Bench) -> None:
    cases: dict[str, Callable[[LocalMesh, Bench, str], None]] = {
        "worker stopped, last stage's": stop_worker,
        "daemon stopped, driver's host": lambda mesh, bench, case: stop_daemon(mesh, bench, case, 0),
        "daemon stopped, last stage's host": lambda mesh, bench, case: stop_daemon(mesh, bench, case, -1),
        "killed, last stage's host": lambda mesh, bench, case: kill(mesh, bench, case, stage_node(mesh, -1)),
        "killed, driver's host": lambda mesh, bench, case: kill(mesh, bench, case, stage_node(mesh, 0)),
        "killed, coordinator's host": lambda mesh, bench, case: kill(mesh, bench, case, coordinator(mesh)),
        "restart of all": restart_all,
    }
    wanted = {case: run for case, run in cases.items() if bench.wants(case)}
    for _ in range(bench.n_runs if wanted else 0):
        with fresh_mesh(dict.fromkeys(NAMES, two_hold_it())) as mesh:
            for case, run in wanted.items():
                await_whole(mesh)
                run(mesh, bench, case)


def stop_worker(mesh: LocalMesh, bench: Bench, case: str) -> None:
    victim = stage_node(mesh, -1)
    processes = psutil.Process(victim.process.pid).children(recursive=True)
    (worker,) = (one for one in processes if one.name() == "hexmesh-worker")
    measure(mesh, bench, case, victim, worker.suspend, is_host_lost=False)


def stop_daemon(mesh: LocalMesh, bench: Bench, case: str, stage: int) -> None:
    victim = stage_node(mesh, stage)
    try:
        measure(mesh, bench, case, victim, lambda: os.killpg(victim.process.pid, signal.SIGSTOP))
    finally:
        os.killpg(victim.process.pid, signal.SIGCONT)


def kill(mesh: LocalMesh, bench: Bench, case: str, victim: LocalDaemon) -> None:
    measure(mesh, bench, case, victim, victim.kill_group)
    restart(mesh, [victim])


def restart_all(mesh: LocalMesh, bench: Bench, case: str) -> None:
    for daemon in mesh.daemons:
        daemon.kill_group()
    started_s = time.monotonic()
    restart(mesh, mesh.daemons)
    mesh.await_ready()
    DisturbedStream(mesh.daemons[0], FIRST_ANSWER_TOKENS).run()
    bench.firsts_s.append(time.monotonic() - started_s)
    progress(f"{case}: first answer after {bench.firsts_s[-1]:.2f} s")


def measure(
    mesh: LocalMesh,
    bench: Bench,
    case: str,
    victim: LocalDaemon,
    disturb: Callable[[], None],
    *,
    is_host_lost: bool = True,
    n_tokens: int = N_TOKENS,
) -> None:
    """One disturbed stream, through a node that is not the victim's."""
    is_coordinator_lost = is_host_lost and victim is coordinator(mesh)
    through = next(daemon for daemon in mesh.daemons if daemon is not victim)
    leads: list[Future[float]] = []

    def disturb_and_watch() -> None:
        disturb()
        if is_coordinator_lost:
            leads.append(pool.submit(when_another_leads, mesh, through, victim))

    stream = DisturbedStream(through, n_tokens, min(AT_TOKEN, n_tokens // 2), disturb_and_watch)
    with ThreadPoolExecutor(1) as pool:
        bench.run(case, stream)
        bench.samples[case].leads_s += [lead.result() - stream.disturbed_s for lead in leads]


def when_another_leads(mesh: LocalMesh, witness: LocalDaemon, dead: LocalDaemon) -> float:
    """When the witness was seen to follow another."""
    mesh.await_value(
        lambda: witness.get("/admin/topology")["coordinator"] not in (None, dead.node_id) or None,
        timeout_s=30,
        what="another coordinator",
    )
    return time.monotonic()


# --- meshes of other shapes ---


def without_the_coordinator(bench: Bench) -> None:
    """The founder coordinates and is too small for a stage."""
    case = "coordinator without a stage, killed"
    for _ in range(bench.n_runs if bench.wants(case) else 0):
        with fresh_mesh({"one": "1MiB", "two": two_hold_it(), "three": two_hold_it()}) as mesh:
            victim = coordinator(mesh)
            if victim.node_id in {stage["node"] for stage in replicas(mesh)[0]["stages"]}:
                raise SystemExit("the coordinator carries a stage: this case means nothing")
            measure(mesh, bench, case, victim, victim.kill_group)


def with_a_spare(bench: Bench) -> None:
    """Four nodes, each a little too small for the model: where the planner makes two pairs, one of them is lost."""
    case = "spare: a host of the stream's replica killed"
    if not bench.wants(case):
        return
    budget = str(97 * least_memory_bytes(model_spec_from_config(resolve_model().config), 1) // 100)
    with fresh_mesh(dict.fromkeys((*NAMES, "four"), budget), n_nodes=4) as mesh:
        for _ in range(bench.n_runs):
            await_whole(mesh)
            if len(replicas(mesh)) < 2:
                bench.not_run.append(f"{case}: no spare, the plan has one replica")
                return
            gateway = mesh.daemons[0]
            victims: list[LocalDaemon] = []
            stream = DisturbedStream(gateway, disturb=lambda: victims.append(kill_in_use(mesh, gateway)))  # noqa: B023
            bench.run(case, stream)
            restart(mesh, victims)


def kill_in_use(mesh: LocalMesh, gateway: LocalDaemon) -> LocalDaemon:
    """Kill the driver of the replica in use, or its last stage's host where the driver is the gateway."""
    (request,) = gateway.get("/admin/requests")
    (used,) = (one for one in replicas(mesh) if one["id"] == request["replica"])
    driver, *_, last = (by_id(mesh, stage["node"]) for stage in used["stages"])
    victim = last if driver is gateway else driver
    victim.kill_group()
    return victim


# --- cut off, in the lab ---


def cut_off(bench: Bench, rtt_s: float, n_tokens: int) -> None:
    cases = {
        f"cut off at {1000 * rtt_s:.0f} ms, last stage's host": lambda mesh: stage_node(mesh, -1),
        f"cut off at {1000 * rtt_s:.0f} ms, driver's host": lambda mesh: stage_node(mesh, 0),
        f"cut off at {1000 * rtt_s:.0f} ms, coordinator's host": coordinator,
    }
    wanted = {case: find for case, find in cases.items() if bench.wants(case)}
    if not wanted:
        return
    if (blocker := why_unavailable()) is not None:
        bench.not_run += [f"{case}: {blocker.one_line()}" for case in wanted]
        return
    link = Link(latency_s=rtt_s / 2, rate_bytes_per_s=1.25e8)
    sites = {"tokyo": ("t1",), "osaka": ("o1",), "berlin": ("b1",)}
    links = both_ways({("tokyo", "osaka"): link, ("tokyo", "berlin"): link, ("osaka", "berlin"): link})
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(Topology(sites=sites, links=links)))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hexmesh-bench-"))
        mesh = stack.enter_context(LabMesh(Path(folder) / "mesh"))
        found_in_lab(lab, mesh)
        for _ in range(bench.n_runs):
            for case, find_victim in wanted.items():
                await_whole(mesh)
                victim = find_victim(mesh)
                measure(mesh, bench, case, victim, partial(lab.isolate, victim.name), n_tokens=n_tokens)
                lab.heal()


def found_in_lab(lab: Lab, mesh: LabMesh) -> None:
    flags = (*FLAGS, two_hold_it())
    founder = mesh.found_on(lab.hosts["t1"], *flags)
    token = founder.fresh_token(uses=2)
    for daemon in [mesh.start_on(lab.hosts[name], *flags, token=token) for name in ("o1", "b1")]:
        mesh.await_up(daemon)


# --- the mesh and its nodes ---


@contextmanager
def fresh_mesh(budgets: dict[str, str], n_nodes: int = 3) -> Iterator[LocalMesh]:
    """A mesh of nodes with these budgets, ready; the first one founds it."""
    flags = ("--device", "cpu", "--threads", "1", "--min-nodes", str(n_nodes), "--memory")
    with (
        tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as folder,
        LocalMesh(Path(folder) / "mesh") as mesh,
    ):
        for index, (name, budget) in enumerate(budgets.items()):
            (mesh.join if index else mesh.found)(name, *flags, budget)
        mesh.await_ready()
        yield mesh


def two_hold_it() -> str:
    """A budget with which two nodes hold the model, and one does not."""
    return str(memory_for_exactly(model_spec_from_config(resolve_model().config), 2))


def restart(mesh: LocalMesh, daemons: Iterable[LocalDaemon]) -> None:
    """Start killed nodes again and wait until they are up."""
    for daemon in [mesh.restart(daemon) for daemon in list(daemons)]:
        mesh.await_up(daemon)


def await_whole(mesh: LocalMesh) -> None:
    """All nodes are ready in one plan that leaves none out, and each sees every other alive."""
    mesh.await_ready()

    def is_whole() -> bool | None:
        seen = [{member["state"] for member in daemon.get("/admin/members")} for daemon in mesh.daemons]
        reasons = [one["reason"] for one in mesh.daemons[0].get("/admin/topology")["unused"]]
        # A node that was lost twice within a minute is left out of plans for a while.
        is_one_out = any("present plan" in reason or "part of this plan" in reason for reason in reasons)
        return True if all(states == {"alive"} for states in seen) and not is_one_out else None

    mesh.await_value(is_whole, timeout_s=180, what="every node to be planned with again")


def replicas(mesh: LocalMesh) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = mesh.daemons[0].get("/admin/topology")["replicas"]
    return found


def stage_node(mesh: LocalMesh, index: int) -> LocalDaemon:
    """The node of one of the first replica's stages."""
    return by_id(mesh, replicas(mesh)[0]["stages"][index]["node"])


def coordinator(mesh: LocalMesh) -> LocalDaemon:
    return by_id(mesh, mesh.daemons[0].get("/admin/topology")["coordinator"])


def by_id(mesh: LocalMesh, node_id: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


if __name__ == "__main__":
    sys.exit(main())
