"""`hexmesh join` as a person types it: what is refused says why and what next, with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.models.model_source import SHIPPED_MODEL, resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids

CPU = ("--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """One node with two CPU devices, neither of which holds the model alone."""
    spec = model_spec_from_config(resolve_model().config)
    budget = str(memory_for_exactly(spec, 2))
    with LocalMesh(tmp_path_factory.mktemp("mesh")) as mesh:
        mesh.found("founder", "--device", "cpu,cpu", "--threads", "1", "--memory", budget)
        yield mesh


@pytest.fixture(scope="module")
def other_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with LocalMesh(tmp_path_factory.mktemp("other")) as mesh:
        mesh.found("stranger", *CPU)
        yield mesh


def join(folder: Path, *flags: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """`hexmesh join` on free ports; it is expected to end by itself."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HEXMESH_")}
    if token is not None:
        environ["HEXMESH_TOKEN"] = token
    command = [
        sys.executable,
        "-m",
        "daemon",
        "join",
        "--state-dir",
        str(folder / "state"),
        "--listen",
        "127.0.0.1",
    ]
    ports = [] if "--peer-port" in flags else ["--peer-port", "0"]
    return subprocess.run(
        [*command, "--http-port", "0", "--dht-port", "0", *ports, *CPU, *flags],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_two_devices_of_one_host_make_a_pipeline(mesh: LocalMesh) -> None:
    founder = mesh.daemons[0]
    mesh.await_ready(plan_reaches=2)
    (replica,) = founder.get("/admin/topology")["replicas"]
    assert [stage["devices"] for stage in replica["stages"]] in ([[0], [1]], [[1], [0]])
    prompt = token_ids("What is a stage?")
    assert Stream(founder.client, prompt, 60).run() == expected(prompt, 60)


def test_a_wrong_token_is_refused(mesh: LocalMesh, tmp_path: Path) -> None:
    token = mesh.daemons[0].fresh_token()
    done = join(tmp_path, "--peer", mesh.daemons[0].up["peer_addr"], token=token[:-6] + "AAAAAA")
    assert done.returncode in (2, 4)
    assert "token" in last_line(done)


def test_a_spent_token_is_refused_and_says_how_to_get_another(mesh: LocalMesh, tmp_path: Path) -> None:
    token = mesh.daemons[0].fresh_token(uses=1)
    with LocalMesh(tmp_path / "first", daemons=[]) as first:
        joined = first.start("first", *CPU, token=token, peer=mesh.daemons[0].up["peer_addr"])
        first.await_up(joined)
        done = join(tmp_path, "--peer", mesh.daemons[0].up["peer_addr"], token=token)
    assert done.returncode == 4
    assert "used up" in last_line(done) or "spent" in last_line(done)
    assert "hexmesh token create" in last_line(done)


def test_a_token_of_another_mesh_is_refused(mesh: LocalMesh, other_mesh: LocalMesh, tmp_path: Path) -> None:
    token = other_mesh.daemons[0].fresh_token()
    done = join(tmp_path, "--peer", mesh.daemons[0].up["peer_addr"], token=token)
    assert done.returncode == 4
    assert "another mesh" in last_line(done)


def test_another_model_is_refused_by_name(mesh: LocalMesh, tmp_path: Path) -> None:
    changed = tmp_path / "other-model"
    shutil.copytree(SHIPPED_MODEL, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    token = mesh.daemons[0].fresh_token()
    done = join(tmp_path, "--peer", mesh.daemons[0].up["peer_addr"], "--model", str(changed), token=token)
    assert done.returncode == 4
    assert "hexmesh-glossary" in last_line(done)
    assert "--model" in last_line(done)


def test_an_architecture_without_tests_is_refused_by_name(tmp_path: Path) -> None:
    changed = tmp_path / "odd"
    shutil.copytree(SHIPPED_MODEL, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "mamba2"}))
    done = join(tmp_path, "--model", str(changed))
    assert done.returncode == 4
    assert "mamba2" in last_line(done)
    assert "llama" in last_line(done)


def test_an_unreachable_peer_is_named(mesh: LocalMesh, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = join(tmp_path, "--peer", address, token=mesh.daemons[0].fresh_token())
    assert done.returncode == 1
    assert address in last_line(done)


def test_a_port_in_use_is_named_with_its_flag(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = join(tmp_path, "--peer-port", port)
    assert done.returncode == 1
    assert port in last_line(done)
    assert "--peer-port" in last_line(done)


def test_http_for_everybody_needs_a_decision(tmp_path: Path) -> None:
    done = join(tmp_path, "--http-listen", "0.0.0.0")
    assert done.returncode == 2
    assert "--api-key-file" in last_line(done)


def test_a_second_daemon_on_one_state_folder_is_refused(mesh: LocalMesh) -> None:
    done = join(mesh.daemons[0].folder)
    assert done.returncode == 1
    assert "in use by another daemon" in last_line(done)


def test_leave_and_rejoin_keep_the_identity_and_forget_gives_it_up(mesh: LocalMesh) -> None:
    joined = mesh.join("guest", *CPU)
    node_id = joined.node_id
    mesh.await_ready([joined])

    def leave(*flags: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "daemon", "leave", "--state-dir", str(joined.state_dir), *flags],
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    leave()
    assert joined.process.wait(timeout=20) == 0
    joined = mesh.start("guest", *CPU)
    mesh.await_up(joined)
    assert joined.node_id == node_id
    names = [member["name"] for member in mesh.daemons[0].get("/admin/members")]
    assert names.count("guest") == 1
    leave("--forget")
    assert joined.process.wait(timeout=20) == 0
    assert not (joined.state_dir / "membership.json").exists()


def test_state_and_secrets_are_for_their_owner_alone(mesh: LocalMesh) -> None:
    state = mesh.daemons[0].state_dir
    assert state.stat().st_mode & 0o777 == 0o700
    secrets = ["node.key", "authority.key", "admin.key", "tokens.json", "dht.key"]
    assert {(state / name).stat().st_mode & 0o777 for name in secrets} == {0o600}
    log = mesh.daemons[0].log.read_text()
    assert (state / "admin.key").read_text().strip() not in log


def test_no_daemon_logged_an_unforeseen_error(mesh: LocalMesh, other_mesh: LocalMesh) -> None:
    for daemon in [*mesh.daemons, *other_mesh.daemons]:
        log = daemon.log.read_text()
        assert "Traceback" not in log, log
        assert " ERROR " not in log, log
