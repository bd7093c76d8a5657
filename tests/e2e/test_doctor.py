"""`hexmesh doctor` before broken set-ups: each time it names the one thing, and a healthy host passes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon.cli import main
from daemon.compute.inventory import Inventory
from daemon.config import JoinOptions, join_options_from_text
from daemon.discovery.libp2p import ensure_identity
from daemon.doctor import examination
from daemon.doctor.driver import Driver
from daemon.doctor.examination import World, examine
from daemon.doctor.finding import Finding, mend_first
from daemon.doctor.model_check import planners_costs
from daemon.doctor.packages import Wanted, is_within, read_wanted
from daemon.doctor.reverse import judge
from daemon.doctor.torch_probe import Torch, probe_torch
from daemon.models.manifests import local_manifest
from daemon.models.model_source import SHIPPED_MODEL, SHIPPED_NAME, resolve_model
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.runfile import Run, write_run
from daemon.trust.admission import found_mesh
from daemon.trust.state import Membership, StateFolder
from hexmesh import native
from hexmesh.cluster import Cluster, Device, Node
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import sign_revocation
from hexmesh.model_spec import model_spec_from_config
from hexmesh.schedule.layout import lay_out
from hexmesh.schedule.misfit import NoFit, least_layer_bytes
from hexmesh.units import show_bytes
from hexmesh.wire.peering import MemberAddress, ModelReference
from hexmesh.workload import Workload
from tests.e2e import recorded_daemon as recorded
from tests.e2e.test_admission import Clock, founder

GIB = 2**30


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HEXMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HEXMESH_CONFIG", os.devnull)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> ModelReference:
    """The shipped model as a mesh names it."""
    digest = local_manifest(resolve_model(), tmp_path_factory.mktemp("hashes")).id
    return ModelReference(name=SHIPPED_NAME, model_id=digest, root=SHIPPED_NAME)


def world(**fields: Any) -> World:
    """A host of one CPU device on which everything outside the files is in order."""
    sound: dict[str, Any] = {
        "torch": lambda: Torch(version="2.13.0"),
        "driver": Driver,
        "kernels": lambda: dict.fromkeys((*native.MODULES, native.PLANNING), "avx2"),
        "inventory": lambda: Inventory(cpu_name="c", n_cpus=2, available_bytes=8 * GIB),
        "free_bytes": lambda path: 100 * GIB,
        "api_key": None,
    }
    return World(**(sound | fields))


def options(folder: Path, **texts: str) -> JoinOptions:
    free = {name: "0" for name in ("http_port", "peer_port", "dht_port")}
    return join_options_from_text({"state_dir": str(folder), "listen": LOOPBACK, **free, **texts})


def member(
    folder: Path, model: ModelReference, now: datetime | None = None, peers: list[MemberAddress] | None = None
) -> Membership:
    """A founder's state folder that a daemon has left cleanly."""
    with StateFolder(folder) as state:
        key, dht_peer_id = state.node_key(), ensure_identity(state.dht_identity_file)
        state.admin_key()
        membership = found_mesh(state, key, dht_peer_id, model, "float32", now or datetime.now(UTC))
        membership = msgspec.structs.replace(membership, members=peers or [])
        state.save_membership(membership)
    return membership


def the_one_thing(findings: list[Finding]) -> Finding:
    """The finding to mend first; the others must be in order."""
    first = mend_first(findings)
    assert first is not None
    assert [finding.check for finding in findings if finding.outcome == "fail"] == [first.check]
    assert first.next_step
    return first


def outcomes(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.outcome for finding in findings}


# ---------------------------------------------------------------- healthy


def test_a_sound_member_passes(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    findings = examine(options(tmp_path / "s"), world())

    assert mend_first(findings) is None
    assert outcomes(findings) == {
        **dict.fromkeys(("python", "packages", "driver", "torch", "state folder", "state files"), "pass"),
        **dict.fromkeys(("kernels", "disk", "certificate", "http port", "peer port", "dht port"), "pass"),
        **dict.fromkeys(("model", "memory"), "pass"),
        "listen address": "warn",
        **dict.fromkeys(("clock", "peer", "reverse reach", "model cache"), "not-run"),
    }


def test_a_model_that_is_not_on_this_host_is_to_be_fetched(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", msgspec.structs.replace(shipped, root="/nowhere/model"))
    findings = examine(options(tmp_path / "s"), world())

    assert mend_first(findings) is None
    (model,) = [finding for finding in findings if finding.check == "model"]
    assert model.outcome == "pass"
    assert "fetches what it needs from other nodes" in model.finding


def test_nothing_in_the_state_folder_changes(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    examine(options(tmp_path / "s"), world())
    examine(options(tmp_path / "fresh"), world())

    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    assert not (tmp_path / "fresh").exists()


async def test_the_command_itself_on_a_sound_host(tmp_path: Path) -> None:
    """The real torch, packages and driver of this machine, and a peer that answers."""
    async with founder(tmp_path / "a") as a:
        command = (
            *("doctor", "--state-dir", str(tmp_path / "s"), "--peer", str(a.address), "-o", "json"),
            *("--http-port", "0", "--peer-port", "0", "--device", "cpu"),
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *command), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    report = json.loads(out)

    assert (process.returncode, report["mend_first"]) == (0, None), report
    seen = {check["check"]: check["outcome"] for check in report["checks"]}
    assert (seen["packages"], seen["torch"], seen["clock"], seen["peer"]) == ("pass",) * 4
    assert list(report["checks"][0]) == ["check", "outcome", "finding", "next_step"]


def test_the_ports_of_the_own_daemon_are_in_order(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    with listen_tcp(LOOPBACK, 0, flag="") as listener, recorded.recorded_daemon() as daemon:
        write_run(tmp_path / "s", Run(os.getpid(), daemon.url))
        port = bound_address(listener).port
        findings = examine(options(tmp_path / "s", peer_port=str(port), dht_port="0"), world())

    assert outcomes(findings)["peer port"] == "pass"
    assert f"process {os.getpid()}" in next(f.finding for f in findings if f.check == "peer port")


# ---------------------------------------------------------------- broken set-ups


def test_an_old_package(tmp_path: Path) -> None:
    wanted = read_wanted()
    assert wanted is not None
    found = {name: "999.0" for name in wanted.packages}
    sound = {name: "5.18.1" if name == "transformers" else "1.1.12" for name in ("transformers", "hivemind")}
    findings = examine(
        options(tmp_path / "s"),
        world(installed=lambda name: {**found, **sound, "torch": "2.4.1+cu121"}[name]),
    )
    first = the_one_thing(findings)

    assert (first.check, first.finding) == ("packages", "torch 2.4.1+cu121 is installed and >=2.11 is needed")
    assert "torch>=2.11" in first.next_step


def test_a_package_that_is_missing_and_an_old_python(tmp_path: Path) -> None:
    some = Wanted(python=">=3.11,<3.13", packages={"torch": ">=2.11", "nothere": ">=1"})
    findings = examine(options(tmp_path / "s"), world(wanted=some, installed={"torch": "2.13.0"}.get))
    assert the_one_thing(findings).finding == "nothere is not installed"

    first = mend_first(examine(options(tmp_path / "s"), world(wanted=some, python="3.10.4")))
    assert first is not None
    assert (first.check, "3.10.4" in first.finding) == ("python", True)


def test_a_package_without_which_most_checks_cannot_run() -> None:
    code = """
import sys
sys.modules["cryptography"] = None
from pathlib import Path
from daemon.config import JoinOptions
from daemon.doctor.driver import Driver
from daemon.doctor.examination import World, examine
from daemon.doctor.packages import Wanted
from daemon.doctor.torch_probe import Torch
wanted = Wanted(python="", packages={"cryptography": ">=44"})
world = World(wanted=wanted, installed=lambda name: None, driver=Driver, torch=Torch)
for one in examine(JoinOptions(state_dir=Path("/nowhere")), world):
    print(one.check, one.outcome, one.finding, sep="|")
"""
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=root)
    assert "packages|fail|cryptography is not installed" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].startswith("all else|not-run|the other checks need the package cryp")


def test_torch_that_does_not_load(tmp_path: Path) -> None:
    broken = Torch(failure="ImportError: libcudart.so.12: cannot open shared object file")
    first = the_one_thing(examine(options(tmp_path / "s"), world(torch=lambda: broken)))
    assert first.check == "torch"
    assert "libcudart.so.12" in first.finding


def test_kernels_that_were_not_built(tmp_path: Path) -> None:
    findings = examine(options(tmp_path / "s"), world(kernels=dict))

    assert mend_first(findings) is None
    (kernels,) = [finding for finding in findings if finding.check == "kernels"]
    assert kernels.outcome == "warn"
    assert kernels.finding.startswith("no C kernels for attention")
    assert "pip install" in kernels.next_step


def test_the_planners_kernel_that_was_not_built(tmp_path: Path) -> None:
    built = {"attention": "avx2", "gemm": "avx2"}
    findings = examine(options(tmp_path / "s"), world(kernels=lambda: built))
    (kernels,) = [finding for finding in findings if finding.check == "kernels"]
    assert (kernels.outcome, kernels.finding) == (
        "warn",
        "no C kernels for layout: planning is far slower (built: attention avx2, gemm avx2)",
    )


def test_a_torch_without_cuda_beside_a_gpu(tmp_path: Path) -> None:
    gpu = world(driver=lambda: Driver(version="570.1", n_gpus=2, has_library=True, has_hardware=True))
    first = the_one_thing(examine(options(tmp_path / "s"), gpu))
    assert (first.check, first.finding) == (
        "torch",
        "torch 2.13.0 cannot use the GPUs: it is built for CPUs",
    )
    assert mend_first(examine(options(tmp_path / "s", device="cpu"), gpu)) is None


def test_a_broken_driver(tmp_path: Path) -> None:
    broken = Driver(has_library=True, has_hardware=True, trouble="Driver/library version mismatch")
    first = the_one_thing(examine(options(tmp_path / "s"), world(driver=lambda: broken)))
    assert (first.check, first.finding) == (
        "driver",
        "the NVIDIA driver does not answer: Driver/library version mismatch",
    )


def test_a_port_in_use(tmp_path: Path) -> None:
    with listen_tcp(LOOPBACK, 0, flag="") as listener:
        port = bound_address(listener).port
        first = the_one_thing(examine(options(tmp_path / "s", http_port=str(port)), world()))

    assert (first.check, "--http-port" in first.next_step) == ("http port", True)
    assert first.finding.startswith(f"port {port} on 127.0.0.1 is in use by ")
    assert f"(process {os.getpid()})" in first.finding


def test_a_port_that_another_holds_while_the_own_daemon_runs(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "s").mkdir(mode=0o700)
        write_run(tmp_path / "s", Run(sleeper.pid, "http://127.0.0.1:1"))
        with listen_tcp(LOOPBACK, 0, flag="") as listener:
            port = bound_address(listener).port
            findings = examine(options(tmp_path / "s", dht_port=str(port)), world())
    finally:
        sleeper.communicate(timeout=10)
    first = mend_first(findings)

    assert first is not None
    assert (first.check, f"(process {os.getpid()})" in first.finding) == ("dht port", True)


def test_a_listen_address_that_is_not_ours(tmp_path: Path) -> None:
    first = the_one_thing(
        examine(options(tmp_path / "s", listen="203.0.113.77", peer_port="7701", dht_port="7702"), world())
    )
    assert (first.check, "--listen" in first.next_step) == ("listen address", True)
    assert "203.0.113.77" in first.finding


def test_a_state_folder_of_another_user(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    first = the_one_thing(examine(options(tmp_path / "s"), world(user_id=os.getuid() + 1)))
    assert first.check == "state folder"
    assert f"belongs to user {os.getuid()}" in first.finding


def test_a_state_folder_whose_key_others_may_read(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    (tmp_path / "s").chmod(0o755)
    assert outcomes(examine(options(tmp_path / "s"), world()))["state folder"] == "warn"

    (tmp_path / "s" / "node.key").chmod(0o644)
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, "node.key (mode 644" in first.finding) == ("state folder", True)


def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    findings = examine(options(tmp_path / "file" / "s"), world())
    first = mend_first(findings)
    assert first is not None
    assert (first.check, "cannot be made" in first.finding) == ("state folder", True)


def test_a_damaged_membership(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    path = tmp_path / "s" / "membership.json"
    path.write_bytes(path.read_bytes()[:100])
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert first.check == "state files"
    assert f"{path} is damaged" in first.finding


@pytest.mark.parametrize("name", ["tokens.json", "node.key", "authority.key", "dht.key", "term.json"])
def test_any_other_damaged_file(name: str, tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    (tmp_path / "s" / name).write_text("{nonsense")
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, name in first.finding) == ("state files", True)


def test_a_full_disk(tmp_path: Path) -> None:
    first = the_one_thing(examine(options(tmp_path / "s"), world(free_bytes=lambda path: 2**20)))
    assert (first.check, first.finding.startswith("1.0 MiB are free")) == ("disk", True)


def ordinary_member(folder: Path, model: ModelReference, age: timedelta) -> None:
    """A node that is no issuer, with a certificate so old."""
    membership = member(folder, model, now=datetime.now(UTC) - age)
    with StateFolder(folder) as state:
        state.save_membership(msgspec.structs.replace(membership, issuer_der=b""))


def test_an_expired_certificate(tmp_path: Path, shipped: ModelReference) -> None:
    ordinary_member(tmp_path / "s", shipped, timedelta(days=9))
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, "the certificate expired at" in first.finding) == ("certificate", True)


@pytest.mark.parametrize(
    ("age", "outcome", "said"),
    [
        (timedelta(hours=1), "pass", "renewed while the daemon runs"),
        (timedelta(days=2), "warn", "others accept it"),
    ],
)
def test_a_certificate_s_age(
    tmp_path: Path, shipped: ModelReference, age: timedelta, outcome: str, said: str
) -> None:
    ordinary_member(tmp_path / "s", shipped, age)
    (finding,) = [one for one in examine(options(tmp_path / "s"), world()) if one.check == "certificate"]
    assert (finding.outcome, said in finding.finding) == (outcome, True)


def test_an_issuer_renews_its_own_certificate_however_old(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped, now=datetime.now(UTC) - timedelta(days=400))
    (finding,) = [one for one in examine(options(tmp_path / "s"), world()) if one.check == "certificate"]
    assert (finding.outcome, "renews it when it starts" in finding.finding) == ("pass", True)


def test_a_removed_node(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    with StateFolder(tmp_path / "s") as state:
        root = state.authority()
        assert root is not None
        state.save_revocations([sign_revocation(root, state.node_key().node_id, now_unix_s=1.0, sequence=1)])
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, "was removed from the mesh" in first.finding) == ("certificate", True)


def test_a_certificate_that_is_not_valid_yet(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped, now=datetime.now(UTC) + timedelta(days=2))
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, "valid from" in first.finding) == ("certificate", True)


def test_a_key_of_another_node(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    (tmp_path / "s" / "node.key").write_bytes(NodeKey.generate().to_pem())
    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, "belongs to another key" in first.finding) == ("certificate", True)


@pytest.mark.parametrize("ahead_s", [-60.0, 4.0])
async def test_a_clock_that_is_off(ahead_s: float, tmp_path: Path) -> None:
    async with founder(tmp_path / "a", Clock(ahead_s)) as a:
        findings = await asyncio.to_thread(
            examine, options(tmp_path / "s", peer=str(a.address), token=_token(a)), world()
        )
    first = the_one_thing(findings)

    assert (first.check, "NTP" in first.next_step) == ("clock", True)
    assert first.finding.startswith(f"the clocks differ by {abs(ahead_s):.1f} s: this host has")
    assert outcomes(findings)["peer"] == "pass"


async def test_a_clock_so_far_off_that_no_certificate_holds(tmp_path: Path, shipped: ModelReference) -> None:
    """The cause comes before what follows from it."""
    async with founder(tmp_path / "a") as a:
        with StateFolder(tmp_path / "s") as state:
            state.node_key()
            state.save_membership(msgspec.structs.replace(a.membership, model=shipped, issuer_der=b""))
        late = world(clock=lambda: time.time() + 400 * 86400)
        findings = await asyncio.to_thread(examine, options(tmp_path / "s", peer=str(a.address)), late)

    first = mend_first(findings)
    assert first is not None
    assert first.check == "clock"
    assert outcomes(findings)["certificate"] == "fail"


def test_a_peer_that_nobody_reaches(tmp_path: Path) -> None:
    with listen_tcp(LOOPBACK, 0, flag="") as listener:
        address = bound_address(listener)
    first = the_one_thing(examine(options(tmp_path / "s", peer=str(address)), world()))
    assert (first.check, first.finding) == ("peer", f"{address} is not reached: Connection refused")
    assert "firewall" in first.next_step


def test_a_peer_that_is_silent_costs_a_deadline(tmp_path: Path) -> None:
    with listen_tcp(LOOPBACK, 0, flag="") as listener:
        started_s = time.monotonic()
        address = bound_address(listener)
        soon = world(peer_deadline_s=0.2)
        first = the_one_thing(examine(options(tmp_path / "s", peer=str(address)), soon))
    assert (first.check, "no answer within 0.2 s" in first.finding) == ("peer", True)
    assert time.monotonic() - started_s < 2.5


def test_a_name_service_that_hangs_costs_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s: list[float] = []
    is_over = threading.Event()

    def hang(address: tuple[str, int], timeout_s: float) -> None:
        waits_s.append(timeout_s)
        is_over.wait(10)
        raise OSError("the name service gave up")

    monkeypatch.setattr("daemon.doctor.peer_probe.socket.create_connection", hang)
    asked, started_s = options(tmp_path / "s", peer="slow.example:7701"), time.monotonic()
    first = the_one_thing(examine(asked, world(peer_deadline_s=0.2)))
    took_s = time.monotonic() - started_s
    is_over.set()

    assert took_s < 5
    assert first.finding == "slow.example:7701 is not reached: no answer within 0.2 s"
    assert waits_s == [pytest.approx(0.2, abs=0.1)]


def test_another_service_at_the_peers_port(tmp_path: Path) -> None:
    with recorded.recorded_daemon() as daemon:
        peer = daemon.url.removeprefix("http://")
        first = the_one_thing(examine(options(tmp_path / "s", peer=peer), world()))
    assert (first.check, "not a hexmesh peer port" in first.finding) == ("peer", True)
    assert "7701" in first.next_step


async def test_a_peer_of_another_mesh(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    async with founder(tmp_path / "other") as other:
        asked = options(tmp_path / "s", peer=str(other.address))
        findings = await asyncio.to_thread(examine, asked, world())
        first = the_one_thing(findings)
        by_token = await asyncio.to_thread(
            examine, options(tmp_path / "t", peer=str(other.address), token=_token(other)), world()
        )

    assert first.check == "peer"
    assert f"{other.address} is a node of another mesh: its root certificate is" in first.finding
    assert mend_first(by_token) is None


async def test_a_peer_that_shows_our_root_and_cannot_prove_it(
    tmp_path: Path, shipped: ModelReference
) -> None:
    ours = member(tmp_path / "s", shipped)
    with StateFolder(tmp_path / "false") as state:
        false = found_mesh(state, state.node_key(), "12D3KooWFalse", shipped, "float32", datetime.now(UTC))
        tls = replace(state.tls_files(false), root_der=ours.root_der)
        listener = listen_tcp(LOOPBACK, 0, flag="")
        address = str(bound_address(listener))
        local = LocalPeer(node_id=state.node_key().node_id, boot=1, name="f", address=address, tls=tls)
        async with PeerNetwork(local, listener, PeerEvents(on_message=lambda *_: None)):
            findings = await asyncio.to_thread(examine, options(tmp_path / "s", peer=address), world())
    first = the_one_thing(findings)

    assert (first.check, "its certificate does not hold" in first.finding) == ("peer", True)


async def test_a_remembered_peer_may_be_off_while_another_answers(
    tmp_path: Path, shipped: ModelReference
) -> None:
    with listen_tcp(LOOPBACK, 0, flag="") as listener:
        gone = MemberAddress(node_id="c" * 40, name="gone", address=str(bound_address(listener)))
    async with founder(tmp_path / "a") as a:
        there = MemberAddress(node_id=a.node_id, name="there", address=str(a.address))
        shutil.copytree(tmp_path / "a", tmp_path / "s", ignore=shutil.ignore_patterns("lock", "node.key"))
        with StateFolder(tmp_path / "s") as state:
            state.node_key()
            for peers, expected in (([gone, there], ["warn", "pass"]), ([gone], ["fail"])):
                state.save_membership(msgspec.structs.replace(a.membership, members=peers, model=shipped))
                findings = await asyncio.to_thread(examine, options(tmp_path / "s"), world())
                assert [one.outcome for one in findings if one.check == "peer"] == expected
            state.save_membership(msgspec.structs.replace(a.membership, members=[there], model=shipped))
            asked = options(tmp_path / "s", peer=gone.address)
            findings = await asyncio.to_thread(examine, asked, world())
    assert [one.outcome for one in findings if one.check == "peer"] == ["fail", "pass"]


def _token(node: Any) -> str:
    return str(node.admission.create_token(ttl_s=600, uses=1).token)


# ---------------------------------------------------------------- model and memory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model that a test may spoil."""
    return shutil.copytree(SHIPPED_MODEL, tmp_path / "model")


def test_a_model_without_a_tokenizer(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    first = the_one_thing(examine(options(tmp_path / "s", model=str(model)), world()))
    assert (first.check, "has no tokenizer.json" in first.finding) == ("model", True)


def test_a_model_of_an_unsupported_type(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    first = the_one_thing(examine(options(tmp_path / "s", model=str(model)), world()))
    assert (first.check, first.finding) == ("model", "model type 'mamba' is not supported")


def test_a_model_whose_copy_broke_off(tmp_path: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    first = the_one_thing(examine(options(tmp_path / "s", model=str(model)), world()))
    assert (first.check, f"{weights} is incomplete" in first.finding) == ("model", True)


def test_a_model_that_is_not_the_meshs(tmp_path: Path, model: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    assert mend_first(examine(options(tmp_path / "s", model=str(model)), world())) is None

    (model / "generation_config.json").write_text("{}")
    first = the_one_thing(examine(options(tmp_path / "s", model=str(model)), world()))
    assert (first.check, "is not the mesh's hexmesh-glossary" in first.finding) == ("model", True)


def test_a_hub_model_that_is_not_here_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.models.model_source.download", _never)
    findings = examine(options(tmp_path / "s", model="no-such-org/no-such-model"), world())
    assert {name: outcomes(findings)[name] for name in ("model", "memory", "model cache")} == {
        "model": "warn",
        "memory": "not-run",
        "model cache": "pass",
    }


def _never(*_: object) -> None:
    raise AssertionError("the doctor downloaded something")


def test_too_little_memory(tmp_path: Path) -> None:
    first = the_one_thing(examine(options(tmp_path / "s", memory="2MiB", device="cpu"), world()))
    assert (first.check, "--memory" in first.next_step) == ("memory", True)
    assert "cpu gives 2.0 MiB and a layer of hexmesh-glossary needs" in first.finding


def test_the_memory_that_a_layer_needs_is_the_planners() -> None:
    files = resolve_model()
    spec = model_spec_from_config(files.config, generation_config=files.generation_config)
    costs = planners_costs(spec, "float32")
    device = Device(index=0, kind="cpu", name="c", budget_bytes=2**20, flops_per_s=1e9, bytes_per_s=1e9)
    answer = lay_out(
        Cluster(nodes=(Node(id="a", name="a", site="s", devices=(device,)),), links=()),
        spec,
        "float32",
        Workload(),
        model_id="m",
        model_name="m",
        hosts={"a": 1},
        max_model_tokens=spec.max_position_tokens,
        reason="",
        current=None,
    )
    assert isinstance(answer, NoFit)
    needed = show_bytes(least_layer_bytes(costs, costs.limits.context_tokens, "cpu"))
    assert f"needs {needed}" in answer.unused[0].reason


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    first = the_one_thing(examine(options(tmp_path / "s", device="cuda:3"), world()))
    assert (first.check, "there is no cuda:3 here" in first.finding) == ("memory", True)


# ---------------------------------------------------------------- the way back


OWN = {"id": "me", "name": "me", "address": "10.0.0.1:7701", "state": "alive"}
LINKS = [{"from": "b", "to": "me"}]


@pytest.mark.parametrize(
    ("state", "links", "reached", "expected"),
    [
        ("alive", LINKS, {"b"}, ("pass", "1 of 1 other nodes are alive, heard and hearing")),
        ("alive", [], {"b"}, ("warn", "alive, and no link from there to here is measured: osaka")),
        ("suspect", LINKS, {"b"}, ("fail", "reached from here, and not both ways: osaka")),
        ("failed", [], {"b"}, ("fail", "reached from here, and not both ways: osaka")),
        ("failed", [], set(), ("not-run", "no other node is alive: nobody can tell")),
        ("left", [], set(), ("not-run", "this node is alone in its mesh: nobody can tell")),
    ],
)
def test_the_way_back(
    state: str, links: list[dict[str, Any]], reached: set[str], expected: tuple[str, str]
) -> None:
    other = {"id": "b", "name": "osaka", "address": "10.0.0.2:7701", "state": state}
    found = judge("me", [OWN, other], links, reached)
    assert (found.outcome, found.finding) == expected
    if found.outcome == "fail":
        assert "TCP port 7701" in found.next_step


def test_a_host_that_others_cannot_dial_is_told_so() -> None:
    other = {"id": "b", "name": "osaka", "address": "10.0.0.2:7701", "state": "alive"}
    found = judge("me", [OWN, other], LINKS, {"b"}, ["osaka (10.0.0.1:7701: timed out)"])
    assert (found.outcome, found.finding.partition(":")[0]) == (
        "warn",
        "cannot be dialled by osaka (10.0.0.1",
    )
    assert "TCP port 7701" in found.next_step


def test_the_way_back_is_asked_of_the_own_daemon(tmp_path: Path, shipped: ModelReference) -> None:
    member(tmp_path / "s", shipped)
    key = (tmp_path / "s" / "admin.key").read_text().strip()
    with recorded.recorded_daemon() as daemon:
        write_run(tmp_path / "s", Run(os.getpid(), daemon.url))
        found = next(f for f in examine(options(tmp_path / "s"), world()) if f.check == "reverse reach")
    assert found.outcome != "not-run"
    assert [path for _, path, _, _ in daemon.asked] == ["/admin/status", "/admin/members", "/admin/links"]
    assert {key for _, _, _, key in daemon.asked} == {f"Bearer {key}"}

    first = the_one_thing(examine(options(tmp_path / "s"), world()))
    assert (first.check, "its HTTP fails" in first.finding) == ("reverse reach", True)


# ---------------------------------------------------------------- the command


@pytest.fixture
def sound_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "World", world)


@pytest.mark.usefixtures("sound_world")
def test_the_one_thing_is_said_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "--state-dir", str(tmp_path / "s"), "--memory", "1MiB", "--device", "cpu")
    assert code == 3
    *_, last = out.splitlines()
    assert last.startswith("the one thing to mend first: memory: too little memory for even one layer")
    assert sum(line.startswith("FAIL") for line in out.splitlines()) == 1

    code, out = run(capsys, "--state-dir", str(tmp_path / "s"))
    assert (code, "mend first" in out) == (0, False)


@pytest.mark.usefixtures("sound_world")
def test_joins_table_of_the_file_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "hexmesh.toml"
    config.write_text('device = "cpu"\n[join]\nmemory = "1MiB"\n')
    monkeypatch.setenv("HEXMESH_CONFIG", str(config))
    assert run(capsys, "--state-dir", str(tmp_path / "s"))[0] == 3
    assert run(capsys, "--state-dir", str(tmp_path / "s"), "--memory", "1GiB")[0] == 0


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--http-port", "0", "--peer-port", "0", "--listen", LOOPBACK, *args])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


# ---------------------------------------------------------------- parts


def test_a_torch_that_hangs_is_given_up() -> None:
    assert "did not load within" in probe_torch(limit_s=0.01).failure


@pytest.mark.parametrize(
    ("version", "clauses", "expected"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.4", ">=2.11", False),
        ("1.2", ">=1.1.11,<1.2", False),
        ("1.2.0", "<1.2", False),
        ("1.1.11", ">=1.1.11,<1.2", True),
        ("5.24.0rc1", ">=5.17,<5.24", False),
        ("2", ">=2.0", True),
        ("77", "", True),
    ],
)
def test_version_ranges(version: str, clauses: str, expected: bool) -> None:
    assert is_within(version, clauses) is expected
