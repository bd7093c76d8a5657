"""Hands every message of a peer to the part that it is for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import assert_never, cast

import msgspec

from daemon.complaints import Complaints
from daemon.coordinator import CoordinationLoop
from daemon.courier import Courier, Payload
from daemon.discovery.roster import Roster
from daemon.epochs import Epochs
from daemon.gateway import Gateway
from daemon.orders import NodeOrders
from daemon.peering.links import LinkMonitor
from daemon.stages import StageHost
from daemon.trust.desk import TrustDesk
from hexmesh.ids import NodeId, short
from hexmesh.serving.senders import sender_fault
from hexmesh.wire.circuits import REACH_MESSAGE
from hexmesh.wire.codec import Codec, ReachMessage
from hexmesh.wire.control import (
    CONTROL_MESSAGE,
    Ack,
    Ask,
    Beat,
    CertMessage,
    ControlMessage,
    Grant,
    Hello,
    Nack,
    Prepare,
    Yield,
)
from hexmesh.wire.data import (
    DATA_MESSAGE,
    Generate,
    GenerateCancel,
    Generated,
    GenerateFailed,
    PromptScored,
    ReplicaIdle,
    ReplicaStats,
    Step,
    StepRefused,
    StepResult,
)
from hexmesh.wire.facts import (
    FACTS_MESSAGE,
    Facts,
    Ping,
    Pong,
    ProbeAnswer,
    ProbeAsk,
    ProbeChunk,
    ProbeEnd,
    ProbeReport,
)
from hexmesh.wire.notice import NOTICE_MESSAGE, PlanBlocked
from hexmesh.wire.orders import ORDER_MESSAGE, NodeOrder, NodeReply
from hexmesh.wire.trust import TRUST_MESSAGE, Appointed, Renew, Renewed, RenewRefused, Revoked

log = logging.getLogger("hexmesh.dispatch")

DEAF_S = 0.1
"""How long the records of a member that has just sent a bad one are dropped unread."""

DataMessage = DATA_MESSAGE
FactsMessage = FACTS_MESSAGE
TrustMessage = TRUST_MESSAGE
PeerMessage = ControlMessage | DataMessage | FactsMessage | TrustMessage | PlanBlocked | NodeOrder | NodeReply

PEER_MESSAGES: Codec[PeerMessage | ReachMessage] = Codec(
    CONTROL_MESSAGE
    | DATA_MESSAGE
    | FACTS_MESSAGE
    | TRUST_MESSAGE
    | NOTICE_MESSAGE
    | ORDER_MESSAGE
    | REACH_MESSAGE,
    name="peer",
)
"""Everything that members send each other once both have greeted. The peer network keeps REACH_MESSAGE."""


@dataclass(slots=True, kw_only=True)
class Dispatcher:
    """Knows the parts of a node; holds no state of its own but the replicas' last figures."""

    courier: Courier
    coordination: CoordinationLoop
    epochs: Epochs
    stages: StageHost
    gateway: Gateway
    links: LinkMonitor
    roster: Roster
    orders: NodeOrders
    trust: TrustDesk
    stats: dict[str, ReplicaStats]
    complaints: Complaints = field(default_factory=Complaints)
    _deaf_until_s: dict[str, float] = field(default_factory=dict)
    """Of members alone, so it stays small."""

    def on_message(self, src: str, message: msgspec.Struct, payload: Payload) -> None:
        """A message from `src`, which may be this node itself."""
        known = cast(PeerMessage, message)
        if (fault := self._sender_fault(src, known)) is not None:
            self._complain(src, f"{type(known).__name__} dropped: {fault}")
            return
        if isinstance(known, (Step, StepResult, Generate, Generated)):
            self.links.data_flowed()
        match known:
            case Step():
                self.stages.on_step(known, payload)
            case StepResult() | StepRefused():
                self._on_step_answer(known)
            case Hello() | Ask() | Grant() | Nack() | Beat() | Ack() | Prepare() | CertMessage() | Yield():
                self._on_control(src, known)
            case Generate():
                self._on_generate(src, known)
            case Generated() | PromptScored() | GenerateFailed():
                self.gateway.on_message(src, known)
            case GenerateCancel():
                for driver in self.epochs.drivers():
                    driver.cancel(known)
            case ReplicaIdle():
                self.epochs.on_idle(known)
            case ReplicaStats():
                self.on_stats(known)
            case Facts():
                self._on_facts(src, known)
            case Ping() | Pong() | ProbeAsk() | ProbeAnswer() | ProbeChunk() | ProbeReport() | ProbeEnd():
                self.links.receive(src, known, payload)
            case Appointed() | Renew() | Renewed() | RenewRefused() | Revoked():
                self.trust.receive(NodeId(src), known)
            case PlanBlocked():
                if src == self.coordination.machine.coordinator:
                    self.coordination.note_blocked(known)
            case NodeOrder():
                self.orders.on_order(src, known)
            case NodeReply():
                self.orders.on_reply(src, known)
            case _:
                assert_never(known)

    def on_stats(self, stats: ReplicaStats) -> None:
        """What a replica does just now, if it is of an epoch held here."""
        committed = self.epochs.committed
        if committed is not None and stats.epoch == committed.epoch:
            self.stats[stats.replica] = stats
        self.epochs.on_stats(stats)

    def _on_facts(self, src: str, facts: Facts) -> None:
        """Signatures take time to check: who sends a bad one is not listened to for a moment."""
        now_s = time.monotonic()
        if now_s < self._deaf_until_s.get(src, now_s):
            return
        if not self.roster.learn(facts.record):
            self._deaf_until_s[src] = now_s + DEAF_S

    def _sender_fault(self, src: str, message: PeerMessage) -> str | None:
        """Why `src` may not say this; a lie is dropped here, before any part acts on it."""
        match message:
            case Step() | StepResult() | StepRefused() | ReplicaIdle() | ReplicaStats():
                return sender_fault(src, message, self.epochs.plan(message.epoch))
            case Generate() | GenerateCancel():
                return sender_fault(src, message, None)
            case Hello() | Ask() | Grant() | Nack() | Beat() | Ack() | Prepare() | CertMessage() | Yield():
                claimed = message.header.src
                return None if claimed == src else f"it claims to be from {short(claimed)}"
            case _:
                return None

    def _complain(self, src: str, reason: str) -> None:
        if self.complaints.is_news(src, reason, time.monotonic()):
            log.warning("message refused node=%s reason=%s", short(src), reason)

    def _on_control(self, src: str, message: ControlMessage) -> None:
        self.coordination.receive(message)

    def _on_step_answer(self, answer: StepResult | StepRefused) -> None:
        driver = self.epochs.driver(answer.epoch, answer.replica)
        if isinstance(answer, StepResult):
            if driver is not None:
                driver.on_result(answer)
            return
        if answer.cert is not None:
            self.coordination.learn_cert(answer.cert)
        if driver is not None:
            driver.on_refused(answer)

    def _on_generate(self, src: str, message: Generate) -> None:
        driver = self.epochs.driver(message.epoch, message.replica)
        if driver is not None and self.coordination.admits_new(driver.epoch):
            driver.submit(src, message)
            return
        failed = GenerateFailed(
            sequence=message.sequence,
            attempt=message.attempt,
            reason="another plan is committed at its driver",
            retry=True,
            cert=self.coordination.machine.cert,
        )
        self.courier.send(src, failed)
