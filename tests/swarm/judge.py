"""Invariants I1 to I7, checked on a host after every event that touched it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hexmesh.membership.outputs import Committed, Output, StartPrepare
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
                self._check_commit(host, promised, message, output)
        self._check_memory(host)

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

    def _check_memory(self, host: Host) -> None:
        machine = host.machine
        assert machine is not None
        slots = {machine.committed, machine.prepared, machine.draining} - {None}
        self._require(len(host.loaded) <= 3, "I7", host, f"{len(host.loaded)} epochs in memory")
        self._require(host.loaded == slots, "I7", host, f"loaded {host.loaded}, slots {slots}")

    def note_step(self, host: Host, attempt: tuple[int, int], epoch: Epoch) -> None:
        """The host worked on an attempt, with the plan that it has under that name, else its current one."""
        assert host.machine is not None
        slots = (host.machine.committed, host.machine.prepared, host.machine.draining)
        plan = host.plans[epoch] if epoch in slots else host.machine.committed_plan
        assert plan is not None
        self._require(
            self._attempts.setdefault(attempt, plan) == plan, "I5", host, f"attempt {attempt} mixed"
        )

    def _require(self, claim: bool, invariant: str, host: Host, why: str) -> None:
        if not claim:
            raise ViolationError(f"{invariant} seed={self._seed} host={host.name} boot={host.boot}: {why}")
