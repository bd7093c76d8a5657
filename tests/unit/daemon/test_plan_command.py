"""`hexmesh plan --cluster` and `hexmesh simulate` as a process would see them: output, exit codes, files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from daemon.cli import main
from hexmesh.plan import plan_fault
from hexmesh.planner.plan_file import PlanFile, read_plan_file
from hexmesh.schedule.check import check_plan

Hexmesh = Callable[..., tuple[int, str, str]]

FLEET = """
name = "desks"
[[host]]
name = "left"
count = 2
devices = [{ type = "RTX-4090", count = 2 }]
price_per_h = 0.5
[[host]]
name = "right"
site = "there"
devices = [{ type = "T4" }]
price_per_h = 0.2
[[wan]]
between = ["here", "there"]
rate = "100Mbit/s"
"""


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("HEXMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HEXMESH_CONFIG", os.devnull)
    monkeypatch.setenv("HEXMESH_STATE_DIR", str(tmp_path))
    (tmp_path / "fleet.toml").write_text(FLEET)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hexmesh(capsys: pytest.CaptureFixture[str]) -> Hexmesh:
    """Run a command line; gives (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


PLAN = (
    "plan",
    "--cluster",
    "fleet.toml",
    "--model",
    "Llama-2-7B",
    "--workload",
    "LPLD",
    "--algorithm",
    "greedy",
)


def test_the_json_is_a_whole_plan_that_the_certificate_accepts(hexmesh: Hexmesh) -> None:
    code, out, err = hexmesh(*PLAN, "-o", "json")
    assert (code, err) == (0, "")
    file = msgspec.json.decode(out, type=PlanFile)
    assert plan_fault(file.plan) is None
    assert check_plan(file.plan, file.cluster, file.spec, file.workload) == []
    assert 0 < file.figures.requests_per_s <= file.bound_requests_per_s
    assert file.explanation is not None
    devices = {(one.node, index) for one in file.explanation.devices for index in one.devices}
    assert len(devices) == file.figures.n_devices


def test_the_table_says_rate_bound_and_bottleneck_and_more_with_explain(hexmesh: Hexmesh) -> None:
    code, brief, err = hexmesh(*PLAN)
    assert (code, err) == (0, "")
    for said in ("requests/s", "bound ", "no plan serves more than", "bottleneck ", "left-0/RTX-4090["):
        assert said in brief
    assert "\x1b" not in brief
    whole = hexmesh(*PLAN, "--explain")[1]
    for said in ("What each stage needs of its devices", "Why these roles:", "--what-if", "KV TOKENS"):
        assert said not in brief
        assert said in whole


def test_the_same_seed_gives_the_same_plan(hexmesh: Hexmesh) -> None:
    plans = [json.loads(hexmesh(*PLAN, "--seed", "3", "-o", "json")[1])["plan"] for _ in range(2)]
    assert plans[0] == plans[1]


def test_what_if_shows_before_and_after(hexmesh: Hexmesh) -> None:
    changes = ("--what-if", "remove left-1", "--what-if", "price left-0=0.4")
    code, out, _ = hexmesh(*PLAN, *changes, "-o", "json")
    file = msgspec.json.decode(out, type=PlanFile)
    assert code == 0
    assert file.what_if is not None
    assert file.what_if.changes == ("remove left-1", "price left-0=0.4")
    assert file.what_if.before is not None
    assert file.what_if.before.requests_per_s > file.figures.requests_per_s
    assert {node.name for node in file.cluster.nodes} == {"left-0", "right"}
    table = hexmesh(*PLAN, *changes)[1]
    assert "BEFORE" in table
    assert "remove left-1; price left-0=0.4" in table


def test_compare_ranks_every_algorithm(hexmesh: Hexmesh) -> None:
    from hexmesh.planner.front import ALGORITHMS

    fleet = '[[host]]\nname = "a"\ndevices = [{ type = "RTX-4090", count = 2 }]'
    Path("small.toml").write_text(fleet)
    args = ("plan", "--cluster", "small.toml", "--model", "Llama-2-7B", "--compare", "--budget-s", "2")
    code, out, _ = hexmesh(*args, "-o", "json")
    file = msgspec.json.decode(out, type=PlanFile)
    rates = [row.figures.requests_per_s for row in file.comparison if row.figures is not None]
    assert code == 0
    assert {row.algorithm for row in file.comparison} == set(ALGORITHMS)
    assert rates == sorted(rates, reverse=True)
    assert file.figures.requests_per_s == pytest.approx(rates[0])


@pytest.mark.parametrize(
    ("args", "exit_code", "said"),
    [
        (
            ("--model", "llama-2-71b"),
            2,
            "'llama-2-71b' is no model folder, config.json, hub id or known name",
        ),
        (("--workload", "XPLD"), 2, "no workload class 'XPLD'"),
        (("--cluster", "none.toml"), 2, "cluster file none.toml cannot be read: No such file"),
        (("--algorithm", "magic"), 2, "no algorithm is called 'magic'; choose one of auto"),
        (("--objective", "cost"), 2, "no rate to serve at least cost"),
        (("--what-if", "remove x"), 2, "what-if 'remove x': no host is called 'x'"),
        (("--dtype", "int4"), 2, "no dtype is called 'int4'"),
        (("--plot", "x.gif"), 2, "'x.gif' is neither .png nor .svg"),
        (("--plot", "pie:x.png"), 2, "no picture is called 'pie'"),
        (("--apply",), 2, "--apply is for the running mesh"),
        (("--save", "no/such/dir.json"), 2, "no/such/dir.json cannot be written"),
        (("--model", "Llama-2-70B"), 4, "the model with KV for one request needs"),
        (("--workload", "LPLD@5000/s", "--objective", "cost"), 3, ""),
    ],
)
def test_what_cannot_be_is_one_line_and_an_exit_code(
    args: tuple[str, ...], exit_code: int, said: str, hexmesh: Hexmesh
) -> None:
    code, _, err = hexmesh(*PLAN, *args)
    assert (code, err.count("\n")) == (exit_code, 1 if said else 0)
    assert said in err


def test_a_rate_out_of_reach_is_planned_for_and_said(hexmesh: Hexmesh) -> None:
    _, out, _ = hexmesh(*PLAN, "--workload", "LPLD@5000/s", "--objective", "cost")
    assert "5000 requests/s asked, the best plan serves" in " ".join(out.split())


def test_a_quantised_model_is_refused_with_the_reason(hexmesh: Hexmesh, tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = hexmesh(*PLAN, "--model", str(tmp_path))
    assert code == 2
    assert "quantised checkpoint is not supported; use the unquantised" in err


def test_models_and_workloads_may_be_files(hexmesh: Hexmesh, tmp_path: Path) -> None:
    from hexmesh.model_spec.known import KNOWN

    (tmp_path / "config.json").write_text(json.dumps({**KNOWN["Llama-2-7B"], "torch_dtype": "float16"}))
    (tmp_path / "w.toml").write_text('class = "LPLD"\nrequests_per_s = 2\n[slo]\ntpot = "200ms"')
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,20\n1,300,40\n")
    args = (
        "plan",
        "--cluster",
        "fleet.toml",
        "--algorithm",
        "greedy",
        "-o",
        "json",
        "--model",
        str(tmp_path),
    )
    file = msgspec.json.decode(hexmesh(*args, "--workload", "w.toml")[1], type=PlanFile)
    assert (file.dtype, file.workload.requests_per_s, file.workload.slo.tpot_s) == ("float16", 2.0, 0.2)
    traced = msgspec.json.decode(hexmesh(*args, "--workload", "t.csv")[1], type=PlanFile)
    assert (traced.workload.prompt_tokens, traced.workload.output_tokens) == (200, 30)


def test_pictures_name_what_they_show(hexmesh: Hexmesh) -> None:
    plots = (
        "--plot",
        "a.svg",
        "--plot",
        "search:b.svg",
        "--plot",
        "pareto:c.svg",
        "--plot",
        "topology:d.png",
    )
    code, _, err = hexmesh(*PLAN, *plots)
    assert (code, err.split()) == (0, ["drew", "a.svg", "drew", "b.svg", "drew", "c.svg", "drew", "d.png"])
    for path, words in (
        ("a.svg", ("left-0", "right", "there", "RTX-4090")),
        ("b.svg", ("found by", "greedy", "seconds")),
        ("c.svg", ("price per hour", "requests/s", "devices")),
    ):
        shown = " ".join(ElementTree.parse(path).getroot().itertext())
        for word in words:
            assert word in shown, (path, word)
    assert Path("d.png").read_bytes()[:4] == b"\x89PNG"


def test_a_saved_plan_is_simulated_with_its_own_workload_or_another(hexmesh: Hexmesh) -> None:
    code, _, err = hexmesh(*PLAN, "--save", "p.json")
    assert (code, err) == (0, "saved p.json\n")
    file = read_plan_file(Path("p.json").read_bytes(), "p.json")
    args = ("simulate", "--plan", "p.json", "--requests", "200", "-o", "json")
    run = json.loads(hexmesh(*args)[1])
    assert run["result"]["is_saturated"]
    assert run["predicted"]["requests_per_s"] == file.figures.requests_per_s
    slow = json.loads(hexmesh(*args, "--workload", "LPLD@1/s", "--fail", "left-0@5s-20s")[1])["result"]
    assert not slow["is_saturated"]
    assert slow["served"] + slow["refused"] + slow["lost"] == 200
    code, out, err = hexmesh("simulate", "--plan", "p.json", "--requests", "200", "--plot", "t.svg")
    assert (code, err) == (0, "drew t.svg\n")
    assert "first token" in out
    shown = " ".join(ElementTree.parse("t.svg").getroot().itertext())
    assert "output tokens/s" in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--fail", "left-0"), "'left-0' is no failure; write such as"),
        (("--fail", "x@3s"), "no host is called 'x'; name one of left-0"),
        (("--fail", "left-0@9s-3s"), "it is back before it dies"),
        (("--plan", "fleet.toml"), "fleet.toml is no saved plan"),
        (("--plan", "none.json"), "plan none.json cannot be read"),
        (("--model", "Llama-2-13B"), "does not fit: "),
        (("--plot", "x.gif"), "neither .png nor .svg"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(args: tuple[str, ...], said: str, hexmesh: Hexmesh) -> None:
    hexmesh(*PLAN, "--save", "p.json")
    code, out, err = hexmesh("simulate", "--plan", "p.json", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
