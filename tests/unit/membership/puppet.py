"""One real machine, `me`, among peers that a test speaks for."""

from __future__ import annotations

import random
from typing import Any, TypeVar

from hexmesh.membership.coordination import Coordination
from hexmesh.membership.outputs import Output, PlanEnvelope, PlanWanted, Send
from hexmesh.membership.timers import Timers
from hexmesh.wire.control import (
    LEAST_BALLOT,
    Ack,
    Ask,
    Ballot,
    Beat,
    Cert,
    CertMessage,
    ControlMessage,
    Epoch,
    Grant,
    Header,
    Hello,
    Nack,
    Prepare,
    Release,
    Report,
    Yield,
    cert_payload,
    release_payload,
)

ME = "me"
BOOT = 7
BOOTS = {ME: BOOT, "a": 11, "b": 12, "c": 13, "z": 14}
TIMERS = Timers(prep_timeout_s=8.0, quarantine_s=5.0, drain_s=3.0, plan_deadline_s=20.0)

T = TypeVar("T")


def ballot(node: str, term: int = 1) -> Ballot:
    return Ballot(term=term, rank=0, node=node, boot=BOOTS[node])


def epoch(node: str, n: int = 1, term: int = 1) -> Epoch:
    return Epoch(ballot=ballot(node, term), n=n)


def sign_as(node: str, payload: bytes) -> bytes:
    return node.encode() + b":" + payload


def verify(node: str, payload: bytes, signature: bytes) -> bool:
    return signature == sign_as(node, payload)


def cert(of: Epoch, digest: str = "") -> Cert:
    """Genuine, for the plan that `Puppet.prepare` and `Puppet.plan` make."""
    digest = digest or f"digest {of.n}"
    return Cert(epoch=of, digest=digest, signature=sign_as(of.ballot.node, cert_payload(of, digest)))


def release(of: Ballot, to: str) -> Release:
    payload = release_payload(of, to, BOOTS[to])
    return Release(ballot=of, to_node=to, to_boot=BOOTS[to], signature=sign_as(of.node, payload))


def header(src: str, *, hears: bool = True, to_boot: int | None = BOOT) -> Header:
    return Header(src=src, boot=BOOTS[src], to_boot=to_boot, hears=hears)


class Puppet:
    """Owner of the machine and of its clock; every input's outputs are in `last`."""

    def __init__(self, node: str = ME, timers: Timers = TIMERS, **options: Any) -> None:
        self.now_s = 100.0
        self.last: list[Output] = []
        self._n_seq = 0
        self._n_ticks = 0
        self._hellos: dict[str, dict[str, Any]] = {}
        self.machine = Coordination(
            node,
            BOOTS[node],
            rank=options.pop("rank", 0),
            timers=timers,
            sign=lambda payload: sign_as(node, payload),
            verify=verify,
            highest_term_seen=options.pop("highest_term_seen", 0),
            rng=random.Random(1),
            now_s=self.now_s,
            **options,
        )

    # --- what happened ---

    def sent(self, kind: type[T], to: str | None = None) -> list[T]:
        """Messages of that kind among the last outputs."""
        return [
            output.message
            for output in self.last
            if isinstance(output, Send) and isinstance(output.message, kind) and to in (None, output.to)
        ]

    def outputs(self, *kinds: type[T]) -> list[T]:
        return [output for output in self.last if isinstance(output, kinds)]

    # --- time ---

    def tick(self, after_s: float = 0.0) -> list[Output]:
        self.now_s += after_s
        self.last = self.machine.tick(self.now_s)
        return self.last

    def wait(self, length_s: float, *alive: str) -> list[Output]:
        """Let time pass in ticks of 50 ms while the peers `alive` keep saying Hello; all outputs of it."""
        outputs: list[Output] = []
        end_s = self.now_s + length_s
        while self.now_s < end_s:
            outputs += self.tick(0.05)
            self._n_ticks += 1
            for node in alive if self._n_ticks % 8 == 0 else ():
                outputs += self.refresh(node)
        self.last = outputs
        return outputs

    # --- what peers say ---

    def hear(self, message: ControlMessage) -> list[Output]:
        self.last = self.machine.receive(message, self.now_s)
        return self.last

    def hello(self, src: str, **changes: Any) -> list[Output]:
        fields: dict[str, Any] = {
            "rank": 0,
            "is_free": True,
            "is_leaving": False,
            "promised": LEAST_BALLOT,
            "is_coordinator": False,
            "ballot": LEAST_BALLOT,
            "n_held": 0,
            "cert": None,
            "header": header(src),
        }
        self._hellos[src] = {**fields, **changes}
        return self.refresh(src)

    def refresh(self, src: str) -> list[Output]:
        """The same Hello as last time."""
        return self.hear(Hello(**self._hellos[src]))

    def ask(self, by: Ballot, release: Release | None = None, *, hears: bool = True) -> list[Output]:
        return self.hear(Ask(header=header(by.node, hears=hears), ballot=by, release=release))

    def beat(
        self,
        by: Ballot,
        *,
        seq: int | None = None,
        cur: Cert | None = None,
        prep: Epoch | None = None,
        hears: bool = True,
        heirs: tuple[str, ...] = (),
    ) -> list[Output]:
        seq = self.next_seq() if seq is None else seq
        head = header(by.node, hears=hears)
        return self.hear(Beat(header=head, ballot=by, seq=seq, cur=cur, prep=prep, heirs=heirs))

    def next_seq(self) -> int:
        self._n_seq += 1
        return self._n_seq

    def prepare(
        self,
        by: Ballot,
        of: Epoch,
        hosts: dict[str, int] | None = None,
        *,
        seq: int | None = None,
        idle: tuple[str, ...] = (),
    ) -> list[Output]:
        return self.hear(
            Prepare(
                header=header(by.node),
                ballot=by,
                seq=self.next_seq() if seq is None else seq,
                epoch=of,
                digest=f"digest {of.n}",
                hosts={ME: BOOT, by.node: by.boot} if hosts is None else hosts,
                plan=b"plan",
                idle=idle,
            )
        )

    def certificate(self, src: str, of: Epoch) -> list[Output]:
        return self.hear(CertMessage(header=header(src), cert=cert(of)))

    def grant(self, src: str, to: Ballot, report: Report = Report()) -> list[Output]:  # noqa: B008
        return self.hear(Grant(header=header(src), ballot=to, rank=0, report=report))

    def ack(self, src: str, to: Ballot, report: Report) -> list[Output]:
        return self.hear(Ack(header=header(src), ballot=to, report=report))

    def nack(self, src: str, promised: Ballot, *, is_free: bool = False) -> list[Output]:
        return self.hear(Nack(header=header(src), promised=promised, is_free=is_free))

    def offer(self, by: Ballot, held: tuple[str, ...] = (), to: str = ME) -> list[Output]:
        """A Yield of coordinator `by`."""
        boots = {node: BOOTS[node] for node in held}
        return self.hear(Yield(header=header(by.node), ballot=by, held=boots, release=release(by, to)))

    # --- common givens ---

    def ready(self, of: Epoch) -> list[Output]:
        self.last = self.machine.prepared_locally(of, self.now_s)
        return self.last

    def lead(self) -> Ballot:
        """`me` coordinates itself."""
        self.wait(3.0)
        assert self.machine.is_coordinator
        return self.machine.promised

    def hold(self, *nodes: str) -> Ballot:
        """`me` coordinates itself and `nodes`, with nothing planned yet."""
        mine = self.lead()
        for node in nodes:
            self.join(node)
        return mine

    def join(self, node: str) -> None:
        """`me` gets the lease of `node`."""
        mine = self.machine.promised
        self.hello(node, promised=mine, is_free=False)
        self.grant(node, mine)

    def plan(self, wanted: PlanWanted, digest: str = "digest 1", idle: str = "") -> list[Output]:
        """Answer with a plan in which the hosts of `idle`, one letter each, have no part."""
        envelope = PlanEnvelope(plan=b"plan", digest=digest, hosts=wanted.hosts, idle=frozenset(idle))
        self.last = self.machine.plan_ready(wanted.request_id, envelope, self.now_s)
        return self.last

    def serve(self, by: Ballot, of: Epoch) -> None:
        """`me` is leased to `by` and has committed `of`."""
        self.hello(by.node, promised=by, is_free=False, is_coordinator=True, ballot=by, n_held=1)
        self.ask(by)
        self.prepare(by, of)
        self.ready(of)
        self.beat(by, cur=cert(of))
        assert self.machine.committed == of
