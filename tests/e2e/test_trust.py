"""Trust in a mesh of real daemons: certificates renew, a node is removed, the founder is lost for good.

One mesh goes through it all, in the order of the tests. Its certificates live for seconds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from daemon.trust.state import StateFolder
from hexmesh.identity.certificates import MemberIdentity, read_member
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids

DAY_S, GRACE_S = "8", "90"
FLAGS = ("--device", "cpu", "--threads", "1", "--memory")
QUESTION = "What is a KV cache?"
N_TOKENS = 300
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def budget() -> str:
    return str(memory_for_exactly(model_spec_from_config(resolve_model().config), 2))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, budget: str) -> Iterator[LocalMesh]:
    """Four nodes, of which any two hold the model. The first three are issuers."""
    program = (sys.executable, "-m", "tests.e2e.short_lived_daemon", DAY_S, GRACE_S)
    with LocalMesh(tmp_path_factory.mktemp("mesh"), program=program) as mesh:
        mesh.found("one", *FLAGS, budget)
        for name in ("two", "three"):
            mesh.join(name, *FLAGS, budget)
        await_issuers(mesh, mesh.daemons[0], {"one", "two", "three"})
        mesh.join("four", *FLAGS, budget)
        mesh.await_ready()
        yield mesh


def by_name(mesh: LocalMesh, name: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.name == name)


def members(daemon: LocalDaemon) -> dict[str, Any]:
    return {member["name"]: member for member in daemon.get("/admin/members")}


def await_issuers(mesh: LocalMesh, seen_by: LocalDaemon, names: set[str]) -> None:
    def are_issuers() -> bool | None:
        found = {name for name, member in members(seen_by).items() if "issuer" in member["roles"]}
        return True if found == names else None

    mesh.await_value(are_issuers, timeout_s=PATIENCE_S, what=f"{names} to be issuers")


def certificate(daemon: LocalDaemon) -> MemberIdentity:
    """What the daemon shows of itself now."""
    membership = StateFolder(daemon.state_dir).membership()
    assert membership is not None
    return read_member(membership.certificates[0])


def await_renewals(mesh: LocalMesh, *daemons: LocalDaemon, times: int = 2) -> None:
    """Wait until each has shown so many new certificates."""
    seen = {daemon.name: {certificate(daemon).not_after} for daemon in daemons}

    def are_renewed() -> bool | None:
        for daemon in daemons:
            seen[daemon.name].add(certificate(daemon).not_after)
        return True if all(len(ends) > times for ends in seen.values()) else None

    mesh.await_value(are_renewed, timeout_s=PATIENCE_S, what="certificates to be renewed", living=daemons)


def hexmesh(daemon: LocalDaemon, *args: str) -> tuple[int, str]:
    """Exit code and stderr of a verb that is run beside a daemon."""
    run = subprocess.run(
        [sys.executable, "-m", "daemon", *args, "--state-dir", str(daemon.state_dir)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return run.returncode, run.stderr


def log_size(daemon: LocalDaemon) -> int:
    return len(daemon.log.read_bytes())


def log_since(daemon: LocalDaemon, size: int) -> str:
    return daemon.log.read_bytes()[size:].decode()


def ended(mesh: LocalMesh, daemon: LocalDaemon) -> tuple[int, str]:
    """Exit code and last line of a daemon that is to stop by itself."""
    code = mesh.await_value(daemon.process.poll, timeout_s=PATIENCE_S, what=f"{daemon.name} to stop")
    return code, daemon.last_log_lines(1)[0]


def test_certificates_renew_in_a_live_mesh_and_no_connection_is_dropped(mesh: LocalMesh) -> None:
    sizes = [log_size(daemon) for daemon in mesh.daemons]
    stream = Stream(mesh.daemons[3].client, token_ids(QUESTION), N_TOKENS)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream.run)
        await_renewals(mesh, *mesh.daemons)
        assert answer.result(timeout=PATIENCE_S) == expected(token_ids(QUESTION), N_TOKENS)

    issuers = {daemon.node_id for daemon in mesh.daemons[:3]}
    assert all(certificate(daemon).is_issuer for daemon in mesh.daemons[:3])
    assert certificate(mesh.daemons[3]).issuer_id in issuers
    for daemon, size in zip(mesh.daemons, sizes, strict=True):
        said = log_since(daemon, size)
        assert "certificate renewed" in said
        assert "peer down" not in said
        assert "no connection" not in said
    status = mesh.daemons[3].get("/admin/status")["certificate"]
    assert status["state"] == "valid"
    assert 0 < status["expires_s"] <= float(DAY_S)


def test_a_removed_node_is_cut_off_stays_out_and_streams_go_on(mesh: LocalMesh, budget: str) -> None:
    """It holds a stage. The third node is away meanwhile: it hears of the removal when it comes back."""
    one, two, three, four = mesh.daemons
    three.terminate()
    three.process.wait(timeout=PATIENCE_S)
    mesh.await_ready([one, two, four])
    code, said = hexmesh(one, "node", "remove", "one")
    assert (code, "a node does not remove itself" in said) == (2, True)
    code, said = hexmesh(four, "node", "remove", "one")
    assert (code, "it is no issuer" in said) == (3, True)

    (replica,) = one.get("/admin/topology")["replicas"]
    hosts = {stage["node"] for stage in replica["stages"]}
    victim = next(daemon for daemon in (four, two) if daemon.node_id in hosts)
    stream = Stream(one.client, token_ids(QUESTION), N_TOKENS)
    removals: list[tuple[int, str]] = []

    def on_token(n_tokens: int) -> None:
        if n_tokens == 40:
            removals.append(hexmesh(one, "node", "remove", victim.name))

    stream.run(on_token)
    assert removals == [(0, f"removed {victim.name} ({victim.node_id[:8]})\n")]
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    reason = (
        f"hexmesh: node {victim.node_id[:8]} was removed from the mesh; to bring the host back, start it with"
    )
    code, last = ended(mesh, victim)
    assert (code, last[: len(reason)]) == (4, reason)
    assert victim.name not in members(one)

    token = one.fresh_token()
    code, last = ended(mesh, mesh.start(victim.name, *FLAGS, budget))
    assert (code, last[: len(reason)]) == (4, reason)
    for file in ("membership.json", "revocations.json"):
        (victim.state_dir / file).unlink()
    code, last = ended(mesh, mesh.start(victim.name, *FLAGS, budget, token=token))
    assert (code, last[: len(reason)]) == (4, reason)

    three = mesh.start("three", *FLAGS, budget)
    mesh.await_up(three)
    mesh.await_value(
        lambda: True if StateFolder(three.state_dir).revocations() else None,
        timeout_s=PATIENCE_S,
        what="the third node to hear of it",
    )
    assert victim.name not in members(three)


def test_the_mesh_goes_on_when_its_founder_is_gone_for_good(mesh: LocalMesh, budget: str) -> None:
    one, *_ = mesh.daemons
    left = [daemon for daemon in mesh.daemons[1:] if daemon.is_running]
    assert len(left) == 2
    for daemon in left:
        await_issuers(mesh, daemon, {"one", *(other.name for other in left)})
    orphaned = one.fresh_token()
    one.kill_group()
    shutil.rmtree(one.state_dir)

    through = str(left[0].up["peer_addr"])
    code, last = ended(mesh, mesh.start("lost", *FLAGS, budget, token=orphaned, peer=through))
    assert code == 4
    assert f"the token was made by node one ({one.node_id[:8]})" in last
    assert "that node is not reached" in last
    for daemon in left:
        assert f"node {daemon.name} ({daemon.node_id[:8]})" in last

    five = mesh.start("five", *FLAGS, budget, token=left[1].fresh_token(), peer=through)
    mesh.await_up(five)
    mesh.await_ready([*left, five])
    await_renewals(mesh, five)
    assert certificate(five).issuer_id in {daemon.node_id for daemon in left}
    stream = Stream(five.client, token_ids(QUESTION), 60)
    assert stream.run() == expected(token_ids(QUESTION), 60)
    alive = [member for member in members(five).values() if member["state"] == "alive"]
    assert {member["certificate"] for member in alive} == {"valid"}
