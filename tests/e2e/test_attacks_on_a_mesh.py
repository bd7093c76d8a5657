"""A mesh of real daemons with a liar among its members: requests come out right and every daemon lives."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.client import read_admin_key
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids
from tests.e2e.evil import Evil, Spied

FLAGS = ("--device", "cpu", "--threads", "1", "--min-nodes", "2", "--memory")
QUESTION = "What is a KV cache?"
N_TOKENS = 250


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    spec = model_spec_from_config(resolve_model().config)
    with LocalMesh(tmp_path_factory.mktemp("mesh")) as mesh:
        budget = str(memory_for_exactly(spec, 2))
        mesh.found("one", *FLAGS, budget)
        mesh.join("two", *FLAGS, budget)
        mesh.await_ready(plan_reaches=2)
        yield mesh


def resident_bytes(daemon: LocalDaemon) -> int:
    return int(psutil.Process(daemon.process.pid).memory_info().rss)


def test_no_secret_is_left_lying_about(mesh: LocalMesh, processes: list[psutil.Process]) -> None:
    """In command lines, logs, metrics, read routes, or files that other users of the host can read."""
    secrets = [read_admin_key(daemon.state_dir) for daemon in mesh.daemons]
    secrets += [mesh.daemons[0].fresh_token(), mesh.daemons[0].up["join_command"].split()[-1]]
    shown = [" ".join(process.cmdline()) for process in processes]
    for daemon in mesh.daemons:
        reads = ("status", "members", "links", "topology", "requests", "plan")
        paths = ["/metrics", "/version", *(f"/admin/{read}" for read in reads)]
        shown += [daemon.client.get(path).decode() for path in paths]
        shown += [line for line in daemon.log.read_text().splitlines() if not line.startswith('{"node_id"')]
        assert stat.S_IMODE(daemon.state_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((daemon.folder / "up.json").stat().st_mode) == 0o600

    assert len(processes) >= 6  # two daemons, each with p2pd and a worker or more
    assert all(len(secret) > 20 for secret in secrets)
    assert not [secret for secret in secrets for text in shown if secret in text]


@pytest.fixture
def processes(mesh: LocalMesh) -> list[psutil.Process]:
    parents = [psutil.Process(daemon.process.pid) for daemon in mesh.daemons]
    return [process for parent in parents for process in (parent, *parent.children(recursive=True))]


def test_a_lying_member_changes_no_answer_and_ends_no_daemon(mesh: LocalMesh, tmp_path: Path) -> None:
    before: Any = mesh.daemons[0].get("/admin/topology")
    (replica,) = before["replicas"]
    spied = Spied(
        nodes=[daemon.node_id for daemon in mesh.daemons],
        replica=replica["id"],
        stages=[stage["node"] for stage in replica["stages"]],
    )
    evil = Evil(tmp_path / "evil", mesh.daemons[0].fresh_token(), spied)
    is_over = threading.Event()
    prompt = token_ids(QUESTION)
    wanted = expected(prompt, N_TOKENS)
    rss_before = {daemon.name: resident_bytes(daemon) for daemon in mesh.daemons}

    def ask(daemon: LocalDaemon) -> list[list[int]]:
        return [Stream(daemon.client, prompt, N_TOKENS).run(spy) for _ in range(3)]

    def spy(n_tokens: int) -> None:
        """Tell the liar the names of the sequences under way, which are hard to guess."""
        if n_tokens % 50 == 1:
            for daemon in mesh.daemons:
                for request in daemon.get("/admin/requests"):
                    spied.sequences = [*spied.sequences[-3:], f"{daemon.node_id}/{request['id']}-0"]

    with ThreadPoolExecutor() as pool:
        attacking = pool.submit(asyncio.run, evil.attack(is_over.is_set))
        try:
            mesh.await_value(
                lambda: True if evil.n_rounds > 3 or attacking.done() else None,
                timeout_s=60,
                what="the attack to begin",
                living=mesh.daemons,
            )
            answers = list(pool.map(ask, mesh.daemons))
        finally:
            is_over.set()
        attacking.result(timeout=30)

    assert evil.n_sent > 1000
    assert spied.sequences
    assert answers == [[wanted] * 3] * 2
    assert all(daemon.is_running for daemon in mesh.daemons)
    after: Any = mesh.daemons[0].get("/admin/topology")
    assert (after["plan_id"], after["term"]) == (before["plan_id"], before["term"])
    grown = {daemon.name: resident_bytes(daemon) - rss_before[daemon.name] for daemon in mesh.daemons}
    assert max(grown.values()) < 150 * 2**20, grown
    for daemon in mesh.daemons:
        members = {member["name"]: member["address"] for member in daemon.get("/admin/members")}
        assert members.keys() == {"one", "two", "[/evil]"}
        assert [members[other.name] for other in mesh.daemons] == [
            other.up["peer_addr"] for other in mesh.daemons
        ]
        shown = subprocess.run(
            [sys.executable, "-m", "daemon", "members", "--url", daemon.url],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert shown.returncode == 0, shown.stderr
        assert "[/evil]" in shown.stdout
        log = daemon.log.read_text()
        assert "Traceback" not in log
        assert "message refused" in log
        assert log.count("\n") < 100, log[-5000:]
        assert "\x1b" not in log
