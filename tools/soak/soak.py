"""A soak: a mesh of four hosts in two sites, clients that never stop, and one fault after another.

What must hold: every request that a node took ends with the right tokens or with a stated error, in time; and when it
is over nothing is left: no KV block, request, process, port, open file or file.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from hexmesh.errors import HexmeshError
from hexmesh.model_spec import model_spec_from_config
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabDaemon, LabMesh
from tools.soak.faults import Plan, Scene, draw
from tools.soak.leaks import Holdings, holdings, leaks, shared_memory
from tools.soak.load import ALLOWED, Load, Outcome, Question
from tools.soak.right_tokens import MIN_MARGIN, greedy, token_ids

SITES = {"east": ("e1", "e2"), "west": ("w1", "w2")}
LINK = Link(latency_s=0.010, rate_bytes_per_s=1.25e8)
TEXTS = (
    "What is a KV cache?",
    "What is a stage?",
    "What is a lease?",
    "What does prefill mean?",
    "What is a token?",
    "What is 17 + 25?",
)
MOST_TOKENS = 200
LATE_S = 120.0
"""No fault lasts 12 s, so an answer that took so long was stuck."""
HEAL_TIMEOUT_S = 90.0
"""How long the mesh may take to be ready when everything has been put right."""
SETTLE_TIMEOUT_S = 60.0
N_GAPS_SHOWN = 5

Tell = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Result:
    """What a soak found. `broken` lists promises that were broken, each in words."""

    seed: int
    started_s: float = field(default_factory=time.monotonic)
    faults: list[str] = field(default_factory=list)
    heals_s: list[float] = field(default_factory=list)
    """From a fault's end until all four nodes were ready in one plan, where the soak waited for that."""
    outcomes: list[Outcome] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        exact = [one for one in self.outcomes if one.verdict == "exact"]
        return {
            "seed": self.seed,
            "faults": dict(sorted(Counter(self.faults).items())),
            "requests": dict(sorted(Counter(one.verdict for one in self.outcomes).items())),
            "tokens": sum(one.n_tokens for one in self.outcomes),
            "longest_gap_s": _spread([one.longest_gap_s for one in exact]),
            "longest_gaps": [self._show_gap(one) for one in _longest(exact)],
            "heal_s": _spread(self.heals_s),
            "reasons": dict(
                Counter(one.said for one in self.outcomes if one.verdict != "exact").most_common(12)
            ),
            "broken": self.broken,
        }

    def _show_gap(self, one: Outcome) -> str:
        return (
            f"{one.longest_gap_s:.1f} s from {one.asked}, begun at {one.gap_began_s - self.started_s:.1f} s"
        )


def soak(*, n_faults: int, n_clients: int, seed: int, keep: Path | None, tell: Tell) -> Result:
    """Run it. `keep` is where the daemons' logs go."""
    result = Result(seed=seed)
    shared_before = shared_memory()
    questions = [_question(text) for text in TEXTS]
    with (
        tempfile.TemporaryDirectory(prefix="hexmesh-soak-", ignore_cleanup_errors=True) as folder,
        Lab(Topology(sites=SITES, links=both_ways({("east", "west"): LINK}))) as lab,
        LabMesh(Path(folder) / "mesh") as mesh,
    ):
        scene = _build(lab, mesh)
        tell("the mesh of four is ready")
        before = {daemon.name: holdings(daemon) for daemon in mesh.daemons}
        try:
            with Load(lambda: list(mesh.daemons), questions, n_clients, seed) as load:
                _afflict(scene, n_faults, random.Random(seed), result, tell)
            result.outcomes = load.outcomes
            _judge_outcomes(result)
            _judge_leaks(scene, before, result)
        except HexmeshError as error:
            result.broken.append(error.one_line())
        if keep is not None:
            _keep_logs(mesh, keep)
    if left := shared_memory() - shared_before:
        result.broken.append(f"shared memory left: {sorted(left)}")
    return result


def _build(lab: Lab, mesh: LabMesh) -> Scene:
    """Any two of the four hosts hold the model."""
    budget = memory_for_exactly(model_spec_from_config(resolve_model().config), 2)
    flags = ("--device", "cpu", "--threads", "1", "--memory", str(budget))
    first, *others = lab.hosts.values()
    founder = mesh.found_on(first, *flags, "--min-nodes", str(len(lab.hosts)))
    token = founder.fresh_token(uses=len(others))
    for daemon in [mesh.start_on(host, *flags, token=token) for host in others]:
        mesh.await_up(daemon)
    mesh.await_ready()
    return Scene(lab, mesh, flags)


def _afflict(scene: Scene, n_faults: int, rng: random.Random, result: Result, tell: Tell) -> None:
    """One fault after another; every second one waits until the mesh is whole, the others strike it as it is."""
    hosts = list(scene.lab.hosts)
    for index in range(n_faults):
        plan = draw(rng, hosts)
        started_s = time.monotonic()
        with plan.happening(scene):
            time.sleep(plan.lasts_s)
        result.faults.append(plan.name)
        if rng.random() < 0.5 or index == n_faults - 1:
            result.heals_s.append(_await_whole(scene))
        tell(_line(index + 1, n_faults, plan, time.monotonic() - started_s))
        time.sleep(plan.pause_s)


def _await_whole(scene: Scene) -> float:
    started_s = time.monotonic()
    scene.mesh.await_ready(timeout_s=HEAL_TIMEOUT_S)
    return time.monotonic() - started_s


def _judge_outcomes(result: Result) -> None:
    for one in result.outcomes:
        if one.verdict not in ALLOWED:
            result.broken.append(f"{one.verdict} from {one.asked} after {one.n_tokens} tokens: {one.said}")
        if one.took_s > LATE_S:
            result.broken.append(
                f"a request to {one.asked} took {one.took_s:.0f} s: {one.verdict} {one.said}"
            )


def _judge_leaks(scene: Scene, before: dict[str, Holdings], result: Result) -> None:
    """Give the mesh a while to put things away, then say what is left."""
    left: dict[str, list[str]] = {}
    known_files = frozenset(name for held in before.values() for name in held.files)

    def find_clean() -> bool | None:
        for daemon in scene.mesh.daemons:
            left[daemon.name] = leaks(before[daemon.name], holdings(daemon), known_files)
        return True if not any(left.values()) else None

    try:
        scene.mesh.await_value(find_clean, timeout_s=SETTLE_TIMEOUT_S, what="everything to be put away")
    except HexmeshError:
        result.broken += [f"{name} holds {what}" for name, found in left.items() for what in found]


def _question(text: str) -> Question:
    """With as many right tokens as are beyond doubt: no near tie among them."""
    prompt = token_ids(text)
    for n_tokens in (MOST_TOKENS, MOST_TOKENS // 2, MOST_TOKENS // 4):
        answer = greedy(prompt, n_tokens)
        if answer.margin > MIN_MARGIN:
            return Question(prompt, answer.tokens)
    raise ValueError(f"{text!r} has a near tie among its first {MOST_TOKENS // 4} tokens: ask something else")


def _longest(outcomes: list[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda one: one.longest_gap_s, reverse=True)[:N_GAPS_SHOWN]


def _line(index: int, n_faults: int, plan: Plan, took_s: float) -> str:
    with_other = f" and {plan.other}" if "cut" in plan.name else ""
    what = f"{plan.name} {plan.host}{with_other} for {plan.lasts_s:.1f} s"
    return f"{index}/{n_faults} {what}; over after {took_s:.1f} s"


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


def _keep_logs(mesh: LabMesh, keep: Path) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    for daemon in mesh.daemons:
        if isinstance(daemon, LabDaemon) and daemon.log.exists():
            (keep / f"{daemon.name}.log").write_bytes(daemon.log.read_bytes())
