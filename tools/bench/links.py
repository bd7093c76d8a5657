"""What the link probe says of links that the lab sets, beside what a long transfer over a like connection reaches.

Two processes a link, each in a namespace of its own, over connections made like a daemon's. Per direction: the
quick probe on a fresh connection, the full probe, small messages that start while another full probe runs, and
a transfer of some seconds whose second half counts.
Run: `python tools/bench/links.py [--quick] [--json]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.peering.address import listen_tcp
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.peering.prober import QUIET_S, Prober
from daemon.peering.tls import TlsFiles
from hexmesh.errors import Busy, Lost
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.certificates import to_pem
from hexmesh.identity.keys import NodeKey
from hexmesh.ids import NodeId, new_boot
from hexmesh.membership.probing import FULL_PROBE, QUICK_PROBE, ProbeBudget, quantile
from hexmesh.wire.codec import Codec
from hexmesh.wire.facts import FACTS_MESSAGE, Ping, Pong, ProbeChunk
from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology

PORT = 7701
TRANSFER_S = 6.0
MBIT = 1e6 / 8
N_PINGS = 20


@dataclass(frozen=True, slots=True)
class Case:
    """A pair of hosts: round trip, and the rate from the first to the second and back; None: plain loopback."""

    name: str
    rtt_s: float
    there_mbit: float | None
    back_mbit: float | None = None
    wmem_bytes: int | None = None
    """How large a sender's buffer may get; None: the system's own limit."""

    def topology(self) -> Topology:
        there = Link(latency_s=self.rtt_s / 2, rate_bytes_per_s=_bytes(self.there_mbit))
        back = Link(latency_s=self.rtt_s / 2, rate_bytes_per_s=_bytes(self.back_mbit or self.there_mbit))
        return Topology(sites={"x": ("a",), "y": ("b",)}, links={("x", "y"): there, ("y", "x"): back})


def _bytes(mbit: float | None) -> float | None:
    return None if mbit is None else mbit * MBIT


CASES = [
    Case("1 Gbit/s, 2 ms", 0.002, 1000),
    Case("1 Gbit/s, 40 ms", 0.040, 1000),
    Case("1 Gbit/s, 150 ms", 0.150, 1000),
    Case("1 Gbit/s, 220 ms", 0.220, 1000),
    Case("100 Mbit/s, 40 ms", 0.040, 100),
    Case("10 Mbit/s, 40 ms", 0.040, 10),
    Case("100 Mbit/s there, 10 back, 40 ms", 0.040, 100, 10),
    Case("1 Gbit/s, 150 ms, buffers up to 64 MB", 0.150, 1000, wmem_bytes=2**26),
]
LOOPBACK = Case("loopback", 0.0, None)
QUICK = [CASES[1], CASES[3], LOOPBACK]


# One process of a pair.


@dataclass(slots=True)
class Wire:
    """A courier over one network that counts what it sends for a probe."""

    node_id: str
    network: PeerNetwork | None = None
    n_bytes: int = 0

    def send(
        self, to: str, message: msgspec.Struct, payload: memoryview | bytes = b"", *, channel: str = "data"
    ) -> bool:
        assert self.network is not None
        try:
            self.network.send(NodeId(to), message, payload, channel)  # type: ignore[arg-type]
        except (Busy, Lost):
            return False
        self.n_bytes += len(payload)
        return True

    def queued_bytes(self, node: str) -> int:
        assert self.network is not None
        return self.network.queued_bytes(NodeId(node), "probe")


@dataclass(slots=True)
class End:
    """One end of the pair. `transfer` frames are probe chunks of probe 0, which no prober takes."""

    wire: Wire
    prober: Prober
    pongs: dict[int, asyncio.Future[float]] = field(default_factory=dict)
    arrived: list[tuple[float, int]] = field(default_factory=list)

    def receive(self, src: str, message: Any, payload: memoryview) -> None:
        match message:
            case Ping():
                self.wire.send(src, Pong(n=message.n), channel="probe")
            case Pong():
                self.pongs.pop(message.n).set_result(time.perf_counter())
            case ProbeChunk(probe=0):
                self.arrived.append((time.perf_counter(), len(payload)))
            case _:
                self.prober.receive(src, message, payload)

    async def round_trips(self, peer: str, channel: str) -> list[float]:
        """One after the other, in seconds."""
        return [await self.round_trip_s(peer, channel, n) for n in range(N_PINGS)]

    async def round_trip_s(self, peer: str, channel: str, n: int) -> float:
        self.pongs[n] = asyncio.get_running_loop().create_future()
        sent_s = time.perf_counter()
        if channel == "data":
            self.prober.data_flowed()
        self.wire.send(peer, Ping(n=n), channel=channel)
        return await self.pongs[n] - sent_s

    async def beside(self, peer: str, rtt_s: float) -> dict[str, float]:
        """What a request's first small messages take that start while a full probe runs."""
        await self.round_trip_s(peer, "data", 0)  # opens the connection
        await asyncio.sleep(QUIET_S + rtt_s)
        probing = asyncio.create_task(self.prober.probe(peer, FULL_PROBE, rtt_s))
        await asyncio.sleep(0.02 + 3 * rtt_s)
        taken_s = await self.round_trips(peer, "data")
        is_counted = (await probing).is_cut_short  # else it was through before the first message
        return (
            {"first_ms": 1000 * taken_s[0], "p50_ms": 1000 * quantile(sorted(taken_s), 0.5)}
            if is_counted
            else {}
        )

    async def probe(self, peer: str, budget: ProbeBudget, rtt_s: float) -> dict[str, float]:
        self.wire.n_bytes, started_s = 0, time.perf_counter()
        probed = await self.prober.probe(peer, budget, rtt_s)
        assert probed.estimate is not None
        return {
            "mbit": probed.estimate.bytes_per_s / MBIT,
            "lower_bound": probed.estimate.lower_bound,
            "mbytes": self.wire.n_bytes / 1e6,
            "seconds": time.perf_counter() - started_s,
        }

    async def transfer(self, peer: str) -> None:
        network, filler = self.wire.network, memoryview(random.randbytes(2**18))
        assert network is not None
        end_s = time.perf_counter() + TRANSFER_S
        while time.perf_counter() < end_s:
            if network.queued_bytes(NodeId(peer), "data") < 2**22:
                self.wire.send(peer, ProbeChunk(probe=0, is_last=False), filler)
            else:
                await asyncio.sleep(0.002)

    def arrived_mbit(self) -> float:
        """The rate of the second half of what came."""
        first_s, last_s = self.arrived[0][0], self.arrived[-1][0]
        late = [(at_s, n) for at_s, n in self.arrived if at_s >= (first_s + last_s) / 2]
        return sum(n for _, n in late[1:]) / (late[-1][0] - late[0][0]) / MBIT


async def play(folder: Path, index: int) -> None:
    """Command lines in, one JSON line out for each, until stdin ends."""
    pair = json.loads((folder / "pair.json").read_text())
    own, peer = pair[index], pair[1 - index]
    local = LocalPeer(
        node_id=NodeId(own["node"]),
        boot=new_boot(random.Random()),
        name=str(index),
        address=f"{own['host']}:{own['port']}",
        tls=TlsFiles(
            folder / f"key{index}.pem", folder / f"cert{index}.pem", (folder / "root.der").read_bytes()
        ),
    )
    listener = listen_tcp(own["host"], own["port"], flag="--peer-port")
    wire = Wire(own["node"])
    end = End(
        wire,
        Prober(wire, queued_bytes=wire.queued_bytes, rng=random.Random(index), stopwatch=time.perf_counter),  # type: ignore[arg-type]
    )
    codec: Codec[msgspec.Struct] = Codec(FACTS_MESSAGE, name="facts")
    events = PeerEvents(on_message=end.receive)
    async with PeerNetwork(local, listener, events, decode=codec.decode) as network:
        wire.network = network
        network.learn_address(NodeId(peer["node"]), peer["host"], peer["port"])
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        print("{}", flush=True)
        rtt_s = 0.0
        while command := (await reader.readline()).decode().strip():
            said: dict[str, float] = {}
            match command:
                case "rtt":
                    await end.round_trips(peer["node"], "probe")  # the first ones open the connection
                    rtt_s = quantile(sorted(await end.round_trips(peer["node"], "probe")), 0.5)
                    said = {"rtt_s": rtt_s}
                case "quick":
                    said = await end.probe(peer["node"], QUICK_PROBE, rtt_s)
                case "full":
                    said = await end.probe(peer["node"], FULL_PROBE, rtt_s)
                case "beside":
                    said = await end.beside(peer["node"], rtt_s)
                case "transfer":
                    await end.transfer(peer["node"])
                case _:
                    said = {"mbit": end.arrived_mbit()}
            print(json.dumps(said), flush=True)


# The whole.


@dataclass(slots=True)
class Player:
    process: subprocess.Popen[bytes]

    def ask(self, command: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Lost("an end of the pair died; its words are above", code="bench_end_died")
        said: dict[str, float] = json.loads(line)
        return said


def write_pair(folder: Path, addresses: list[tuple[str, int]]) -> None:
    authority = MeshAuthority.found(datetime.now(UTC))
    (folder / "root.der").write_bytes(authority.root_der)
    pair = []
    for index, (host, port) in enumerate(addresses):
        key = NodeKey.generate()
        certificate = authority.issue(request_certificate(key), "12D3KooWBench", datetime.now(UTC))
        key_file = folder / f"key{index}.pem"
        key_file.touch(mode=0o600)
        key_file.write_bytes(key.to_pem())
        (folder / f"cert{index}.pem").write_bytes(to_pem([certificate]))
        pair.append({"node": key.node_id, "host": host, "port": port})
    (folder / "pair.json").write_text(json.dumps(pair))


def measure(case: Case) -> dict[str, dict[str, float]]:
    """What the bench saw of a case, by direction. Loopback is one machine, so it has one direction."""
    with tempfile.TemporaryDirectory(prefix="hexmesh-links-") as name, ExitStack() as stack:
        folder = Path(name)
        if case.there_mbit is None:
            write_pair(folder, [("127.0.0.1", PORT), ("127.0.0.1", PORT + 1)])
            players = [stack.enter_context(start(folder, index, ())) for index in range(2)]
            return {"there": ask_all(*players)}
        lab = stack.enter_context(Lab(case.topology()))
        hosts = list(lab.hosts.values())
        for host in hosts if case.wmem_bytes is not None else ():
            host.sysctl("net.ipv4.tcp_wmem", f"4096 16384 {case.wmem_bytes}")
            host.sysctl("net.ipv4.tcp_rmem", f"4096 131072 {case.wmem_bytes}")
        write_pair(folder, [(host.address, PORT) for host in hosts])
        there, back = (
            stack.enter_context(start(folder, index, host.program)) for index, host in enumerate(hosts)
        )
        said = {"there": ask_all(there, back)}
        if case.back_mbit is not None:
            said["back"] = ask_all(back, there)
        lab.check_valid()
        return said


@contextmanager
def start(folder: Path, index: int, program: tuple[str, ...]) -> Iterator[Player]:
    command = [*program, sys.executable, __file__, "--end", str(folder), str(index)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        player = Player(process)
        player.hear()
        yield player
    finally:
        process.kill()
        process.wait()


def ask_all(src: Player, dst: Player) -> dict[str, float]:
    """Round trip, both probes and a transfer; every figure in one flat table."""
    figures = {"rtt_ms": 1000 * src.ask("rtt")["rtt_s"]}
    for kind in ("quick", "full", "beside"):
        figures |= {f"{kind} {name}": value for name, value in src.ask(kind).items()}
    src.ask("transfer")
    time.sleep(1.0)  # what is under way arrives
    return figures | {"transfer mbit": dst.ask("arrived")["mbit"]}


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--end", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", help="cases whose name holds this")
    arguments = parser.parse_args()
    if arguments.end:
        uvloop.run(play(Path(arguments.end[0]), int(arguments.end[1])))
        return 0
    report = Report(
        name="links",
        method=f"two processes a link, TLS, default buffers; transfer: second half of {TRANSFER_S:.0f} s",
    )
    for case in QUICK if arguments.quick else [*CASES, LOOPBACK]:
        if arguments.only is not None and arguments.only not in case.name:
            continue
        progress(case.name)
        for direction, figures in measure(case).items():
            for name, value in figures.items():
                report.add(f"{case.name}, {direction}: {name}", float(value), _unit(name))
    if arguments.quick:
        report.not_run = [case.name for case in CASES if case not in QUICK]
    print_report(report, "json" if arguments.json else "text")
    return 0


def _unit(name: str) -> str:
    units = {
        "first_ms": "ms",
        "p50_ms": "ms",
        "mbit": "Mbit/s",
        "mbytes": "MB",
        "seconds": "s",
        "rtt_ms": "ms",
        "lower_bound": "(1: lower bound)",
    }
    return units[name.split()[-1]]


if __name__ == "__main__":
    sys.exit(main())
