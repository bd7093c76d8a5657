"""The planner's glue: facts in, an encoded plan or a notice out."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import msgspec
import pytest

from daemon import coordinator as coordinator_module
from daemon import planning
from daemon.coordinator import CoordinationLoop
from daemon.models.model_source import resolve_model
from daemon.plan_order import PlanOrder
from daemon.planning import MeshPlanner, NoPlan, PlannedModel
from hexmesh.cluster import Availability, Device, Link
from hexmesh.errors import InvalidInput, Refused
from hexmesh.membership.coordination import Coordination
from hexmesh.membership.outputs import PlanEnvelope, PlanWanted
from hexmesh.membership.records import DeviceFacts, Directory, KnownRecord, LinkFacts
from hexmesh.membership.timers import Timers
from hexmesh.model_spec import model_spec_from_config
from hexmesh.plan import Flow, Plan, decode_plan, digest_of
from hexmesh.workload import Workload
from tests.node_records import node_record
from tests.unit.daemon.fake_mesh import even_plan

MIB = 2**20
IDS = {"tokyo": "a" * 40, "osaka": "b" * 40}


def record(
    name: str,
    *,
    memory_mib: float,
    links_to: tuple[str, ...] = (),
    sequence: int = 1,
    availability: Availability = "active",
) -> KnownRecord:
    device = Device(
        index=0,
        kind="cpu",
        name="cpu",
        budget_bytes=int(memory_mib * MIB),
        flops_per_s=3e10,
        bytes_per_s=1e10,
    )
    facts = DeviceFacts(
        device=device, n_threads=1, flops_spread=0.0, bytes_spread=0.0, measured_at_unix_s=0.0
    )
    links = tuple(
        LinkFacts(
            link=Link(
                src=IDS[name],
                dst=IDS[to],
                rtt_p50_s=1e-3,
                rtt_p95_s=1e-3,
                bytes_per_s=1e9,
                lower_bound=False,
            ),
            measured_at_unix_s=0.0,
        )
        for to in links_to
    )
    body = node_record(
        IDS[name], sequence=sequence, name=name, devices=(facts,), links=links, availability=availability
    )
    return KnownRecord(record=body, key_hash=b"", expires_at_unix_s=1e10, signed=b"")


def planner_over(*records: KnownRecord) -> tuple[MeshPlanner, Directory]:
    directory = Directory()
    for known in records:
        directory.merge(known)
    spec = model_spec_from_config(resolve_model().config)
    model = PlannedModel(
        model_id="m", name="m", spec=spec, dtype="float32", max_model_tokens=2048, workload=Workload()
    )
    return MeshPlanner(model, directory), directory


def wanted(reason: str = "first plan") -> PlanWanted:
    return PlanWanted(request_id=1, hosts=dict.fromkeys(IDS.values(), 1), reason=reason, excluded={})


async def test_a_plan_carries_its_digest_its_hosts_and_a_reason_with_names() -> None:
    planner, _ = planner_over(
        record("tokyo", memory_mib=9, links_to=("osaka",)), record("osaka", memory_mib=9, links_to=("tokyo",))
    )
    answer = await planner.plan(wanted(f"node {IDS['osaka']} joined"), None)
    assert isinstance(answer, PlanEnvelope)
    plan = decode_plan(answer.plan)
    assert (answer.digest, answer.hosts) == (digest_of(answer.plan), dict.fromkeys(IDS.values(), 1))
    assert plan.reason == "node osaka joined"
    assert {stage.node for stage in plan.replicas[0].stages} == set(IDS.values())


async def test_what_does_not_fit_is_told_with_bytes() -> None:
    planner, _ = planner_over(
        record("tokyo", memory_mib=2, links_to=("osaka",)), record("osaka", memory_mib=2, links_to=("tokyo",))
    )
    answer = await planner.plan(wanted(), None)
    assert isinstance(answer, NoPlan)
    assert answer.notice.code == "model_does_not_fit"
    assert answer.notice.needed_bytes is not None
    assert answer.notice.room_bytes is not None
    assert answer.notice.needed_bytes > answer.notice.room_bytes > 0


async def test_facts_on_their_way_are_waited_for() -> None:
    planner, directory = planner_over(
        record("tokyo", memory_mib=9, links_to=("osaka",)), record("osaka", memory_mib=9)
    )

    def arrive() -> None:
        directory.merge(record("osaka", memory_mib=9, links_to=("tokyo",), sequence=2))
        planner.facts_changed()

    asyncio.get_running_loop().call_later(0.01, arrive)
    assert isinstance(await planner.plan(wanted(), None), PlanEnvelope)
    assert not planner.has_more_facts(IDS.values())


async def test_facts_are_not_waited_for_while_nothing_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica lost a host, and one that has just come back has no links yet."""
    monkeypatch.setattr(planning, "FACTS_PATIENCE_S", 60.0)
    alone = record("tokyo", memory_mib=60), record("osaka", memory_mib=60)
    planner, _ = planner_over(*alone)
    gone = even_plan(["f"], 8, "f")
    async with asyncio.timeout(20):
        assert isinstance(await planner.plan(wanted(), gone), PlanEnvelope)


async def test_a_plan_is_checked_against_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that comes during the search is for the next plan."""
    planner, directory = planner_over(*two_nodes(memory_mib=60))
    search = planner._search

    def search_and_hear(*args: Any) -> Any:
        answer = search(*args)
        for known in two_nodes(memory_mib=1, sequence=2):
            directory.merge(known)
        return answer

    monkeypatch.setattr(planner, "_search", search_and_hear)
    assert isinstance(await planner.plan(wanted(), None), PlanEnvelope)


async def test_facts_that_come_too_late_are_a_reason_to_plan_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "FACTS_PATIENCE_S", 0.01)
    planner, directory = planner_over(
        record("tokyo", memory_mib=9, links_to=("osaka",)), record("osaka", memory_mib=9)
    )
    assert not planner.has_more_facts(IDS.values())
    assert isinstance(await planner.plan(wanted(), None), NoPlan)
    assert not planner.has_more_facts(IDS.values())
    directory.merge(record("osaka", memory_mib=9, links_to=("tokyo",), sequence=2))
    assert planner.has_more_facts(IDS.values())


async def test_a_planners_bug_blocks_planning_and_ends_no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenPlanner:
        async def plan(self, wanted: PlanWanted, current: Plan | None) -> NoPlan:
            raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(coordinator_module.log, "exception", lambda *args: None)
    now_s = asyncio.get_running_loop().time()
    machine = Coordination(
        IDS["tokyo"],
        1,
        rank=0,
        timers=Timers(),
        sign=lambda payload: b"",
        verify=lambda node, payload, signature: True,
        highest_term_seen=0,
        rng=random.Random(1),
        now_s=now_s,
    )
    async with asyncio.TaskGroup() as group:
        loop = CoordinationLoop(
            machine=machine,
            courier=cast(Any, AloneCourier()),
            group=group,
            planner=cast(Any, BrokenPlanner()),
            save_term=lambda term: None,
            on_change=lambda: None,
            on_replan=lambda reason: None,
        )
        loop.attach(cast(Any, NoEpochs()))
        await loop._plan(PlanWanted(request_id=1, hosts={IDS["tokyo"]: 1}, reason="r", excluded={}))
    assert loop.blocked is not None
    assert loop.blocked.code == "planning_failed"
    assert "float division by zero" in loop.blocked.message


def two_nodes(
    *, memory_mib: float, osaka: Availability = "active", sequence: int = 1
) -> tuple[KnownRecord, KnownRecord]:
    """Tokyo, and Osaka as its operator left it."""
    return (
        record("tokyo", memory_mib=memory_mib, links_to=("osaka",), sequence=sequence),
        record("osaka", memory_mib=memory_mib, links_to=("tokyo",), sequence=sequence, availability=osaka),
    )


async def planned(planner: MeshPlanner, current: Plan | None = None) -> Plan:
    answer = await planner.plan(wanted(), current)
    assert isinstance(answer, PlanEnvelope)
    plan = decode_plan(answer.plan)
    assert answer.idle == plan.idle_hosts()
    return plan


@pytest.mark.parametrize("said", ["cordoned", "drained", "leaving"])
async def test_a_barred_node_stays_a_host_and_gets_no_stage(said: Availability) -> None:
    planner, _ = planner_over(*two_nodes(memory_mib=60, osaka=said))
    plan = await planned(planner)
    assert plan.hosts.keys() == set(IDS.values())
    assert plan.idle_hosts() == {IDS["osaka"]} == set(plan.barred)
    assert [one.node for one in plan.unused] == [IDS["osaka"]]


async def test_a_cordoned_node_keeps_stages_that_fit_nowhere_else_and_a_drained_one_does_not() -> None:
    planner, directory = planner_over(*two_nodes(memory_mib=9))
    current = await planned(planner)
    assert len(current.replicas[0].stages) == 2
    for known in two_nodes(memory_mib=9, osaka="cordoned", sequence=2):
        directory.merge(known)
    assert planner.why_outdated(current, wanted().hosts) is None
    assert (await planned(planner, current)).idle_hosts() == frozenset()
    assert isinstance(await planner.plan(wanted(), None), NoPlan)

    for known in two_nodes(memory_mib=9, osaka="drained", sequence=3):
        directory.merge(known)
    answer = await planner.plan(wanted(), current)
    assert isinstance(answer, NoPlan)
    assert "uncordon" in answer.notice.next_step
    assert "osaka" in answer.notice.next_step


async def test_a_drain_without_room_is_not_searched_for_over_and_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner, directory = planner_over(*two_nodes(memory_mib=9))
    current = await planned(planner)
    hosts = wanted().hosts
    misfit = await planner.find_misfit(hosts, without=IDS["osaka"])
    assert misfit is not None
    assert misfit.needed_bytes > misfit.room_bytes > 0
    assert planner.why_outdated(current, hosts) is None

    for known in two_nodes(memory_mib=9, osaka="drained", sequence=2):
        directory.merge(known)
    reason = f"node {IDS['osaka']} drained by the operator"
    assert planner.why_outdated(current, hosts) == reason
    assert isinstance(await planner.plan(wanted(), current), NoPlan)
    assert planner.why_outdated(current, hosts) is None
    with monkeypatch.context() as later:
        later.setattr(planning, "MISFIT_RETRY_S", -1.0)
        assert planner.why_outdated(current, hosts) == reason
    for known in two_nodes(memory_mib=9, sequence=3):
        directory.merge(known)
    assert planner.why_outdated(None, hosts) == f"node {IDS['osaka']} uncordoned by the operator"
    assert await planner.find_misfit(hosts, without="c" * 40) is None


class NoEpochs:
    """A host without plans."""

    committed = None


class AloneCourier:
    """Nobody else to send to."""

    node_id = IDS["tokyo"]


async def test_a_better_plan_is_looked_for_and_named_only_where_it_pays() -> None:
    """After a loss the pair goes on as it is; with memory for a replica each, moving pays."""
    planner, directory = planner_over(
        record("tokyo", memory_mib=9, links_to=("osaka",)), record("osaka", memory_mib=9, links_to=("tokyo",))
    )
    answer = await planner.plan(wanted(), None)
    assert isinstance(answer, PlanEnvelope)
    present, hosts = decode_plan(answer.plan), dict.fromkeys(IDS.values(), 1)
    assert await planner.find_better(hosts, present) is None
    for name, other in (("tokyo", "osaka"), ("osaka", "tokyo")):
        directory.merge(record(name, memory_mib=60, links_to=(other,), sequence=2))
    reason = await planner.find_better(hosts, present)
    assert reason is not None
    assert reason.startswith("another layout gives ")


async def test_an_operators_plan_is_carried_out_as_it_is_and_stays() -> None:
    planner, _ = planner_over(*two_nodes(memory_mib=60))
    hosts = dict.fromkeys(IDS.values(), 1)
    answer = await planner.plan(wanted(), None)
    assert isinstance(answer, PlanEnvelope)
    found = decode_plan(answer.plan)
    assert len(found.replicas) == 2
    one = msgspec.structs.replace(
        found, replicas=found.replicas[:1], flows=(Flow(src="r0", dst="r0", share=1.0),), unused=()
    )
    planner.obey(PlanOrder(plan=one, reason="by hand"), hosts)
    answer = await planner.plan(wanted("by hand"), found)
    assert isinstance(answer, PlanEnvelope)
    carried_out = decode_plan(answer.plan)
    assert (carried_out.replicas, carried_out.reason) == (one.replicas, "by hand")
    assert await planner.find_better(hosts, carried_out) is None
    again = await planner.plan(wanted("node osaka joined"), carried_out)
    assert isinstance(again, PlanEnvelope)
    assert len(decode_plan(again.plan).replicas) == 2


async def test_an_order_that_does_not_suit_is_refused_and_changes_nothing() -> None:
    planner, _ = planner_over(*two_nodes(memory_mib=60))
    hosts = dict.fromkeys(IDS.values(), 1)
    answer = await planner.plan(wanted(), None)
    assert isinstance(answer, PlanEnvelope)
    found = decode_plan(answer.plan)
    for changed, said in (
        ({"dtype": "float16"}, "it is for m in float16, the mesh serves m in float32"),
        ({"flows": ()}, None),
        ({"replicas": ()}, "no replica"),
        ({"max_model_tokens": 4096}, "it is for 4096 tokens, the model takes 2048"),
    ):
        order = PlanOrder(plan=msgspec.structs.replace(found, **changed))
        if said is None:
            planner.obey(order, hosts)
            continue
        with pytest.raises(Refused, match=said):
            planner.obey(order, hosts)
    with pytest.raises(InvalidInput, match="no rate to serve at least cost"):
        planner.obey(PlanOrder(objective="cost"), hosts)


async def test_a_workload_that_an_operator_names_is_planned_for() -> None:
    planner, _ = planner_over(*two_nodes(memory_mib=60))
    hosts = dict.fromkeys(IDS.values(), 1)
    rates = []
    for prompt_tokens in (16, 1024):
        workload = Workload(prompt_tokens=prompt_tokens, output_tokens=64)
        planner.obey(PlanOrder(workload=workload), hosts)
        answer = await planner.plan(wanted(), None)
        assert isinstance(answer, PlanEnvelope)
        rates.append(decode_plan(answer.plan).replicas[0].predicted_tokens_per_s)
    assert rates[0] > 2 * rates[1]
