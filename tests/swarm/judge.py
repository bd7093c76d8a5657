"""The safety invariants, checked on a host after every event that touched it.

I1 to I7 are those of docs/coordination.md; "vote" says that ready is a vote, "listen" that a host which does
not take part yet promises nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import msgspec

from hexmesh.membership.outputs import Committed, DropPrepared, Output, StartPrepare
from hexmesh.wire.control import LEAST_BALLOT, Ballot, Beat, ControlMessage, Epoch, Prepare

if TYPE_CHECKING:
    from tests.swarm.world import Host


class ViolationError(AssertionError):
    """An invariant is broken; the message names the seed."""


class _Hosts(msgspec.Struct, frozen=True):
    hosts: dict[str, int]


class Judge:
    """Owner of what was seen so far."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._promised: dict[str, Ballot] = {}
        self._committed: dict[str, Epoch | None] = {}
        self._plans: dict[Epoch, bytes] = {}
        self._attempts: dict[tuple[int, int], bytes] = {}
        self._decided: set[Epoch] = set()

    def note_boot(self, host: Host) -> None:
        self._promised[host.name] = LEAST_BALLOT
        self._committed[host.name] = None

    def check(
        self, host: Host, promised: Ballot, message: ControlMessage | None, outputs: list[Output]
    ) -> None:
        """`promised` is what the host had promised before the event, `message` what caused it, if one did."""
        machine = host.machine
        assert machine is not None
        name = host.name
        if machine.promised is not promised:
            self._require(machine.promised >= promised, "I1", host, "promised went back")
        self._require(promised >= self._promised[name], "I1", host, "promised went back")
        self._promised[name] = machine.promised
        committed, before = machine.committed, self._committed[name]
        if committed is not before:
            self._require(committed is not None, "I1", host, "nothing committed any more")
            assert committed is not None
            self._require(before is None or committed >= before, "I1", host, "committed went back")
            self._committed[name] = committed
        for output in outputs:
            if isinstance(output, StartPrepare):
                self._check_prepare(host, promised, message, output)
            elif isinstance(output, Committed):
                self._decided.add(output.epoch)
                self._check_commit(host, promised, message, output)
            elif isinstance(output, DropPrepared):
                self._check_drop(host, message, output.epoch)
        self._check_memory(host)
        if not host.takes_part and (machine.promised != LEAST_BALLOT or machine.coordinator is not None):
            self._fail("listen", host, f"promised {machine.promised} too early")

    def _check_prepare(
        self, host: Host, promised: Ballot, message: ControlMessage | None, output: StartPrepare
    ) -> None:
        assert host.machine is not None
        known = self._plans.setdefault(output.epoch, output.plan)
        self._require(known == output.plan, "I4", host, f"two plans named {output.epoch}")
        if isinstance(message, Prepare):
            is_fenced = message.ballot < promised or message.ballot.owner != promised.owner
            self._require(not is_fenced, "I3", host, f"prepared under {message.ballot}, promised {promised}")
        else:
            self._require(host.machine.is_coordinator, "I3", host, "prepared without an order")

    def _check_commit(
        self, host: Host, promised: Ballot, message: ControlMessage | None, output: Committed
    ) -> None:
        assert host.machine is not None
        hosts = msgspec.msgpack.decode(host.plans[output.epoch], type=_Hosts).hosts
        self._require(hosts.get(host.name) == host.boot, "I6", host, f"committed a plan for {hosts}")
        if isinstance(message, Beat):
            is_fenced = message.ballot < promised or message.ballot.owner != promised.owner
            self._require(not is_fenced, "I3", host, f"committed under {message.ballot}, promised {promised}")
        else:
            is_theirs = output.epoch.ballot.owner == promised.owner
            is_endorsed = host.machine.is_coordinator and host.machine.decided == output.epoch
            self._require(
                is_theirs or is_endorsed, "I3", host, f"certificate of {output.epoch} obeyed under {promised}"
            )

    def _check_drop(self, host: Host, message: ControlMessage | None, epoch: Epoch) -> None:
        """A decided epoch had every host's vote: an older order of its own coordinator must not undo one."""
        if isinstance(message, Beat) and epoch in self._decided:
            cur = None if message.cur is None else message.cur.epoch
            is_old = message.ballot.owner == epoch.ballot.owner and (cur is None or cur < epoch)
            self._require(not is_old, "vote", host, f"dropped {epoch}, decided, by a beat with {cur}")

    def _check_memory(self, host: Host) -> None:
        machine = host.machine
        assert machine is not None
        slots = {machine.committed, machine.prepared, machine.draining} - {None}
        if len(host.loaded) > 3 or host.loaded != slots:
            self._fail("I7", host, f"loaded {host.loaded}, slots {slots}")

    def note_step(self, host: Host, attempt: tuple[int, int], epoch: Epoch) -> None:
        """The host worked on an attempt, with the plan that it has under that name, else its current one."""
        assert host.machine is not None
        slots = (host.machine.committed, host.machine.prepared, host.machine.draining)
        plan = host.plans[epoch] if epoch in slots else host.machine.committed_plan
        assert plan is not None
        if self._attempts.setdefault(attempt, plan) != plan:
            self._fail("I5", host, f"attempt {attempt} mixed")

    def _require(self, claim: bool, invariant: str, host: Host, why: str) -> None:
        if not claim:
            self._fail(invariant, host, why)

    def _fail(self, invariant: str, host: Host, why: str) -> NoReturn:
        raise ViolationError(f"{invariant} seed={self._seed} host={host.name} boot={host.boot}: {why}")
