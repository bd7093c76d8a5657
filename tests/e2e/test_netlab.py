"""The lab: that links behave as set, cuts cut, and nothing stays behind; and a mesh of real daemons in it.

Where no lab can be made this fails, unless HEXMESH_ALLOW_SKIP names `lab`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from hexmesh.errors import InvalidInput, Lost
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids
from tools.netlab.host import Host
from tools.netlab.lab import Backend, Lab
from tools.netlab.lateness import Lateness
from tools.netlab.line import Line
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabDaemon, LabMesh
from tools.netlab.namespaces import namespaces, new_prefix, pids_in, remove_orphans, why_unavailable
from tools.netlab.packets import wire_bytes
from tools.netlab.user_namespace import can_unshare, unshared

SITES = {"tokyo": ("t1", "t2"), "osaka": ("o1",)}
SILENCE_S = 0.3
SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _lab_is_possible() -> None:
    if (blocker := why_unavailable()) is not None:
        skip_if_allowed(blocker.one_line())


def skip_if_allowed(reason: str) -> None:
    """A test that silently does not run is worth nothing, so skipping has to be asked for."""
    if "lab" in os.environ.get("HEXMESH_ALLOW_SKIP", "").split(","):
        pytest.skip(reason)
    pytest.fail(f"{reason}; or allow the skip by name: HEXMESH_ALLOW_SKIP=lab")


def lab_of(link: Link, backend: Backend = "tun") -> Lab:
    return Lab(Topology(sites=SITES, links=both_ways({("tokyo", "osaka"): link})), backend=backend)


@contextmanager
def connected(src: Host, dst: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection that `src` opened."""
    with dst.listen() as listener:
        listener.settimeout(5)
        with src.connect(dst.address, listener.getsockname()[1], timeout_s=5) as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far, _ = listener.accept()
            with far:
                far.settimeout(5)
                far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield near, far


def echo_s(near: socket.socket, far: socket.socket) -> float:
    """How long a byte takes there and back."""
    start_s = time.monotonic()
    near.sendall(b"?")
    assert far.recv(1) == b"?"
    far.sendall(b"!")
    assert near.recv(1) == b"!"
    return time.monotonic() - start_s


def median_echo_s(near: socket.socket, far: socket.socket) -> float:
    """Of several; ahead of other programs where allowed, because this measures the lab and not the machine's load."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(5))
    try:
        return statistics.median(echo_s(near, far) for _ in range(11))
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def rtt_s(lab: Lab, src: str, dst: str) -> float:
    with connected(lab.hosts[src], lab.hosts[dst]) as (near, far):
        return median_echo_s(near, far)


def reaches(src: Host, dst: Host, n_packets: int = 1, silence_s: float = SILENCE_S) -> int:
    """How many of the UDP packets from `src` to `dst` come in."""
    receiver = dst.run(lambda: socket.socket(type=socket.SOCK_DGRAM))
    sender = src.run(lambda: socket.socket(type=socket.SOCK_DGRAM))
    with receiver, sender:
        receiver.bind((dst.address, 0))
        receiver.settimeout(silence_s)
        for _ in range(n_packets):
            sender.sendto(b"probe", receiver.getsockname())
        n_received = 0
        try:
            while n_received < n_packets:
                receiver.recv(100)
                n_received += 1
        except TimeoutError:
            pass
        return n_received


def reached(lab: Lab) -> set[tuple[str, str]]:
    """The ordered pairs of hosts between which a packet comes through."""
    pairs = list(lab.topology.pairs())
    with ThreadPoolExecutor(len(pairs)) as pool:
        counts = pool.map(lambda pair: reaches(lab.hosts[pair[0]], lab.hosts[pair[1]]), pairs)
        return {pair for pair, count in zip(pairs, counts, strict=True) if count}


# What needs no network.


def test_a_line_spaces_packets_by_its_rate_and_drops_what_finds_a_long_queue() -> None:
    line = Line(Link(latency_s=0.5, rate_bytes_per_s=1000, queue_s=0.25))
    rng = random.Random(0)
    released = [line.admit(10.0, 100, rng) for _ in range(5)]
    assert released[:3] == pytest.approx([10.6, 10.7, 10.8])
    assert released[3:] == [None, None]
    assert line.dropped == {"queue": 2}
    assert line.admit(20.0, 100, rng) == pytest.approx(20.6)


def test_jitter_and_a_latency_that_falls_keep_packets_in_order() -> None:
    line = Line(Link(latency_s=0.1, jitter_s=0.1))
    rng = random.Random(1)
    released = [line.admit(index / 1000, 100, rng) for index in range(200)]
    line.change(Link(latency_s=0.0))
    released.append(line.admit(0.2, 100, rng))
    assert released == sorted(released, key=lambda time_s: time_s or 0.0)
    assert all(0.1 <= (time_s or 0) - index / 1000 <= 0.2 for index, time_s in enumerate(released[:-1]))


def test_a_large_packet_counts_as_the_segments_it_stands_for() -> None:
    headers = bytes([0x45]) + bytes(8) + bytes([6]) + bytes(10) + bytes(12) + bytes([0x50]) + bytes(7)
    large = bytes([0, 1, 0, 0]) + (1000).to_bytes(2, "little") + bytes(4) + headers + bytes(2500)
    assert wire_bytes(large) == 2500 + 3 * (40 + 38)
    plain = bytes(10) + headers + bytes(500)
    assert wire_bytes(plain) == 500 + 40 + 38


def test_lateness_gives_percentiles_and_the_maximum() -> None:
    lateness = Lateness()
    assert lateness.percentile_s(0.99) == 0
    for index in range(100):
        lateness.add(index / 10_000)
    assert lateness.percentile_s(0.5) == pytest.approx(0.0049, abs=2e-5)
    assert lateness.percentile_s(0.99) == pytest.approx(0.0098, abs=2e-5)
    assert lateness.max_s == pytest.approx(0.0099)


def test_a_topology_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(InvalidInput, match="no link leads"):
        Topology(sites=SITES, links={("tokyo", "osaka"): Link()})
    with pytest.raises(InvalidInput, match="kyoto"):
        Topology(sites=SITES, links=both_ways({("tokyo", "kyoto"): Link()}))
    with pytest.raises(InvalidInput, match="of its own"):
        Topology(sites={"a": ("x",), "b": ("x",)}, links={})
    with pytest.raises(InvalidInput, match="loss"):
        Link(loss=2)


# How links behave.


@pytest.mark.parametrize(("wanted_s", "backend"), [(0.010, "tun"), (0.040, "tun"), (0.040, "veth")])
def test_round_trips_take_what_is_set(wanted_s: float, backend: Backend) -> None:
    with lab_of(Link(latency_s=wanted_s / 2, rate_bytes_per_s=1.25e8), backend) as lab:
        assert wanted_s <= rtt_s(lab, "t1", "o1") <= 1.1 * wanted_s + 0.001
        assert rtt_s(lab, "t1", "t2") <= 0.002


def test_tcp_gets_the_rate_of_its_link() -> None:
    with lab_of(Link(latency_s=0.005, rate_bytes_per_s=50e6 / 8)) as lab:
        rate = tcp_bits_per_s(lab.hosts["t1"], lab.hosts["o1"], warm_up_s=1.0, measure_s=2.0)
    assert rate == pytest.approx(50e6, rel=0.15)


def tcp_bits_per_s(src: Host, dst: Host, *, warm_up_s: float, measure_s: float) -> float:
    with connected(src, dst) as (near, far):
        sender = threading.Thread(target=send_until_closed, args=(near,))
        sender.start()
        receive_for(far, warm_up_s)
        start_s = time.monotonic()
        n_bytes = receive_for(far, measure_s)
        elapsed_s = time.monotonic() - start_s
        near.shutdown(socket.SHUT_RDWR)
        sender.join(5)
    return 8 * n_bytes / elapsed_s


def send_until_closed(connection: socket.socket) -> None:
    try:
        while True:
            connection.sendall(bytes(65_536))
    except OSError:
        return


def receive_for(connection: socket.socket, duration_s: float) -> int:
    end_s = time.monotonic() + duration_s
    n_bytes = 0
    while time.monotonic() < end_s:
        n_bytes += len(connection.recv(1 << 18))
    return n_bytes


BACKENDS: tuple[Backend, ...] = ("tun", "veth")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bulk_comes_through_as_it_was_sent_with_and_without_loss(backend: Backend) -> None:
    for link in (Link(latency_s=0.002), Link(latency_s=0.002, loss=0.002)):
        with lab_of(link, backend) as lab, connected(lab.hosts["t1"], lab.hosts["o1"]) as (near, far):
            sent = random.Random(2).randbytes(8_000_000)
            sender = threading.Thread(target=near.sendall, args=(sent,))
            sender.start()
            digest, n_left = hashlib.sha256(), len(sent)
            while n_left:
                piece = far.recv(1 << 18)
                digest.update(piece)
                n_left -= len(piece)
            sender.join(5)
            assert digest.digest() == hashlib.sha256(sent).digest()
            assert lab.stats()["without_offload"] == (["t1", "t2", "o1"] if link.loss else [])


def test_the_share_of_packets_that_is_set_gets_lost() -> None:
    with lab_of(Link(latency_s=0.001, loss=0.2)) as lab:
        # Few enough for the receiver's socket buffer: what it drops would count as lost.
        assert 125 <= reaches(lab.hosts["t1"], lab.hosts["o1"], n_packets=200) <= 190
        assert reaches(lab.hosts["t1"], lab.hosts["t2"], n_packets=100) == 100


def test_a_link_changes_under_an_open_connection() -> None:
    with (
        lab_of(Link(latency_s=0.005)) as lab,
        connected(lab.hosts["t1"], lab.hosts["o1"]) as (near, far),
    ):
        assert 0.010 <= median_echo_s(near, far) <= 0.012
        lab.set_link("tokyo", "osaka", Link(latency_s=0.030))
        assert 0.060 <= median_echo_s(near, far) <= 0.067
        lab.set_link("t1", "o1", Link(latency_s=0.001), one_way=True)
        assert 0.031 <= median_echo_s(near, far) <= 0.036


def test_a_switch_that_is_late_makes_the_run_invalid() -> None:
    with lab_of(Link(latency_s=0.020)) as lab:
        lab.stats(reset=True)
        os.kill(lab.switch_pid, signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(lab.switch_pid, signal.SIGCONT)
        assert reaches(lab.hosts["t1"], lab.hosts["o1"])
        with pytest.raises(Lost, match="does not count"):
            lab.check_valid()
        lab.stats(reset=True)
        lab.check_valid()


# Cuts.

ALL = {(a, b) for a in ("t1", "t2", "o1") for b in ("t1", "t2", "o1") if a != b}


def test_cuts_isolation_and_partitions_stop_exactly_what_they_name() -> None:
    with lab_of(Link(latency_s=0.001)) as lab:
        assert reached(lab) == ALL
        lab.cut("t1", "o1")
        assert reached(lab) == ALL - {("t1", "o1"), ("o1", "t1")}
        lab.heal("t1", "o1")
        lab.cut("t2", "osaka", one_way=True)
        assert reached(lab) == ALL - {("t2", "o1")}
        lab.heal()
        lab.isolate("t1")
        assert reached(lab) == {("t2", "o1"), ("o1", "t2")}
        lab.heal("t1")
        assert reached(lab) == ALL
        lab.partition(["tokyo"], ["osaka"])
        assert reached(lab) == {("t1", "t2"), ("t2", "t1")}
        lab.heal()
        assert reached(lab) == ALL


def test_what_is_under_way_when_a_link_is_cut_does_not_arrive() -> None:
    with lab_of(Link(latency_s=0.2)) as lab:
        cut = threading.Timer(0.05, lab.cut, ("tokyo", "osaka"))
        heal = threading.Timer(0.1, lab.heal)  # before the packet is due
        cut.start()
        heal.start()
        assert reaches(lab.hosts["t1"], lab.hosts["o1"], silence_s=0.5) == 0
        cut.join()
        heal.join()
        (line,) = (link for link in lab.stats()["links"] if (link["src"], link["dst"]) == ("t1", "o1"))
        assert line["dropped"] == {"down": 1}


def test_a_host_that_cannot_be_dialled_still_dials_and_keeps_its_connections() -> None:
    with lab_of(Link(latency_s=0.001)) as lab:
        inside, outside = lab.hosts["o1"], lab.hosts["t1"]
        with inside.listen() as listener, connected(outside, inside) as older:
            lab.set_dialable("o1", False)
            with pytest.raises(TimeoutError):
                outside.connect(inside.address, listener.getsockname()[1], timeout_s=SILENCE_S)
            with connected(inside, outside) as own:
                assert echo_s(*own) < 1
            assert echo_s(*older) < 1
            lab.set_dialable("o1", True)
            outside.connect(inside.address, listener.getsockname()[1], timeout_s=5).close()


# What stays behind.


def test_nothing_stays_behind() -> None:
    before = set(namespaces())
    with lab_of(Link()) as lab:
        names = [host.namespace.name for host in lab.hosts.values()]
        assert set(names) <= set(namespaces())
        sleeper = lab.hosts["t1"].popen(["sh", "-c", "setsid sleep 60 & sleep 60"])
        deadline_s = time.monotonic() + 5
        while len(pids := pids_in(names[0])) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert len(pids) == 3
        pids.append(lab.switch_pid)
    assert sleeper.returncode == -signal.SIGKILL
    assert not any(psutil.pid_exists(pid) and is_alive(pid) for pid in pids)
    assert set(namespaces()) == before
    lab.close()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


KILLED = """
import os, signal
from tests.e2e.test_netlab import Link, lab_of
lab = lab_of(Link()).__enter__()
sleeper = lab.hosts["o1"].popen(["sleep", "60"])
print(lab.switch_pid, sleeper.pid, *(host.namespace.name for host in lab.hosts.values()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_lab_removes_what_a_killed_one_left() -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=SOURCE, capture_output=True, text=True, timeout=60
    )
    switch, sleeper, *names = killed.stdout.split()
    assert len(names) == 3, killed.stderr
    remove_orphans()
    assert not set(names) & set(namespaces())
    wait_until(lambda: not is_alive(int(switch)) and not is_alive(int(sleeper)))


def wait_until(is_so: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_two_labs_at_once_do_not_meet() -> None:
    assert new_prefix() != new_prefix()
    with lab_of(Link()) as one, lab_of(Link()) as other:
        one.isolate("osaka")
        assert reaches(other.hosts["t1"], other.hosts["o1"])
        assert not reaches(one.hosts["t1"], one.hosts["o1"])


UNSHARED = """
from tests.e2e.test_netlab import Link, lab_of, rtt_s
with lab_of(Link(latency_s=0.01), "veth") as lab:
    print(rtt_s(lab, "t1", "o1"))
"""


def test_a_lab_in_a_user_namespace() -> None:
    if not can_unshare():
        skip_if_allowed("this user may not make user namespaces here")
    done = subprocess.run(
        unshared([sys.executable, "-c", UNSHARED]), cwd=SOURCE, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # Ahead of other programs only root runs, so here a busy machine shows.
    assert 0.020 <= float(done.stdout) <= 0.1


# A mesh in it.

QUESTION = "What is a KV cache?"
N_TOKENS = 80
LONGEST_GAP_S = 15.0
FLAGS = ("--device", "cpu", "--threads", "1", "--min-nodes", "3", "--memory")


def are_as_set(measured: list[dict[str, Any]], link: Link) -> bool:
    """Whether the round trips of all six directions are within 10 % and half a millisecond."""
    rtt_s = 2 * link.latency_s
    return len(measured) == 6 and all(rtt_s <= one["rtt_p50_s"] <= 1.1 * rtt_s + 0.0005 for one in measured)


def test_a_mesh_over_slow_links_answers_and_loses_no_token_with_a_host_cut_off(tmp_path: Path) -> None:
    """First the last stage's host, then the driver's. A stream of its own waits there for the network."""
    spec = model_spec_from_config(resolve_model().config)
    memory = str(memory_for_exactly(spec, 2))
    sites = {"tokyo": ("t1",), "osaka": ("o1",), "berlin": ("b1",)}
    link = Link(latency_s=0.010, rate_bytes_per_s=1.25e8)
    links = both_ways({("tokyo", "osaka"): link, ("tokyo", "berlin"): link, ("osaka", "berlin"): link})
    with Lab(Topology(sites=sites, links=links)) as lab, LabMesh(tmp_path / "mesh") as mesh:
        founder = mesh.found_on(lab.hosts["t1"], *FLAGS, memory)
        token = founder.fresh_token(uses=2)
        joiners = [mesh.start_on(lab.hosts[name], *FLAGS, memory, token=token) for name in ("o1", "b1")]
        for daemon in joiners:
            mesh.await_up(daemon)
        mesh.await_ready(timeout_s=80)
        # Once all is measured anew; on a machine that is busy for long, the newest round trips must win.
        wait_until(lambda: are_as_set(founder.get("/admin/links"), link), timeout_s=60)

        for index in (-1, 0):
            (replica,) = founder.get("/admin/topology")["replicas"]
            cut_off_in_mid_stream(lab, mesh, mesh.on(replica["stages"][index]["node"]))
            mesh.await_ready(timeout_s=30)


def cut_off_in_mid_stream(lab: Lab, mesh: LabMesh, victim: LabDaemon) -> None:
    gateway = next(daemon for daemon in mesh.daemons if daemon is not victim)
    stream = Stream(gateway.client, token_ids(QUESTION), N_TOKENS)
    own = Stream(victim.client, token_ids(QUESTION), N_TOKENS)
    with ThreadPoolExecutor(1) as pool:
        own_run = pool.submit(own.run)

        def isolate(n_tokens: int) -> None:
            if n_tokens == 20:
                wait_until(lambda: len(own.token_ids) >= 5, timeout_s=30)
                lab.isolate(victim.name)

        stream.run(isolate)
        assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
        gaps_s = [later - earlier for earlier, later in zip(stream.times_s, stream.times_s[1:], strict=False)]
        assert max(gaps_s) < LONGEST_GAP_S
        assert len(own.token_ids) < N_TOKENS
        lab.heal()
        assert own_run.result(timeout=60) == stream.token_ids
