"""How near plans' predictions come to what a mesh does: parameters fitted on one workload, judged on two others.

Two one-thread nodes on cores of their own hold one pipeline beside a gateway without a stage (`cores`), or three nodes
of a lab lie 40 ms apart (`lab`). One workload runs until the daemons have calibrated their figures by it; then two
others run, saturated and at half of their predicted rate. Throughput, TTFT p50 and TPOT p50 are predicted by the score
and by the simulator from nothing but what the mesh knows. Run: `python -m tools.bench.fidelity [--only cores,lab]
[--json]`.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from daemon.terminal.local_mesh import LocalMesh
from daemon.views import PlanningView
from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits
from hexmesh.plan import Flow, Plan, Replica, Stage
from hexmesh.score import Capacities, Residency, pipeline_of
from hexmesh.sim import simulate
from hexmesh.workload import Workload
from hexmesh.workload.arrivals import PoissonArrivals
from tools.bench.models import make_m125, random_prompt
from tools.bench.pipeline_mesh import SHARE_MIB, STOP_S
from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.bench.streams import Crowd, Stream, dial, greedy
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabMesh
from tools.netlab.user_namespace import become_able

GOAL = 0.15
N_STREAMS = 16
"""Requests that are under way at once where a mesh is saturated."""
FIT_S, SATURATED_S, EASY_S = 66.0, 12.0, 18.0
EASY = 0.5
"""Of the predicted rate, where latencies are judged."""
_IDLE_S = 0.005
ONE_WAY_S = 0.020
LINK = Link(latency_s=ONE_WAY_S, rate_bytes_per_s=1.25e8)
FITTED = Workload(prompt_tokens=96, output_tokens=48, max_concurrent_sequences=N_STREAMS)
JUDGED = {
    "long prompts": Workload(prompt_tokens=192, output_tokens=24, max_concurrent_sequences=N_STREAMS),
    "long answers": Workload(prompt_tokens=32, output_tokens=80, max_concurrent_sequences=N_STREAMS),
}


@dataclass(frozen=True, slots=True)
class Latencies:
    """What requests met."""

    output_tokens_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Client:
    """Asks one gateway."""

    connect: Callable[[], Any]
    seeds: Iterator[int] = field(default_factory=count)

    def saturate(self, workload: Workload, seconds: float) -> Latencies:
        """N_STREAMS at once, each followed by the next; counted between the first tenth of the time and its end."""
        crowd, streams = Crowd(), list[Stream]()
        start_s = time.monotonic()

        def go_on() -> bool:
            n_running = sum(not stream.is_over for stream in streams)
            if time.monotonic() - start_s < seconds:
                streams.extend(self._send(crowd, workload) for _ in range(N_STREAMS - n_running))
            return time.monotonic() - start_s >= seconds

        _drive(crowd, go_on)
        stop_s = start_s + seconds
        crowd.run()
        return _latencies(streams, start_s + seconds / 10, stop_s)

    def arrive(self, workload: Workload, rate: float, seconds: float) -> Latencies:
        """Requests at chance times of that rate."""
        rng, crowd, streams = random.Random(1), Crowd(), list[Stream]()
        start_s = time.monotonic()
        due_s = start_s

        def go_on() -> bool:
            nonlocal due_s
            while due_s <= min(time.monotonic(), start_s + seconds):
                streams.append(self._send(crowd, workload))
                due_s += rng.expovariate(rate)
            return time.monotonic() - start_s >= seconds

        _drive(crowd, go_on)
        crowd.run()
        return _latencies(streams, start_s, start_s + seconds)

    def _send(self, crowd: Crowd, workload: Workload) -> Stream:
        prompt = random_prompt(workload.prompt_tokens, seed=next(self.seeds))
        return crowd.send(self.connect(), greedy(prompt, workload.output_tokens))


def _drive(crowd: Crowd, is_over: Callable[[], bool]) -> None:
    """Until it is over, whether answers are under way or not."""
    while not is_over():
        crowd.run(until=is_over)
        time.sleep(_IDLE_S)


def _latencies(streams: Sequence[Stream], start_s: float, stop_s: float) -> Latencies:
    whole = [stream for stream in streams if len(stream.times_s) > 1]
    n_tokens = sum(start_s < at_s <= stop_s for stream in streams for at_s in stream.times_s)
    return Latencies(
        output_tokens_per_s=n_tokens / (stop_s - start_s),
        ttft_s=statistics.median(stream.first_token_s for stream in whole),
        tpot_s=statistics.median(
            (one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1) for one in whole
        ),
    )


@dataclass(frozen=True, slots=True)
class Known:
    """What the mesh plans from, and its plan."""

    view: PlanningView
    plan: Plan

    @property
    def cluster(self) -> Cluster:
        return self.view.cluster

    def by_score(self, workload: Workload) -> tuple[float, float, float]:
        """(output tokens/s, time to the first token when idle, time per token at EASY of the rate)."""
        costs = CostModel(self.view.spec, self.plan.dtype, 16, StepLimits())
        capacities = Capacities(costs, workload, Residency(most_sequences=N_STREAMS, prompts=1))
        (replica,) = self.plan.replicas
        pipeline = pipeline_of(replica.stages, self.cluster)
        rate = capacities.mixed(pipeline).requests_per_s
        return (
            rate * workload.output_tokens,
            capacities.prefill(pipeline).latency_s,
            capacities.tpot_at(pipeline, EASY * rate, computes_prompts=True),
        )

    def by_simulation(self, workload: Workload, rate: float | None) -> Latencies:
        """Of many requests; without a rate as many as can be served, N_STREAMS of them at once."""
        arrivals = None if rate is None else PoissonArrivals(requests_per_s=rate)
        asked = msgspec.structs.replace(workload, arrivals=arrivals)
        result = simulate(self.plan, self.cluster, self.view.spec, asked, n_requests=1500, seed=1)
        return Latencies(result.output_tokens_per_s, result.ttft_s.p50, result.tpot_s.p50)


def known_of(mesh: LocalMesh) -> Known:
    """Asked of the mesh, in the words that it plans with."""
    view = msgspec.convert(mesh.daemons[0].get("/admin/planning"), PlanningView)
    topology = mesh.daemons[0].get("/admin/topology")
    (replica,) = topology["replicas"]
    stages = tuple(
        Stage(
            node=stage["node"],
            devices=tuple(stage["devices"]),
            start=stage["layers"][0],
            stop=stage["layers"][1],
            kv_blocks=stage["kv_blocks"],
            needed_bytes=0,
            room_bytes=0,
            predicted_step_s=0.01,
        )
        for stage in replica["stages"]
    )
    made = Replica(
        id="r0",
        role="mixed",
        stages=stages,
        block_tokens=16,
        predicted_tokens_per_s=replica["predicted_tokens_per_s"],
        predicted_batch=N_STREAMS,
    )
    plan = Plan(
        model_id=view.model_id,
        model_name=view.model_name,
        n_layers=view.spec.n_layers,
        dtype=view.dtype,
        max_model_tokens=view.max_model_tokens,
        hosts=view.hosts,
        replicas=(made,),
        flows=(Flow(src="r0", dst="r0", share=1.0),),
    )
    return Known(view, plan)


def on_cores(report: Report, model_dir: Path, folder: Path) -> None:
    """Two pinned nodes and a gateway."""
    flags = ["--memory", f"{SHARE_MIB[2]}MiB", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    flags += ["--min-nodes", "3"]
    with LocalMesh(folder / "cores", stop_timeout_s=STOP_S) as mesh:
        mesh.found("node-1", *flags, "--cpu-affinity", "0", "--model", str(model_dir))
        mesh.join("node-2", *flags, "--cpu-affinity", "1")
        gateway = mesh.join("gateway", "--memory", "1MiB", "--threads", "1", "--device", "cpu")
        mesh.await_ready(plan_reaches=2)
        judge(report, "two cores", mesh, Client(partial(dial, gateway.url)))


def in_lab(report: Report, model_dir: Path, folder: Path) -> None:
    """Three nodes, each 40 ms of round trip from the others."""
    sites = {name: (f"{name}-1",) for name in ("a", "b", "c")}
    links = both_ways({("a", "b"): LINK, ("a", "c"): LINK, ("b", "c"): LINK})
    flags = ["--memory", f"{SHARE_MIB[3]}MiB", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    flags += ["--min-nodes", "3"]
    with (
        Lab(Topology(sites=sites, links=links)) as lab,
        LabMesh(folder / "lab", stop_timeout_s=STOP_S) as mesh,
    ):
        founder = mesh.found_on(lab.hosts["a-1"], *flags, "--model", str(model_dir))
        for name in ("b-1", "c-1"):
            mesh.await_up(mesh.start_on(lab.hosts[name], *flags, token=founder.fresh_token()))
        mesh.await_ready(plan_reaches=3)
        driver = next(
            one for one in mesh.daemons if one.node_id == known_of(mesh).plan.replicas[0].stages[0].node
        )
        port = int(driver.url.rpartition(":")[2])
        judge(report, "40 ms apart", mesh, Client(partial(lab.hosts[driver.name].connect, "127.0.0.1", port)))
        lab.check_valid()


def judge(report: Report, name: str, mesh: LocalMesh, client: Client) -> None:
    """Fit on one workload, then predict and measure the others."""
    before = known_of(mesh)
    progress(f"{name}: {len(before.plan.replicas[0].stages)} stages; fitting for {FIT_S:.0f} s")
    client.saturate(FITTED, FIT_S)
    known = _calibrated(mesh)
    for node in known.cluster.nodes:
        report.notes.append(
            f"{name}, {node.name}: launch {node.launch_s}, step {node.step_s}, "
            + ", ".join(
                f"{one.flops_per_s:.3g} FLOP/s, {one.bytes_per_s:.3g} bytes/s" for one in node.devices
            )
        )
    for what, workload in JUDGED.items():
        where = f"{name}, {what}"
        tokens_per_s, ttft_s, tpot_s = known.by_score(workload)
        rate = EASY * tokens_per_s / workload.output_tokens
        progress(f"{where}: predicted {tokens_per_s:.0f} tokens/s")
        saturated = client.saturate(workload, SATURATED_S)
        easy = client.arrive(workload, rate, EASY_S)
        simulated = known.by_simulation(workload, rate)
        full = known.by_simulation(workload, None)
        _compare(
            report,
            f"{where}: tokens/s",
            saturated.output_tokens_per_s,
            tokens_per_s,
            full.output_tokens_per_s,
        )
        _compare(report, f"{where}: TTFT p50 in ms", 1e3 * easy.ttft_s, 1e3 * ttft_s, 1e3 * simulated.ttft_s)
        _compare(report, f"{where}: TPOT p50 in ms", 1e3 * easy.tpot_s, 1e3 * tpot_s, 1e3 * simulated.tpot_s)


def _calibrated(mesh: LocalMesh) -> Known:
    """What is known once every stage's node has told its corrections."""

    def find() -> Known | None:
        known = known_of(mesh)
        used = {stage.node for stage in known.plan.replicas[0].stages}
        nodes = [node for node in known.cluster.nodes if node.id in used]
        return known if all(node.step_s is not None for node in nodes) else None

    found: Known = mesh.await_value(find, timeout_s=20, what="calibrated figures")
    return found


def _compare(report: Report, name: str, measured: float, score: float, simulated: float) -> None:
    report.add(f"{name}, measured", measured, "")
    for by, predicted in (("score", score), ("simulator", simulated)):
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
