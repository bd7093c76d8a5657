"""Runs this boot's coordination machine: feeds it messages and time, and carries out what it asks for.

Every input goes through `_feed`, every output through one queue, so that an output's own consequences come after
the outputs already asked for, in order.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import NoReturn, assert_never

from daemon.courier import Courier
from daemon.epochs import Epochs
from daemon.plan_order import PlanOrder
from daemon.planning import MeshPlanner, NoPlan
from hexmesh.errors import Refused
from hexmesh.ids import short
from hexmesh.membership.coordination import Coordination
from hexmesh.membership.outputs import (
    Accepted,
    Admission,
    BecameCoordinator,
    Committed,
    CoordinatorChanged,
    DropPrepared,
    HostJoined,
    HostLost,
    LeaveComplete,
    LostCoordinator,
    Output,
    PersistTerm,
    PlanImpossible,
    PlanWanted,
    ReleaseDraining,
    Send,
    StartPrepare,
)
from hexmesh.plan import Plan
from hexmesh.wire.control import Cert, ControlMessage, Epoch
from hexmesh.wire.data import Step
from hexmesh.wire.notice import PlanBlocked

log = logging.getLogger("hexmesh.coordination")

MAX_TICK_S = 0.05
"""The machine may be ticked more often than it asks for; this bounds the effect of a clock that jumps."""


BETTER_POLL_S = 300.0
"""How often a coordinator looks for a plan that is worth moving to, while nothing else calls for one."""
OUTDATED_POLL_S = 1.0
"""How often a coordinator compares its plan with what hosts say of themselves, beside at every new record."""


class CoordinationLoop:
    """Owner of the machine; `run` is its clock."""

    def __init__(
        self,
        *,
        machine: Coordination,
        courier: Courier,
        group: asyncio.TaskGroup,
        planner: MeshPlanner,
        save_term: Callable[[int], None],
        on_change: Callable[[], None],
        on_replan: Callable[[str], None],
    ) -> None:
        self.machine = machine
        self.blocked: PlanBlocked | None = None
        self.has_left = asyncio.Event()
        self._courier = courier
        self._group = group
        self._planner = planner
        self._save_term = save_term
        self._on_change = on_change
        self._on_replan = on_replan
        self._epochs: Epochs | None = None
        self._planning: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._outputs: deque[Output] = deque()
        self._is_carrying_out = False
        self._loop = asyncio.get_running_loop()

    def attach(self, epochs: Epochs) -> None:
        """Who carries out what happens to epochs; to be called once, before anything else."""
        self._epochs = epochs

    async def run(self) -> NoReturn:
        """Let time pass in the machine."""
        looked_s, better_s = 0.0, self._loop.time()
        while True:
            self._feed(self.machine.tick(self._loop.time()))
            if self._loop.time() - looked_s >= OUTDATED_POLL_S:
                looked_s = self._loop.time()
                self._replan_if_outdated()
                if not self.machine.is_at_rest:
                    better_s = self._loop.time()
                elif self._is_look_due(better_s):
                    better_s = self._loop.time()
                    self._looking = self._group.create_task(self._look_for_better(), name="look-for-better")
            wakeup_s = self.machine.next_wakeup_s(self._loop.time()) - self._loop.time()
            await asyncio.sleep(min(MAX_TICK_S, max(0.005, wakeup_s)))

    # --- inputs ---

    def take_part(self) -> None:
        """This node can be planned with: it may be leased, and stand as coordinator."""
        self._feed(self.machine.take_part(self._loop.time()))

    def receive(self, message: ControlMessage) -> None:
        """A control message came in."""
        self._feed(self.machine.receive(message, self._loop.time()))

    def peer_reachable(self, node: str) -> None:
        """An address of `node` is known."""
        self._feed(self.machine.peer_reachable(node, self._loop.time()))

    def peer_forgotten(self, node: str) -> None:
        """`node` is no member any more."""
        self._feed(self.machine.peer_forgotten(node, self._loop.time()))

    def connection_refused(self, node: str) -> None:
        """The connection to `node` was cut and redialling was refused."""
        self._feed(self.machine.connection_refused(node, self._loop.time()))

    def loaded(self, epoch: Epoch) -> None:
        """Everything that `epoch` needs here is loaded."""
        self._feed(self.machine.prepared_locally(epoch, self._loop.time()))

    def load_failed(self, epoch: Epoch, reason: str) -> None:
        """`epoch` cannot be loaded here."""
        self._feed(self.machine.prepare_failed(epoch, reason, self._loop.time()))

    def fetched(self, n_bytes: int) -> None:
        """So many bytes of weights came from peers so far."""
        self.machine.prepare_fetched(n_bytes)

    def drained(self, epoch: Epoch) -> None:
        """Nothing runs in the draining epoch any more."""
        self._feed(self.machine.drained(epoch, self._loop.time()))

    def broken(self, epoch: Epoch, reason: str) -> None:
        """Something of ours in `epoch` broke; if it is the committed one, a new plan is needed."""
        if epoch == self.machine.committed:
            self._feed(self.machine.complain(reason, self._loop.time()))

    def replan(self, reason: str) -> None:
        """Ask for a new plan over the same hosts."""
        self._feed(self.machine.replan(reason, self._loop.time()))

    def obey(self, order: PlanOrder) -> None:
        """Plan as an operator wants. Raises Refused on a node that does not coordinate, and as the planner says."""
        if not self.machine.is_coordinator:
            holder = self.machine.coordinator
            who = "its coordinator" if holder is None else f"node {short(holder)}"
            raise Refused(
                "this node does not coordinate the mesh",
                code="not_coordinator",
                next_step=f"give the order to {who}: --url",
            )
        self._planner.obey(order, self.machine.held)
        self.replan(order.reason)

    def facts_changed(self) -> None:
        """Facts arrived: plan again if an earlier plan had to do without them."""
        self._replan_if_outdated()
        if self.machine.is_coordinator and self._planner.has_more_facts(self.machine.held):
            self.replan("facts that the last plan lacked have arrived")

    def leave(self) -> None:
        """Leave gracefully; `has_left` is set when no plan needs this host any more."""
        self._feed(self.machine.leave(self._loop.time()))

    def admit(self, step: Step) -> Admission:
        """H6: whether this step may run here, after its certificate has done what it may.

        New sequences are the driver's to admit (`admits_new`): to a stage, which keeps none, one in a draining epoch is
        as good as another, and the driver may not have heard of the next plan yet.
        """
        if step.cert is not None:
            self.learn_cert(step.cert)
        if self.machine.serves(step.epoch):
            return Accepted()
        verdict = self.machine.admit_epoch(
            step.epoch, known_epoch=step.epoch, k=1, cert=None, now_s=self._loop.time()
        )
        self._feed(verdict.outputs)
        return verdict

    def admits_new(self, epoch: Epoch) -> bool:
        """Whether a new sequence may be opened in `epoch` here."""
        verdict = self.machine.admit_epoch(epoch, known_epoch=None, k=1, cert=None, now_s=self._loop.time())
        return isinstance(verdict, Accepted)

    def hears(self, node: str) -> bool:
        """Whether `node` and this host heard each other lately."""
        return self.machine.hears(node, self._loop.time())

    def learn_cert(self, cert: Cert) -> None:
        """A certificate that came with a step or a refusal."""
        self._feed(self.machine.learn_cert(cert, self._loop.time()))

    def note_blocked(self, notice: PlanBlocked) -> None:
        """The coordinator says that no plan can be made, or that one can again."""
        self.blocked = None if notice.code is None else notice
        self._on_change()

    # --- outputs ---

    def _feed(self, outputs: list[Output]) -> None:
        self._outputs.extend(outputs)
        if self._is_carrying_out:
            return
        self._is_carrying_out = True
        try:
            while self._outputs:
                self._carry_out(self._outputs.popleft())
        finally:
            self._is_carrying_out = False

    def _carry_out(self, output: Output) -> None:
        assert self._epochs is not None
        match output:
            case Send(to, message):
                self._courier.send(to, message, channel="control")
            case StartPrepare(epoch, plan):
                log.info("plan received epoch=%d term=%d", epoch.n, epoch.ballot.term)
                self._epochs.prepare(epoch, plan)
            case DropPrepared(epoch):
                self._epochs.drop(epoch)
            case Committed():
                self._commit(output)
            case ReleaseDraining(epoch, is_forced):
                self._epochs.release(epoch, "the plan changed" if is_forced else "drained")
            case PlanWanted():
                self._start_planning(output)
            case PlanImpossible(_, reason):
                log.warning("no plan is possible: %s", reason)
            case PersistTerm(term):
                self._save_term(term)
            case LeaveComplete(reason):
                log.info("leave complete: %s", reason)
                self.has_left.set()
            case BecameCoordinator() | LostCoordinator() | CoordinatorChanged() | HostJoined() | HostLost():
                self._note_change(output)
            case _:
                assert_never(output)

    def _commit(self, output: Committed) -> None:
        assert self._epochs is not None
        self._epochs.commit(output.epoch, output.cert, self._loop.time())
        self.blocked = None
        plan = self._epochs.committed.plan if self._epochs.committed is not None else None
        reason = plan.reason if plan is not None else ""
        log.info(
            "plan committed epoch=%d term=%d reason=%s", output.epoch.n, output.epoch.ballot.term, reason
        )
        self._on_replan(reason)
        self._on_change()

    def _note_change(
        self, output: BecameCoordinator | LostCoordinator | CoordinatorChanged | HostJoined | HostLost
    ) -> None:
        match output:
            case BecameCoordinator(ballot, why):
                log.info("this node coordinates term=%d reason=%s", ballot.term, why)
            case LostCoordinator(reason):
                log.info("this node no longer coordinates reason=%s", reason)
                self._stop_planning()
            case CoordinatorChanged(node):
                log.info("coordinator is %s", short(node) if node is not None else "unknown")
            case HostJoined(node):
                log.info("host joined node=%s", short(node))
                self._tell_blocked(node)
            case HostLost(node, reason):
                log.info("host lost node=%s reason=%s", short(node), reason)
        self._on_change()

    # --- planning ---

    def _replan_if_outdated(self) -> None:
        """Hosts say of themselves whether plans may use them: that is a level, so it is looked at again and again."""
        if self.machine.is_at_rest:
            reason = self._planner.why_outdated(self._present_plan(), self.machine.held)
            if reason is not None:
                self.replan(reason)

    def _is_look_due(self, last_s: float) -> bool:
        if self._present_plan() is None or (self._looking is not None and not self._looking.done()):
            return False
        return self._loop.time() - last_s >= BETTER_POLL_S or self._planner.has_drifted(self.machine.held)

    async def _look_for_better(self) -> None:
        """Plan anew if that is worth moving for; at rest only, so that nothing urgent waits for it."""
        present, hosts = self._present_plan(), dict(self.machine.held)
        if present is None or present.hosts != hosts:
            return
        try:
            reason = await self._planner.find_better(hosts, present)
        except Exception:
            log.exception("looking for a better plan failed")
            return
        if reason is not None and self.machine.is_at_rest and self._present_plan() is present:
            self.replan(reason)

    def _start_planning(self, wanted: PlanWanted) -> None:
        self._stop_planning()
        self._planning = self._group.create_task(self._plan(wanted), name=f"plan-{wanted.request_id}")

    def _stop_planning(self) -> None:
        if self._planning is not None:
            self._planning.cancel()
            self._planning = None

    async def _plan(self, wanted: PlanWanted) -> None:
        try:
            answer = await self._planner.plan(wanted, self._present_plan())
        except Exception as error:
            # A bug of the planner: without this it would end this daemon, then the next coordinator's, and so on.
            log.exception("planning failed reason=%s", wanted.reason)
            answer = NoPlan(_bug_notice(error))
        if isinstance(answer, NoPlan):
            self._set_blocked(answer.notice, wanted)
            self._feed(self.machine.plan_ready(wanted.request_id, None, self._loop.time()))
        else:
            self._set_blocked(None, wanted)
            self._feed(self.machine.plan_ready(wanted.request_id, answer, self._loop.time()))

    def _present_plan(self) -> Plan | None:
        assert self._epochs is not None
        return self._epochs.committed.plan if self._epochs.committed is not None else None

    def _set_blocked(self, notice: PlanBlocked | None, wanted: PlanWanted) -> None:
        if notice != self.blocked:
            self.blocked = notice
            for node in wanted.hosts:
                self._tell_blocked(node)
            self._on_change()

    def _tell_blocked(self, node: str) -> None:
        if node == self._courier.node_id:
            return
        notice = self.blocked or PlanBlocked(
            code=None, message="", next_step="", needed_bytes=None, room_bytes=None
        )
        self._courier.send(node, notice, channel="control")


def _bug_notice(error: Exception) -> PlanBlocked:
    return PlanBlocked(
        code="planning_failed",
        message=f"the planner failed: {type(error).__name__}: {error}",
        next_step="report this with the coordinator's log; a join or leave makes it plan again",
        needed_bytes=None,
        room_bytes=None,
    )
