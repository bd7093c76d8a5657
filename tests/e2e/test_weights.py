"""A mesh whose second node has nothing but the token: real daemons, weights from the founder alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.models.manifests import local_manifest
from daemon.models.model_source import SHIPPED_MODEL, resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from hexmesh.weights.manifest import Manifest
from tests.e2e.asking import Stream, expected, token_ids
from tests.e2e.weight_peers import spoil

CPU = ("--device", "cpu", "--threads", "1")
QUESTION = "What is a KV cache?"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return local_manifest(resolve_model(), tmp_path_factory.mktemp("hashes")).manifest


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """Neither node holds the model alone, and the founder's folder is nowhere on the joiner's host."""
    folder = tmp_path_factory.mktemp("weights")
    shutil.copytree(SHIPPED_MODEL, folder / "model")
    budget = str(memory_for_exactly(model_spec_from_config(resolve_model().config), 2))
    flags = (*CPU, "--memory", budget)
    with LocalMesh(folder / "mesh") as mesh:
        founder = mesh.found("founder", "--model", str(folder / "model"), *flags)
        founder.terminate()
        founder.process.wait(30)
        move_root_away(founder)
        mesh.await_up(mesh.start("founder", "--model", str(folder / "model"), *flags))
        mesh.join("joiner", *flags)
        mesh.await_ready(plan_reaches=2)
        yield mesh


def move_root_away(founder: LocalDaemon) -> None:
    """As on another host: what joiners are told of the founder's folder is not there for them."""
    path = founder.state_dir / "membership.json"
    membership = json.loads(path.read_text())
    membership["model"]["root"] = "/nowhere/model"
    path.write_text(json.dumps(membership))


def find(mesh: LocalMesh, name: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.name == name)


def stage_of(mesh: LocalMesh, daemon: LocalDaemon) -> tuple[int, int]:
    (replica,) = daemon.get("/admin/topology")["replicas"]
    (stage,) = [stage for stage in replica["stages"] if stage["node"] == daemon.node_id]
    start, stop = stage["layers"]
    return start, stop


def model_verb(daemon: LocalDaemon, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon", "model", *args, "--state-dir", str(daemon.state_dir)],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


def listed(daemon: LocalDaemon) -> dict[str, Any]:
    done = model_verb(daemon, "ls", "-o", "json")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)
    assert isinstance(model, dict)
    return model


def bytes_of_stage(manifest: Manifest, start: int, stop: int) -> int:
    """Of the layers and, at the ends of the model, of what stands before and after them."""
    n_layers = 8
    in_layers = re.compile(r"layers\.(\d+)\.")
    n_bytes = 0
    for tensor in manifest.tensors:
        found = in_layers.search(tensor.name)
        if found is not None:
            is_wanted = start <= int(found.group(1)) < stop
        elif "embed_tokens" in tensor.name:
            is_wanted = start == 0 or stop == n_layers  # the head is tied to it
        else:
            is_wanted = True  # the final norm is on every stage
        n_bytes += tensor.n_bytes if is_wanted else 0
    return n_bytes


def test_a_node_with_nothing_but_the_token_serves_exact_tokens(mesh: LocalMesh) -> None:
    prompt = token_ids(QUESTION)
    for daemon in mesh.daemons:
        assert Stream(daemon.client, prompt, 40).run() == expected(prompt, 40)
    assert find(mesh, "joiner").get("/admin/status")["weights"] is None


def test_it_fetched_its_stage_alone_and_says_so(mesh: LocalMesh, manifest: Manifest) -> None:
    joiner = find(mesh, "joiner")
    start, stop = stage_of(mesh, joiner)
    wanted_bytes = bytes_of_stage(manifest, start, stop)
    model = listed(joiner)
    assert (model["layers"], model["cached_bytes"]) == ([[start, stop]], wanted_bytes)
    assert (model["complete"], model["in_use"], model["folder"]) == (False, True, None)
    assert 0 < wanted_bytes < manifest.weight_bytes
    log = joiner.log.read_text()
    assert re.search(r"fetching weights: .* from founder", log)
    assert re.search(r"fetched weights: (\S+ MiB) of \1, \S+ MiB/s", log)
    founders = listed(find(mesh, "founder"))
    assert (founders["complete"], founders["cached_bytes"]) == (True, 0)
    assert founders["folder"].endswith("/model")
    shown = model_verb(joiner, "ls").stdout
    assert f"{start}-{stop - 1}" in shown


def test_a_node_that_comes_back_fetches_nothing_again(mesh: LocalMesh) -> None:
    joiner = find(mesh, "joiner")
    joiner.kill_group()
    joiner.log.unlink()
    budget = str(memory_for_exactly(model_spec_from_config(resolve_model().config), 2))
    joiner = mesh.start("joiner", *CPU, "--memory", budget)
    mesh.await_up(joiner)
    mesh.await_ready(plan_reaches=2)
    prompt = token_ids(QUESTION)
    assert Stream(joiner.client, prompt, 20).run() == expected(prompt, 20)
    stage_bytes = listed(joiner)["cached_bytes"]
    fetched = re.findall(r"fetched weights: (\S+) (\S+) of", joiner.log.read_text())
    # the new plan may cut elsewhere: then the difference comes, never the whole stage
    assert all(
        float(size) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit] < stage_bytes / 2 for size, unit in fetched
    )


def test_verify_names_and_deletes_what_is_damaged(mesh: LocalMesh) -> None:
    joiner, founder = find(mesh, "joiner"), find(mesh, "founder")
    for daemon in (joiner, founder):
        done = model_verb(daemon, "verify")
        assert (done.returncode, "sound" in done.stdout) == (0, True), done.stdout + done.stderr
    folder = joiner.state_dir / "weights" / listed(joiner)["id"]
    victim = sorted(folder.glob("0*.safetensors"))[0]
    spoil(victim, victim.stat().st_size - 5)
    done = model_verb(joiner, "verify", "-o", "json")
    assert done.returncode == 1
    (view,) = json.loads(done.stdout)
    assert [damage["path"] for damage in view["damages"]] == [str(victim)]
    assert not victim.exists()
    assert model_verb(joiner, "verify").returncode == 0
    in_folder = Path(listed(founder)["folder"]) / "model.safetensors"
    spoil(in_folder, in_folder.stat().st_size - 5)
    done = model_verb(founder, "verify")
    spoil(in_folder, in_folder.stat().st_size - 5)
    assert done.returncode == 1
    assert "model.safetensors, tensor " in done.stdout
    assert "copy or download that file again" in done.stdout


def test_a_cache_that_is_too_small_keeps_its_node_out_of_the_plan(mesh: LocalMesh) -> None:
    """With its memory the newcomer would get the whole model; its cache holds a tenth of it."""
    small = mesh.join("small", *CPU, "--memory", "1GiB", "--weights-cache", "300KiB")
    founder = find(mesh, "founder")

    def is_bounded() -> bool | None:
        nodes = {node["name"]: node for node in founder.get("/admin/topology")["nodes"]}
        devices = nodes.get("small", {}).get("devices", [])
        return True if devices and devices[0]["budget_bytes"] <= 300 * 2**10 else None

    mesh.await_value(is_bounded, timeout_s=60, what="the newcomer to say how little it can hold")
    log = small.log.read_text()
    assert re.search(r"the stage's weights need 3\.\d MiB in the cache .* it has room for 300\.0 KiB", log)
    mesh.await_ready([founder], plan_reaches=2)
    assert small.node_id not in json.dumps(founder.get("/admin/topology")["replicas"])
    prompt = token_ids(QUESTION)
    assert Stream(founder.client, prompt, 20).run() == expected(prompt, 20)


def test_no_daemon_logged_an_unforeseen_error(mesh: LocalMesh) -> None:
    for daemon in mesh.daemons:
        log = daemon.log.read_text()
        assert "Traceback" not in log, log
        assert " ERROR " not in log, log
