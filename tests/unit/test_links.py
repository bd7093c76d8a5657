"""LinkMonitor on a virtual clock over a fake network with known delays and rates."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from daemon.peering.links import FIRST_PATIENCE_S, KEEP_S, LinkMonitor
from daemon.peering.prober import TURN_LEASE_S
from hexmesh.cluster import Link
from hexmesh.membership.probing import HURRIED_PROBE
from hexmesh.wire.facts import ProbeAsk, ProbeChunk, ProbeEnd, ProbeReport


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now_s


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits and no timer is set"
        self._loop.now_s += max(0.0, timeout)
        return super().select(0)


def run_virtually(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work)


@dataclass
class FakeLink:
    """One direction: half the round trip as delay, then bytes at a rate, one after another."""

    delay_s: float
    bytes_per_s: float
    is_cut: bool = False
    free_at_s: float = 0.0


@dataclass
class FakeNetwork:
    """Carries messages between monitors and writes down every probe that goes through."""

    links: dict[tuple[str, str], FakeLink] = field(default_factory=dict)
    monitors: dict[str, LinkMonitor] = field(default_factory=dict)
    probes: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    probe_bytes: int = 0
    first_chunk: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, src: str, dst: str, message: msgspec.Struct, payload: memoryview | bytes) -> bool:
        loop = asyncio.get_running_loop()
        link = self.links.get((src, dst))
        if link is None:
            return False
        if isinstance(message, ProbeChunk):
            self.probes.setdefault((src, dst, message.probe), []).append(loop.time())
            self.probe_bytes += len(payload)
            self.first_chunk.set()
        link.free_at_s = max(loop.time(), link.free_at_s) + (100 + len(payload)) / link.bytes_per_s
        if not link.is_cut:
            loop.call_at(link.free_at_s + link.delay_s, self._deliver, src, dst, message, payload)
        return True

    def queued_bytes(self, src: str, dst: str) -> int:
        """What a link has not begun to carry."""
        link = self.links[src, dst]
        return int(max(0.0, link.free_at_s - asyncio.get_running_loop().time()) * link.bytes_per_s)

    def _deliver(self, src: str, dst: str, message: Any, payload: bytes) -> None:
        now_s = asyncio.get_running_loop().time()
        if isinstance(message, ProbeReport):
            self.probes[dst, src, message.probe].append(now_s)
        self.monitors[dst].receive(src, message, payload)

    def add_link(
        self, a: str, b: str, *, rtt_s: float, bytes_per_s: float, back: float | None = None
    ) -> None:
        self.links[a, b] = FakeLink(rtt_s / 2, bytes_per_s)
        self.links[b, a] = FakeLink(rtt_s / 2, back or bytes_per_s)

    def spans(self) -> list[tuple[float, float, str, str]]:
        """When each probe kept the link busy: (from, to, source, destination)."""
        return sorted((min(times), max(times), src, dst) for (src, dst, _), times in self.probes.items())


@dataclass(frozen=True)
class FakeCourier:
    node_id: str
    network: FakeNetwork

    def send(
        self, to: str, message: msgspec.Struct, payload: memoryview | bytes = b"", *, channel: str = "data"
    ) -> bool:
        assert channel == "probe"
        return self.network.send(self.node_id, to, message, payload)


class Mesh:
    """Monitors of nodes named by letters, all connected to each other once `connect` is called."""

    def __init__(self, names: str, *, full_after_s: float = 10.0) -> None:
        self.network = FakeNetwork()
        self.changes: list[tuple[float, str]] = []
        for name in names:
            self.network.monitors[name] = LinkMonitor(
                FakeCourier(name, self.network),  # type: ignore[arg-type]
                rng=random.Random(name),
                queued_bytes=lambda to, name=name: self.network.queued_bytes(name, to),  # type: ignore[misc]
                on_change=lambda name=name: self.changes.append(  # type: ignore[misc]
                    (asyncio.get_running_loop().time(), name)
                ),
                now_unix_s=lambda: 1e9 + asyncio.get_running_loop().time(),
                full_after_s=full_after_s,
            )

    def __getitem__(self, name: str) -> LinkMonitor:
        return self.network.monitors[name]

    async def __aenter__(self) -> Mesh:
        self.tasks = [asyncio.create_task(monitor.run()) for monitor in self.network.monitors.values()]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        failures = [task.exception() for task in self.tasks if not task.cancelled()]
        assert failures == []

    def connect(self, a: str, b: str) -> None:
        self[a].connected(b)
        self[b].connected(a)

    def link(self, src: str, dst: str) -> Link | None:
        return next((facts.link for facts in self[src].links() if facts.link.dst == dst), None)

    async def until_measured(self, *pairs: tuple[str, str], patience_s: float) -> float:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        while not all(self.link(*pair) for pair in pairs):
            assert loop.time() - started_s < patience_s, f"not measured: {pairs}"
            await asyncio.sleep(0.001)
        return loop.time() - started_s


@pytest.mark.parametrize(
    ("rtt_s", "bytes_per_s", "patience_s"),
    [(0.0002, 200e6, 0.35), (0.001, 125e6, 0.4), (0.04, 12.5e6, 1.0), (0.15, 125e6, 3.0)],
)
def test_the_first_figures_come_soon(rtt_s: float, bytes_per_s: float, patience_s: float) -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=rtt_s, bytes_per_s=bytes_per_s)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), ("b", "a"), patience_s=patience_s)
            link = mesh.link("a", "b")
            assert link is not None
            assert link.rtt_p50_s == pytest.approx(rtt_s, rel=0.05)
            assert link.rtt_p50_s <= link.rtt_p95_s
            assert link.bytes_per_s <= 1.05 * bytes_per_s
            assert {name for _, name in mesh.changes} == {"a", "b"}

    run_virtually(scene())


def test_a_full_probe_gives_each_direction_its_own_rate() -> None:
    async def scene() -> None:
        async with Mesh("ab", full_after_s=2.0) as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.02, bytes_per_s=12.5e6, back=2e6)
            mesh.connect("a", "b")
            await asyncio.sleep(10.0)
            forth, back = mesh.link("a", "b"), mesh.link("b", "a")
            assert forth is not None
            assert back is not None
            assert (forth.src, forth.dst, back.src, back.dst) == ("a", "b", "b", "a")
            assert forth.bytes_per_s == pytest.approx(12.5e6, rel=0.05)
            assert back.bytes_per_s == pytest.approx(2e6, rel=0.05)
            assert (forth.lower_bound, back.lower_bound) == (False, False)
            assert mesh.network.probe_bytes < 2 * (6e6 + 32e6)

    run_virtually(scene())


def test_a_peer_that_probes_without_end_keeps_nobody_from_measuring() -> None:
    async def hog(monitor: LinkMonitor) -> None:
        for n in range(2000):
            monitor.receive("evil", ProbeAsk(probe=n))
            monitor.receive("evil", ProbeChunk(probe=n, is_last=False), bytes(1000))
            await asyncio.sleep(0.05)

    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.001, bytes_per_s=125e6)
            hogging = asyncio.create_task(hog(mesh["a"]))
            await asyncio.sleep(1.0)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), ("b", "a"), patience_s=45.0)
            hogging.cancel()

    run_virtually(scene())


def test_a_host_takes_part_in_one_probe_at_a_time() -> None:
    names = "abcde"
    pairs = [(src, dst) for src in names for dst in names if src != dst]

    async def scene() -> None:
        async with Mesh(names, full_after_s=0.5) as mesh:
            for src, dst in pairs:
                if src < dst:
                    mesh.network.add_link(src, dst, rtt_s=0.01, bytes_per_s=50e6)
            for src, dst in pairs:
                if src < dst:
                    mesh.connect(src, dst)
            await mesh.until_measured(*pairs, patience_s=10.0)
            await asyncio.sleep(30.0)
            spans = mesh.network.spans()
            assert len(spans) >= 2 * len(pairs)
            for i, (start, stop, src, dst) in enumerate(spans):
                for later_start, _, later_src, later_dst in spans[i + 1 :]:
                    overlaps = later_start < stop and start < stop
                    assert not (overlaps and {src, dst} & {later_src, later_dst})

    run_virtually(scene())


def test_two_hosts_that_ask_each_other_at_once_both_get_their_turn() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.1, bytes_per_s=50e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), ("b", "a"), patience_s=3.0)
            (_, first_stop, src, _), (second_start, *_) = mesh.network.spans()[:2]
            assert src == "a"
            assert second_start >= first_stop

    run_virtually(scene())


def test_an_asker_that_dies_frees_its_peer_after_a_while() -> None:
    async def scene() -> None:
        async with Mesh("abc") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=1e6)
            mesh.network.add_link("b", "c", rtt_s=0.01, bytes_per_s=50e6)
            mesh["a"].connected("b")
            await mesh.network.first_chunk.wait()
            for pair in (("a", "b"), ("b", "a")):
                mesh.network.links[pair].is_cut = True
            mesh["c"].connected("b")
            took_s = await mesh.until_measured(("c", "b"), patience_s=TURN_LEASE_S + 6.0)
            assert took_s > 1.0

    run_virtually(scene())


def test_a_reconnected_path_is_measured_anew_and_shown_until_then() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), patience_s=1.0)
            mesh["a"].disconnected("b")
            await asyncio.sleep(1.0)
            before = mesh.link("a", "b")
            assert before is not None
            assert before.rtt_p50_s == pytest.approx(0.01, rel=0.05)
            mesh.network.add_link("a", "b", rtt_s=0.08, bytes_per_s=5e6)
            mesh["a"].connected("b")
            await asyncio.sleep(3.0)
            after = mesh.link("a", "b")
            assert after is not None
            assert after.rtt_p50_s == pytest.approx(0.08, rel=0.05)
            assert after.bytes_per_s == pytest.approx(5e6, rel=0.1)

    run_virtually(scene())


def test_a_flap_within_one_turn_of_the_loop_is_a_new_connection() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), patience_s=1.0)
            mesh.network.add_link("a", "b", rtt_s=0.05, bytes_per_s=50e6)
            mesh["a"].disconnected("b")
            mesh["a"].connected("b")
            await asyncio.sleep(1.5)
            link = mesh.link("a", "b")
            assert link is not None
            assert link.rtt_p50_s == pytest.approx(0.05, rel=0.05)

    run_virtually(scene())


def test_what_was_measured_over_a_relay_does_not_stick() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh["a"].path_changed("b", is_relayed=True)  # told before the connection is up
            mesh.network.add_link("a", "b", rtt_s=0.2, bytes_per_s=2e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), patience_s=6.0)
            assert [facts.relayed for facts in mesh["a"].links()] == [True]
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh["a"].path_changed("b", is_relayed=False)
            assert mesh["a"].links() == ()
            await mesh.until_measured(("a", "b"), patience_s=3.0)
            (facts,) = mesh["a"].links()
            assert not facts.relayed
            assert facts.link.rtt_p95_s == pytest.approx(0.01, rel=0.1)
            assert facts.link.bytes_per_s == pytest.approx(50e6, rel=0.3)

    run_virtually(scene())


def test_a_path_that_stays_broken_is_dropped() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), patience_s=1.0)
            mesh["a"].disconnected("b")
            await asyncio.sleep(KEEP_S - 1)
            assert mesh.link("a", "b") is not None
            await asyncio.sleep(2)
            assert mesh.link("a", "b") is None

    run_virtually(scene())


def test_a_forgotten_peer_has_no_link() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), patience_s=1.0)
            mesh["a"].forget("b")
            assert mesh["a"].links() == ()
            await asyncio.sleep(5.0)
            assert mesh["a"].links() == ()

    run_virtually(scene())


def test_a_peer_that_never_answers_has_no_link() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.network.links["b", "a"].is_cut = True
            mesh.connect("a", "b")
            await asyncio.sleep(20.0)
            assert mesh["a"].links() == ()
            assert mesh["a"].rtt_s("b") is None
            assert not mesh.network.probes

    run_virtually(scene())


def test_a_moved_round_trip_is_told() -> None:
    async def scene() -> None:
        async with Mesh("ab", full_after_s=1e6) as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), ("b", "a"), patience_s=1.0)
            await asyncio.sleep(60.0)
            assert len(mesh.changes) == 2
            for link in mesh.network.links.values():
                link.delay_s = 0.05
            await asyncio.sleep(120.0)
            assert {name for _, name in mesh.changes[2:]} == {"a", "b"}
            moved = mesh.link("a", "b")
            assert moved is not None
            assert moved.rtt_p50_s == pytest.approx(0.1, rel=0.05)

    run_virtually(scene())


def test_a_probe_waits_for_a_pause_in_the_data_at_either_end() -> None:
    async def scene() -> None:
        async with Mesh("ab", full_after_s=1e6) as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            mesh.connect("a", "b")
            for _ in range(int(FIRST_PATIENCE_S / 0.5) - 2):
                mesh["b"].data_flowed()
                await asyncio.sleep(0.5)
            assert not mesh.network.probes
            await mesh.until_measured(("a", "b"), ("b", "a"), patience_s=6.0)

    run_virtually(scene())


def test_a_link_of_which_nothing_is_known_is_probed_beside_data_after_a_while_and_briefly() -> None:
    async def scene() -> None:
        async with Mesh("ab", full_after_s=1.0) as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=12.5e6)
            mesh.connect("a", "b")
            for _ in range(int(3 * FIRST_PATIENCE_S / 0.5)):
                mesh["a"].data_flowed()
                await asyncio.sleep(0.5)
            link = mesh.link("a", "b")
            assert link is not None
            assert link.bytes_per_s == pytest.approx(12.5e6, rel=0.1)
            assert mesh.network.probe_bytes <= 2 * (HURRIED_PROBE.n_bytes + 256 * 1024)

    run_virtually(scene())


@pytest.mark.parametrize("busy", ["a", "b"])
def test_a_probe_stops_when_data_starts_to_flow(busy: str) -> None:
    async def scene() -> None:
        async with Mesh("ab", full_after_s=3.0) as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.4, bytes_per_s=12.5e6)
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), ("b", "a"), patience_s=9.0)
            n_before = len(mesh.network.probes)
            while len(mesh.network.probes) == n_before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)  # of the three seconds that it takes
            mesh[busy].data_flowed()
            await asyncio.sleep(0.3)  # a report from the other end takes 0.2
            n_sent = mesh.network.probe_bytes
            for _ in range(6):
                mesh[busy].data_flowed()
                await asyncio.sleep(0.5)
                assert mesh.network.probe_bytes == n_sent
            link = mesh.link("a", "b")
            assert link is not None
            assert link.bytes_per_s == pytest.approx(12.5e6, rel=0.1)

    run_virtually(scene())


def test_a_link_that_stays_the_same_is_probed_ever_less_often() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=12.5e6)
            mesh.connect("a", "b")
            n_probes = []
            for _ in range(2):
                n_before = len(mesh.network.probes)
                await asyncio.sleep(3600)
                n_probes.append(len(mesh.network.probes) - n_before)
            assert n_probes[0] >= 8
            assert 2 <= n_probes[1] <= 4

    run_virtually(scene())


def test_unasked_messages_change_nothing() -> None:
    async def scene() -> None:
        async with Mesh("ab") as mesh:
            mesh.network.add_link("a", "b", rtt_s=0.01, bytes_per_s=50e6)
            monitor = mesh["a"]
            monitor.receive("b", ProbeChunk(probe=7, is_last=True), b"x")
            monitor.receive("b", ProbeReport(probe=7, n_bytes=1, elapsed_s=0.1, is_last=True))
            monitor.receive("b", ProbeEnd(probe=7))
            await asyncio.sleep(1.0)
            assert monitor.links() == ()
            mesh.connect("a", "b")
            await mesh.until_measured(("a", "b"), patience_s=1.0)

    run_virtually(scene())


def test_a_seed_fixes_what_happens() -> None:
    results: list[list[Any]] = []

    async def scene() -> None:
        async with Mesh("abc", full_after_s=1.0) as mesh:
            for a, b in ("ab", "bc", "ac"):
                mesh.network.add_link(a, b, rtt_s=0.013, bytes_per_s=33e6)
                mesh.connect(a, b)
            await asyncio.sleep(20.0)
            results.append([mesh.network.spans(), mesh.changes, mesh["a"].links()])

    run_virtually(scene())
    run_virtually(scene())
    assert results[0] == results[1]
