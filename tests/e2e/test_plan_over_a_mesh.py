"""`hexmesh plan` with a search over a running mesh: what it measured, and nothing changed by asking."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from daemon.terminal.local_mesh import LocalMesh
from hexmesh.planner.plan_file import PlanFile
from hexmesh.schedule.check import check_plan

FLAGS = ("--device", "cpu", "--threads", "1", "--memory", "512MiB")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with LocalMesh(tmp_path_factory.mktemp("mesh")) as mesh:
        mesh.found("one", *FLAGS, "--min-nodes", "2")
        mesh.join("two", *FLAGS)
        mesh.await_ready()
        yield mesh


def hexmesh(mesh: LocalMesh, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEXMESH_")}
    environment |= {"HEXMESH_STATE_DIR": str(mesh.daemons[0].state_dir), "HEXMESH_CONFIG": os.devnull}
    return subprocess.run(
        [sys.executable, "-m", "daemon", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def test_a_search_plans_over_what_the_mesh_measured_and_changes_nothing(
    mesh: LocalMesh, tmp_path: Path
) -> None:
    before = mesh.daemons[0].get("/admin/plan")["plan_id"]
    saved = tmp_path / "plan.json"
    done = hexmesh(mesh, "plan", "--workload", "LPLD", "--explain", "--save", str(saved))
    assert done.returncode == 0, done.stderr
    assert "bottleneck" in done.stdout
    file = msgspec.json.decode(saved.read_bytes(), type=PlanFile)
    assert {node.id for node in file.cluster.nodes} == {daemon.node_id for daemon in mesh.daemons}
    assert all(device.flops_per_s > 0 for node in file.cluster.nodes for device in node.devices)
    assert {(link.src, link.dst) for link in file.cluster.links}
    assert check_plan(file.plan, file.cluster, file.spec, file.workload) == []
    assert mesh.daemons[0].get("/admin/plan")["plan_id"] == before
    simulated = hexmesh(mesh, "simulate", "--plan", str(saved), "--requests", "100")
    assert simulated.returncode == 0, simulated.stderr
    assert "one" in simulated.stdout or "two" in simulated.stdout


def test_what_if_asks_about_the_mesh_by_the_names_of_its_hosts(mesh: LocalMesh) -> None:
    done = hexmesh(mesh, "plan", "--what-if", "remove two", "-o", "json")
    assert done.returncode == 0, done.stderr
    file = msgspec.json.decode(done.stdout, type=PlanFile)
    assert file.what_if is not None
    assert file.what_if.before is not None
    assert [node.name for node in file.cluster.nodes] == ["one"]
    assert file.figures.requests_per_s < file.what_if.before.requests_per_s


def test_a_model_for_the_running_mesh_is_refused(mesh: LocalMesh) -> None:
    done = hexmesh(mesh, "plan", "--model", "Llama-2-7B")
    assert done.returncode == 2
    assert (
        done.stderr == "hexmesh: the running mesh has its model and dtype; or name a fleet: --cluster FILE\n"
    )
