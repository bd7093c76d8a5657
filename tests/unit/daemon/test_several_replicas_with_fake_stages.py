"""Several replicas in one plan: what breaks in one goes on in another, and what stays as it is goes on in place."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

from hexmesh.wire.data import Generated
from tests.unit.daemon.fake_mesh import FakeMesh, answer_to, fake_mesh
from tests.unit.daemon.test_recovery_with_fake_stages import PROMPT, answer_while, until

SEVERAL = 6


def prompt(at: int) -> list[int]:
    return [*PROMPT, at]


def start(mesh: FakeMesh, at: str, n_tokens: int) -> list[asyncio.Task[list[int]]]:
    """Several requests at one node."""
    loop = asyncio.get_running_loop()
    return [
        loop.create_task(mesh.ask(at, prompt(index), n_tokens, name=f"{at}{index}"))
        for index in range(SEVERAL)
    ]


def answers(n_tokens: int) -> list[list[int]]:
    return [answer_to(prompt(index), n_tokens) for index in range(SEVERAL)]


def spread(mesh: FakeMesh, at: str) -> Counter[str]:
    routes = [flight.route for flight in mesh.nodes[at].gateway.flights()]
    return Counter(route.replica for route in routes if route is not None)


async def tokens_came(mesh: FakeMesh, at: str, n_tokens: int) -> None:
    """Wait until every request at the node has so many tokens."""
    gateway = mesh.nodes[at].gateway
    await until(
        lambda: (
            len(gateway.flights()) == SEVERAL
            and all(len(flight.emitted) >= n_tokens for flight in gateway.flights())
        )
    )


def pools_of(mesh: FakeMesh) -> set[str]:
    return {pool for node in mesh.nodes.values() for pool in node.worker._pool_names.values()}


async def test_requests_of_one_gateway_spread_evenly() -> None:
    async with fake_mesh("abcde") as mesh:
        await mesh.commit("ab cd e")
        asked = start(mesh, "a", 20)
        await tokens_came(mesh, "a", 1)
        assert spread(mesh, "a") == {"r0": 2, "r1": 2, "r2": 2}
        assert await asyncio.gather(*asked) == answers(20)


async def test_gateways_that_drive_a_replica_use_it() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("a b c")
        for name in "abc":
            assert await mesh.ask(name, PROMPT, 5) == answer_to(PROMPT, 5)
        assert [mesh.nodes[name].driver().steps_run for name in "abc"] == [5, 5, 5]


async def test_what_a_lost_node_breaks_goes_on_in_the_other_replica_without_a_new_plan() -> None:
    async with fake_mesh("abcde") as mesh:
        await mesh.commit("ab cd")
        asked = start(mesh, "e", 40)
        await tokens_came(mesh, "e", 5)
        n_broken = spread(mesh, "e")["r0"]
        mesh.kill("b")
        assert await asyncio.gather(*asked) == answers(40)
        assert (mesh.n_plans, mesh.n_recovered) == (1, n_broken)


async def test_what_a_refusing_stage_breaks_goes_on_elsewhere_and_new_requests_avoid_it() -> None:
    async with fake_mesh("abcde") as mesh:
        await mesh.commit("ab cd")
        asked = start(mesh, "e", 40)
        await tokens_came(mesh, "e", 5)
        n_broken = spread(mesh, "e")["r0"]
        worker = mesh.nodes["b"].worker
        worker.is_dead = True
        mesh.nodes["b"].stages.worker_died(cast(Any, worker), "it was killed")
        assert await asyncio.gather(*asked) == answers(40)
        assert mesh.n_recovered == n_broken
        for name in "abcde":
            assert await mesh.ask(name, PROMPT, 10) == answer_to(PROMPT, 10)
        assert mesh.n_recovered == n_broken, "a request was sent to a replica that is known to be broken"


async def test_what_fails_on_a_replica_that_is_not_broken_is_tried_on_another() -> None:
    async with fake_mesh("abcde") as mesh:
        await mesh.commit("ab cd")
        mesh.lose = lambda message: (
            isinstance(message, Generated)
            and message.answers[0].first == 4
            and message.answers[0].attempt == 1
        )
        assert await mesh.ask("a", PROMPT, 12) == answer_to(PROMPT, 12)
        assert mesh.n_recovered == 1
        assert mesh.nodes["c"].driver().steps_run > 0, "it went to the replica that its gateway drives again"


async def test_a_replica_that_stays_as_it_is_drains_although_memory_holds_no_second_pool() -> None:
    async with fake_mesh("abcde") as mesh:
        for node in mesh.nodes.values():
            node.worker.defers_pools = True
        await mesh.commit("ab cd")
        asked = start(mesh, "e", 60)
        await tokens_came(mesh, "e", 5)
        n_broken = spread(mesh, "e")["r0"]
        mesh.kill("b")
        await mesh.commit("a cd")  # as r1 again, in the epoch after
        assert mesh.nodes["c"].epochs.draining is not None
        more = [mesh.ask("e", prompt(index), 20, name=f"more{index}") for index in range(SEVERAL)]
        assert await asyncio.gather(*more) == answers(20)
        assert await asyncio.gather(*asked) == answers(60)
        assert mesh.n_recovered == n_broken
        await until(lambda: mesh.nodes["c"].epochs.draining is None)


async def test_a_replica_that_changes_gives_its_memory_up_and_leaves_the_other_alone() -> None:
    async with fake_mesh("abcde") as mesh:
        for node in mesh.nodes.values():
            node.worker.defers_pools = True
        await mesh.commit("ab cd")
        asked = start(mesh, "e", 60)
        await tokens_came(mesh, "e", 5)
        n_moved = spread(mesh, "e")["r0"]
        await mesh.commit("ba cd")
        assert await asyncio.gather(*asked) == answers(60)
        assert mesh.n_recovered == n_moved


async def test_two_plans_share_one_pool_without_sharing_blocks() -> None:
    """Both are short of blocks at times; each must wait for what the other has."""
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab", kv_blocks=24)
        old = start(mesh, "c", 40)
        await tokens_came(mesh, "c", 3)
        await mesh.commit("ab", kv_blocks=24)
        loop = asyncio.get_running_loop()
        new = [
            loop.create_task(mesh.ask("b", prompt(index), 40, name=f"n{index}")) for index in range(SEVERAL)
        ]
        assert await asyncio.gather(*old) == answers(40)
        assert await asyncio.gather(*new) == answers(40)
        driver = mesh.nodes["a"].driver()
        await until(lambda: driver.is_idle)
        assert driver.pool.n_available == 24


async def test_a_broken_replicas_memory_is_not_shared_with_the_next_plan() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        before = mesh.nodes["a"].driver()
        before.close("a stage was silent")
        await until(lambda: bool(mesh.nodes["b"].broken))
        pools = pools_of(mesh)
        await mesh.commit("ab")
        assert mesh.nodes["a"].driver().pool is not before.pool
        assert await mesh.ask("b", PROMPT, 20) == answer_to(PROMPT, 20)
        assert not pools & pools_of(mesh)


async def test_a_full_pool_of_the_plan_before_is_waited_for() -> None:
    """The old sequence ends with ten blocks of ten, the new one needs nine."""
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab", kv_blocks=10)

        async def plan_and_ask() -> None:
            await mesh.commit("ab", kv_blocks=10)
            assert await mesh.ask("a", PROMPT, 29) == answer_to(PROMPT, 29)

        assert await answer_while(mesh, "b", plan_and_ask) == answer_to(PROMPT, 30)
        assert mesh.n_recovered == 0
