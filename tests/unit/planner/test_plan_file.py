"""A saved plan is read back as it was, and what is none is refused in one line."""

from __future__ import annotations

import msgspec
import pytest

from hexmesh.errors import InvalidInput, NoRoom, NotReady
from hexmesh.fleet import Scenario, read_fleet
from hexmesh.planner.finish import finish
from hexmesh.planner.front import search
from hexmesh.planner.in_use import in_use
from hexmesh.planner.objective import Goodput, LeastCost
from hexmesh.planner.plan_file import VERSION, PlanFile, figures_of, read_plan_file, search_view
from hexmesh.planner.problem import Problem
from hexmesh.planner.unmet import unmet, why_nothing
from hexmesh.workload import Slo, Workload, named_workload
from tests.unit.planner.test_explanation import SPEC, best_of, explained, problem_of

TEXT = '[[host]]\nname = "a"\ndevices = [{ type = "A10", count = 2 }]\nprice_per_h = 2'


@pytest.fixture(scope="module")
def file() -> PlanFile:
    scenario = Scenario(read_fleet(TEXT), named_workload("LPLD@2/s"), "float16")
    problem = problem_of(scenario)
    found = search(problem, "exhaustive", seed=7, clock=lambda: 0.0)
    assert found.best is not None
    best = in_use(problem, found.best)
    return PlanFile(
        version=VERSION,
        model="m",
        spec=SPEC,
        dtype="float16",
        objective="throughput",
        workload=scenario.workload,
        cluster=scenario.cluster,
        plan=finish(problem, best, model_id="m", model_name="m", max_model_tokens=4096, hosts={"a": 0}),
        figures=figures_of(problem, best),
        bound_requests_per_s=found.bound_requests_per_s,
        bound=found.bound,
        gap=found.gap,
        search=search_view(found, 7),
        explanation=explained(problem, best),
    )


def test_what_is_saved_is_read_back(file: PlanFile) -> None:
    data = msgspec.json.encode(file)
    assert read_plan_file(data, "x") == file
    assert msgspec.json.decode(data)["figures"]["n_devices"] == 2


def test_figures_follow_from_the_plan(file: PlanFile) -> None:
    figures, workload = file.figures, file.workload
    assert figures.output_tokens_per_s == pytest.approx(figures.requests_per_s * workload.output_tokens)
    tokens = figures.requests_per_s * (workload.prompt_tokens + workload.output_tokens) * 3600
    assert figures.price_per_million_tokens == pytest.approx(2e6 / tokens)
    assert file.bound_requests_per_s * (1 - file.gap) == pytest.approx(figures.requests_per_s)


def test_what_is_no_plan_is_refused(file: PlanFile) -> None:
    data = msgspec.json.encode(file)
    for bad, said in (
        (b"[]", "is no saved plan"),
        (b"\xff", "is no saved plan"),
        (b'{"version": 2}', "version 2, not 1"),
        (data.replace(b'"n_layers":8', b'"n_layers":9'), "do not cover 9 layers"),
        (data.replace(b'"float16"', b'"int3"'), "is no saved plan"),
    ):
        with pytest.raises(InvalidInput) as caught:
            read_plan_file(bad, "plan.json")
        assert said in caught.value.one_line()
        assert "hexmesh plan --save" in caught.value.one_line()


def problem_with(text: str, workload: Workload, objective: Goodput | LeastCost) -> Problem:
    return problem_of(Scenario(read_fleet(text), workload, "float16"), objective)


def test_too_little_memory_is_said_in_bytes() -> None:
    small = '[[host]]\nname = "a"\ndevices = [{ type = "T4", budget = "1GiB" }]'
    problem = problem_with(small, named_workload("LPLD"), Goodput())
    error = why_nothing(problem, search(problem, "exhaustive", seed=0, clock=lambda: 0.0))
    assert isinstance(error, NoRoom)
    assert error.room_bytes == 2**30
    assert error.needed_bytes > 3.2e9
    assert "all devices have 1.0 GiB; add 2" in error.one_line()


def test_limits_of_time_are_said_with_the_least_that_can_be() -> None:
    slo = Slo(ttft_s=0.001, tpot_s=0.0001)
    problem = problem_with(TEXT, Workload(slo=slo), Goodput())
    error = why_nothing(problem, search(problem, "exhaustive", seed=0, clock=lambda: 0.0))
    assert isinstance(error, NotReady)
    assert "time to the first token of 1.0 ms asked, the least found is " in error.message
    assert "time per output token of 100 us asked, the least found is " in error.message
    least_s = float(error.message.split("least found is ")[1].split(" ms")[0]) / 1e3
    relaxed = problem_with(TEXT, Workload(slo=Slo(ttft_s=least_s * 1.01)), Goodput())
    assert best_of(relaxed).flow.requests_per_s > 0


def test_a_rate_out_of_reach_is_said_with_the_best() -> None:
    problem = problem_with(TEXT, named_workload("LPLD@5000/s"), LeastCost(5000.0))
    found = search(problem, "exhaustive", seed=0, clock=lambda: 0.0)
    (line,) = unmet(problem, found)
    assert found.best is not None
    assert f"5000 requests/s asked, the best plan serves {found.best.flow.requests_per_s:.4g}" in line
    within = problem_with(TEXT, named_workload("LPLD@1/s"), LeastCost(1.0))
    assert list(unmet(within, search(within, "exhaustive", seed=0, clock=lambda: 0.0))) == []
