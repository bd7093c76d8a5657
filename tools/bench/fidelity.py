"""How near plans' predictions come to what a mesh does: parameters fitted on one workload, judged on two others.

Two one-thread nodes on cores of their own hold one pipeline beside a gateway without a stage (`cores`), or three nodes
of a lab lie 40 ms apart (`lab`). One workload runs, a request at a time and saturated, until the daemons have
calibrated their figures by it; then two others run: one request after the other, saturated, and at chance times at half
of the rate that they were served at when saturated. Throughput, TTFT p50 and TPOT p50 are predicted by the score and by
the simulator from nothing but what the mesh knows. The score says nothing of waiting: its time to the first token is
that of a prompt alone. Run: `python -m tools.bench.fidelity [--only cores,lab] [--json]`.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from daemon.terminal.client import read_admin_key
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.cluster import Node
from hexmesh.sim import SimResult
from hexmesh.workload import Workload
from tools.bench.fidelity_asked import N_STREAMS, Client, Met, StepCounter, Steps
from tools.bench.fidelity_known import Known, known_of
from tools.bench.models import make_m125
from tools.bench.pipeline_mesh import SHARE_MIB, STOP_S
from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.bench.streams import dial
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabMesh
from tools.netlab.user_namespace import become_able

GOAL = 0.15
FIT_ROUNDS, FIT_ALONE_S, FIT_FULL_S = 5, 4.0, 10.0
"""Both in turn, for calibrators look once a minute, whenever that is."""
ALONE_S, SATURATED_S, EASY_S = 8.0, 18.0, 18.0
EASY = 0.5
"""Of the saturated rate, where waiting is judged."""
ONE_WAY_S = 0.020
LINK = Link(latency_s=ONE_WAY_S, rate_bytes_per_s=1.25e8)
FITTED = Workload(prompt_tokens=96, output_tokens=48, max_concurrent_sequences=N_STREAMS)
JUDGED = {
    "long prompts": Workload(prompt_tokens=192, output_tokens=24, max_concurrent_sequences=N_STREAMS),
    "long answers": Workload(prompt_tokens=32, output_tokens=80, max_concurrent_sequences=N_STREAMS),
}
FLAGS = ("--threads", "1", "--device", "cpu", "--dtype", "float32")
NODE_FLAGS = (*FLAGS, "--min-nodes", "3")


def on_cores(report: Report, model_dir: Path, folder: Path) -> None:
    """Two pinned nodes and a gateway."""
    flags = [*NODE_FLAGS, "--memory", f"{SHARE_MIB[2]}MiB"]
    with LocalMesh(folder / "cores", stop_timeout_s=STOP_S) as mesh:
        mesh.found("node-1", *flags, "--cpu-affinity", "0", "--model", str(model_dir))
        mesh.join("node-2", *flags, "--cpu-affinity", "1")
        gateway = mesh.join("gateway", *FLAGS, "--memory", "1MiB")
        mesh.await_ready(plan_reaches=2)
        judge(report, "two cores", mesh, Client(partial(dial, gateway.url)))


def in_lab(report: Report, model_dir: Path, folder: Path) -> None:
    """Three nodes, each 40 ms of round trip from the others."""
    sites = {name: (f"{name}-1",) for name in ("a", "b", "c")}
    links = both_ways({("a", "b"): LINK, ("a", "c"): LINK, ("b", "c"): LINK})
    flags = [*NODE_FLAGS, "--memory", f"{SHARE_MIB[3]}MiB"]
    with (
        Lab(Topology(sites=sites, links=links)) as lab,
        LabMesh(folder / "lab", stop_timeout_s=STOP_S) as mesh,
    ):
        founder = mesh.found_on(lab.hosts["a-1"], *flags, "--model", str(model_dir))
        for name in ("b-1", "c-1"):
            mesh.await_up(mesh.start_on(lab.hosts[name], *flags, token=founder.fresh_token()))
        mesh.await_ready(plan_reaches=3)
        driver = _driver_of(mesh, known_of(mesh))
        port = int(driver.url.rpartition(":")[2])
        judge(report, "40 ms apart", mesh, Client(partial(lab.hosts[driver.name].connect, "127.0.0.1", port)))
        lab.check_valid()


def judge(report: Report, name: str, mesh: LocalMesh, client: Client) -> None:
    """Fit on one workload, then predict and measure the others."""
    progress(f"{name}: {len(known_of(mesh).stages)} stages; fitting")
    for _ in range(FIT_ROUNDS):
        client.one_by_one(FITTED, FIT_ALONE_S)
        client.saturate(FITTED, FIT_FULL_S)
    _calibrated(mesh)
    known = _replanned(mesh)
    for stage in known.stages:
        span = f"layers {stage.start}-{stage.stop - 1}"
        report.notes.append(f"{name}, {span}: {_figures_of(known.cluster.node(stage.node))}")
    for what, workload in JUDGED.items():
        measured = measure(mesh, client, known, workload)
        report.notes.append(f"{name}, {what}: load average {psutil.getloadavg()[0]:.1f}")
        compare(report, f"{name}, {what}", workload, measured)


@dataclass(frozen=True, slots=True)
class Measured:
    """What requests of one workload met, with the plan that they met."""

    known: Known
    alone: Met
    full: Met
    steps: Steps
    """While it was full."""
    easy: Met


def measure(mesh: LocalMesh, client: Client, fitted: Known, workload: Workload) -> Measured:
    """Again where the plan changes in between, as it may when figures were corrected."""
    while True:
        known = known_of(mesh).by_figures_of(fitted)
        alone = client.one_by_one(workload, ALONE_S)
        counter = StepCounter(_driver_of(mesh, known), len(known.stages))
        full = client.saturate(workload, SATURATED_S)
        steps = counter.steps()
        easy = client.arrive(workload, EASY * full.output_tokens_per_s / workload.output_tokens, EASY_S)
        if known_of(mesh).plan_id == known.plan_id:
            return Measured(known, alone, full, steps, easy)
        progress("  the plan changed: measured again")


def compare(report: Report, where: str, workload: Workload, measured: Measured) -> None:
    """All predictions of one workload, beside what it met."""
    known = measured.known
    capacities, pipeline = known.capacities(workload), known.pipeline
    rate = capacities.mixed(pipeline).requests_per_s
    first_s, alone_s = capacities.prefill(pipeline).latency_s, capacities.token_alone_s(pipeline)
    easy_s = capacities.tpot_at(pipeline, EASY * rate, computes_prompts=True)
    full = known.simulated_full(workload)
    _compare(
        report,
        f"{where}, saturated: tokens/s",
        measured.full.output_tokens_per_s,
        score=rate * workload.output_tokens,
        simulator=full.output_tokens_per_s,
    )
    for how, met, simulated, tpot_s in (
        ("alone", measured.alone, known.simulated_alone(workload), alone_s),
        ("half the rate", measured.easy, known.simulated_at(workload, measured.easy.sent_s), easy_s),
    ):
        ttfts = {"score": 1e3 * first_s, "simulator": 1e3 * simulated.ttft_s.p50}
        tpots = {"score": 1e3 * tpot_s, "simulator": 1e3 * simulated.tpot_s.p50}
        _compare(report, f"{where}, {how}: TTFT p50 in ms", 1e3 * met.ttft_s, **ttfts)
        _compare(report, f"{where}, {how}: TPOT p50 in ms", 1e3 * met.tpot_s, **tpots)
    ways_s = sum(hop.delay_s for hop in pipeline.hops) + pipeline.back.delay_s
    report.notes.append(f"{where}, saturated, {known.spans}: {_told(measured.steps, full, ways_s)}")


def _told(steps: Steps, simulated: SimResult, ways_s: float) -> str:
    """Where a step's time went, and where it was predicted to go."""
    stages = ", ".join(f"{1e3 * seconds:.1f}" for seconds in steps.stage_s)
    busy = ", ".join(f"{share:.0%}" for share in steps.busy)
    simulated_busy = ", ".join(f"{stage.busy:.0%}" for stage in simulated.stages)
    return (
        f"{steps.per_s:.1f} steps/s, stages take {stages} ms and are busy {busy}, "
        f"ways {1e3 * steps.transit_s:.1f} ms where {1e3 * ways_s:.1f} are known; "
        f"simulated {simulated.n_steps / simulated.seconds:.1f} steps/s, busy {simulated_busy}"
    )


def _figures_of(node: Node) -> str:
    figures = ", ".join(
        f"{one.flops_per_s:.3g} FLOP/s, {one.bytes_per_s:.3g} bytes/s" for one in node.devices
    )
    return f"{node.name}, {figures}, layer {1e6 * (node.launch_s or 0):.0f} us, step {1e3 * (node.step_s or 0):.2f} ms"


def _driver_of(mesh: LocalMesh, known: Known) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.node_id == known.stages[0].node)


def _calibrated(mesh: LocalMesh) -> Known:
    """What is known once every stage's node has told its corrections."""

    def find() -> Known | None:
        known = known_of(mesh)
        used = {stage.node for stage in known.stages}
        nodes = [node for node in known.cluster.nodes if node.id in used]
        return known if all(node.step_s is not None for node in nodes) else None

    found: Known = mesh.await_value(find, timeout_s=20, what="calibrated figures")
    return found


def _replanned(mesh: LocalMesh) -> Known:
    """The plan is made from the corrected figures now, rather than by itself when they have lasted for a minute."""
    first = mesh.daemons[0]
    epoch = first.get("/admin/topology")["epoch"]
    first.client.post(
        "/admin/replan", {"reason": "figures were corrected"}, key=read_admin_key(first.state_dir)
    )
    mesh.await_value(
        lambda: first.get("/admin/topology")["epoch"] not in (None, epoch) or None,
        timeout_s=60,
        what="a plan from corrected figures",
    )
    mesh.await_ready()
    return known_of(mesh)


def _compare(report: Report, name: str, measured: float, *, score: float, simulator: float) -> None:
    report.add(f"{name}, measured", measured, "")
    for by, predicted in (("score", score), ("simulator", simulator)):
        report.add(f"{name}, {by}", predicted, "")
        report.add(f"{name}, {by} off by", abs(predicted / measured - 1), "", at_most=GOAL)


PARTS = {"cores": on_cores, "lab": in_lab}


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", type=Path, help="m125 as an earlier run made it")
    arguments = parser.parse_args()
    report = Report(name="fidelity", method=f"random Llama m125 in float32; goal {GOAL:.0%}")
    wanted = arguments.only.split(",")
    report.not_run += [part for part in PARTS if part not in wanted]
    if "lab" in wanted:
        become_able()
    with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as name:
        model_dir = make_m125(arguments.model or Path(name) / "m125")
        try:
            for part in wanted:
                PARTS[part](report, model_dir, Path(name))
        finally:
            print_report(report, "json" if arguments.json else "text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
