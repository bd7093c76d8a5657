"""Trust over days, in milliseconds: several nodes' desks with a clock that tests set and messages by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from daemon.trust import appointments, desk, renewal
from daemon.trust.admission import found_mesh
from daemon.trust.attestor import Attestor
from daemon.trust.desk import TrustDesk
from daemon.trust.rejoining import still_member
from daemon.trust.state import Membership, StateFolder
from hexmesh.errors import InvalidInput, NotReady, Refused
from hexmesh.identity.authority import request_certificate
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import Revocations
from hexmesh.identity.tokens import parse_token
from hexmesh.ids import NodeId
from hexmesh.wire.peering import (
    PROTOCOL_VERSION,
    JoinAccepted,
    JoinRefused,
    JoinRequest,
    MemberAddress,
    ModelReference,
)
from hexmesh.wire.trust import Renew, RenewRefused, TrustMessage

START = datetime(2026, 5, 1, 12, tzinfo=UTC)
MODEL = ModelReference(name="m", model_id="ab" * 32, root="m")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@dataclass
class Clock:
    now: datetime = START

    def __call__(self) -> datetime:
        return self.now


@dataclass(eq=False)
class Node:
    """One node: its desk and what the desk asked of it."""

    name: str
    world: World
    state: StateFolder
    is_up: bool = True
    removed: set[NodeId] = field(default_factory=set)
    cast_out_for: list[Refused] = field(default_factory=list)

    def start(self) -> None:
        """The daemon starts on its state folder."""
        stored = self.state.membership()
        assert stored is not None
        membership = still_member(self.state, stored, self.state.node_key(), self.world.clock())
        known = Revocations(membership.root_der, self.state.revocations())
        self.attestor = Attestor(
            self.state.node_key(),
            tuple(membership.certificates),
            membership.root_der,
            now=self.world.clock,
            is_refused=lambda member: known.grounds(member) is not None,
        )
        member = SimpleNamespace(
            state=self.state,
            revocations=known,
            membership=membership,
            attestor=self.attestor,
            node_id=self.id,
            address=f"{self.name}:7701",
        )
        self.desk = TrustDesk(cast(Any, member), self, now=self.world.clock)

    @property
    def id(self) -> NodeId:
        return self.state.node_key().node_id

    # --- the mesh around the desk ---

    def send_trust(self, node: NodeId, message: TrustMessage) -> None:
        self.world.deliver(self, node, message)

    def nodes_up(self) -> list[NodeId]:
        return [other.id for other in self.world.reached_by(self)]

    def member_addresses(self) -> list[MemberAddress]:
        return [
            MemberAddress(node_id=one.id, name=one.name, address=f"{one.name}:7701")
            for one in (self, *self.world.reached_by(self))
        ]

    def identity_of(self, node: str) -> MemberIdentity | None:
        for other in (self, *self.world.reached_by(self)):
            if other.id == node:
                return other.attestor.identity
        return None

    def on_certificate_renewed(self) -> None: ...

    def on_nodes_removed(self, nodes: frozenset[NodeId]) -> None:
        self.removed |= nodes

    def review_connections(self) -> None: ...

    def cast_out(self, reason: Refused) -> None:
        self.cast_out_for.append(reason)
        self.is_up = False


@dataclass
class World:
    """Nodes, who reaches whom, and the time."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    nodes: list[Node] = field(default_factory=list)
    cut: set[frozenset[str]] = field(default_factory=set)

    def reached_by(self, node: Node) -> list[Node]:
        return [other for other in self.nodes if other is not node and self.is_open(node, other)]

    def is_open(self, one: Node, other: Node) -> bool:
        """Both run, nothing lies between them, and neither refuses the other."""
        if not (one.is_up and other.is_up) or frozenset((one.name, other.name)) in self.cut:
            return False
        return (
            one.desk.removals.judge(other.attestor.identity) is None
            and other.desk.removals.judge(one.attestor.identity) is None
        )

    def deliver(self, src: Node, to: NodeId, message: TrustMessage) -> None:
        for node in self.nodes:
            if node.id == to and (node is src or self.is_open(src, node)):
                asyncio.get_running_loop().call_soon(node.desk.receive, src.id, message)

    def split(self, left: str, right: str) -> None:
        self.cut |= {frozenset((a, b)) for a in left for b in right}

    def heal(self) -> None:
        """Everybody meets everybody anew."""
        self.cut.clear()
        for node in self.nodes:
            for other in self.reached_by(node):
                node.desk.peer_up(other.id)

    def node(self, name: str) -> Node:
        return next(one for one in self.nodes if one.name == name)


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """The desks' own loops run."""
    tasks = [asyncio.create_task(node.desk.run()) for node in nodes]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops look often, so that a test that moves the clock does not wait."""
    monkeypatch.setattr(appointments, "LOOK_S", 0.002)
    monkeypatch.setattr(desk, "REVIEW_S", 0.002)
    monkeypatch.setattr(renewal, "LONGEST_PAUSE_S", 0.002)
    monkeypatch.setattr(renewal, "_SHORTEST_PAUSE_S", 0.001)
    monkeypatch.setattr(renewal, "ANSWER_S", 0.05)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A mesh of one founder, `a`."""
    with ExitStack() as stack:
        made = World(tmp_path)
        state = stack.enter_context(StateFolder(tmp_path / "a"))
        founder = Node(
            "a", made, state, found_mesh(state, state.node_key(), "12D3a", MODEL, "float32", START)
        )
        founder.start()
        made.nodes.append(founder)
        yield made


def request_to_join(
    world: World, issuer: NodeId, secret: bytes, key: NodeKey, name: str = "x"
) -> JoinRequest:
    return JoinRequest(
        protocol_version=PROTOCOL_VERSION,
        hexmesh_version="x",
        issuer=issuer,
        secret=secret,
        csr=request_certificate(key),
        dht_peer_id=f"12D3{name}",
        name=name,
        clock_unix_s=world.clock().timestamp(),
    )


async def ask_to_join(world: World, by: Node, key: NodeKey, name: str) -> JoinAccepted | JoinRefused:
    """A stranger with a token of `by` asks it."""
    token = parse_token(by.desk.admission.create_token(ttl_s=60, uses=1).token)
    return await by.desk.admit(request_to_join(world, by.id, token.secret, key, name))


async def join(world: World, name: str, by: str = "a") -> Node:
    state = StateFolder(world.folder / name).__enter__()
    answer = await ask_to_join(world, world.node(by), state.node_key(), name)
    assert isinstance(answer, JoinAccepted), answer
    membership = Membership(
        mesh_id=answer.mesh_id,
        root_der=answer.root,
        certificates=answer.certificates,
        model=MODEL,
        dtype="float32",
    )
    state.save_membership(membership)
    node = Node(name, world, state)
    node.start()
    world.nodes.append(node)
    return node


async def grow(world: World, names: str, stack: AsyncExitStack) -> list[Node]:
    """The mesh with these nodes, one after the other; their desks run."""
    await stack.enter_async_context(running(*world.nodes))
    nodes = []
    for name in names:
        node = await join(world, name)
        await stack.enter_async_context(running(node))
        if len(world.nodes) <= 3:
            await until(lambda node=node: node.attestor.identity.is_issuer)  # type: ignore[misc]
        nodes.append(node)
    return nodes


def issued_by(node: Node) -> NodeId | None:
    return node.attestor.identity.issuer_id


async def test_the_first_three_become_issuers_and_admit(world: World) -> None:
    async with AsyncExitStack() as stack:
        b, c, d = await grow(world, "bcd", stack)
        e = await join(world, "e", by="c")
        await asyncio.sleep(0.02)  # four appointments' worth of looks: none may be made

        assert [issued_by(node) for node in (b, c)] == [b.id, c.id]
        assert issued_by(d) == world.node("a").id
        assert issued_by(e) == c.id
        with pytest.raises(NotReady, match="no issuer") as refusal:
            d.desk.admission.create_token(ttl_s=1, uses=1)
        assert f"node b ({b.id[:8]})" in refusal.value.next_step


async def test_a_token_is_redeemed_by_the_issuer_that_minted_it_alone(world: World) -> None:
    async with AsyncExitStack() as stack:
        b, c = await grow(world, "bc", stack)
        token = parse_token(b.desk.admission.create_token(ttl_s=60, uses=1).token)
        key = NodeKey.generate()
        referred = await c.desk.admit(request_to_join(world, b.id, b"", key))
        claimed = await c.desk.admit(request_to_join(world, c.id, token.secret, key))
        b.is_up = False
        orphaned = await c.desk.admit(request_to_join(world, b.id, b"", key))

    assert isinstance(referred, JoinRefused)
    assert (referred.code, referred.issuer_address) == ("other_issuer", "b:7701")
    assert isinstance(claimed, JoinRefused)
    assert claimed.code == "token_unknown"
    assert isinstance(orphaned, JoinRefused)
    assert (orphaned.code, orphaned.issuer_address) == ("other_issuer", "")
    a = world.node("a")
    assert orphaned.next_step.endswith(
        f"`hexmesh token create` on node c ({c.id[:8]}) or node a ({a.id[:8]})"
    )


async def test_tokens_are_listed_without_secrets_and_can_be_revoked(world: World) -> None:
    a = world.node("a")
    first = parse_token(a.desk.admission.create_token(ttl_s=60, uses=3).token)
    a.desk.admission.create_token(ttl_s=600, uses=1)
    key = NodeKey.generate()
    await a.desk.admit(request_to_join(world, a.id, first.secret, key))
    listed = a.desk.admission.tokens()

    assert [(one.uses, one.uses_left, one.expires_s, one.issuer) for one in listed] == [
        (3, 2, 60, a.id),
        (1, 1, 600, a.id),
    ]
    assert listed[0].redeemed_by == [key.node_id]
    assert first.secret.hex() not in str(listed)
    a.desk.admission.revoke_token(listed[0].id)
    a.start()
    refused = await a.desk.admit(request_to_join(world, a.id, first.secret, NodeKey.generate()))
    assert isinstance(refused, JoinRefused)
    assert refused.message == "the token was revoked"
    assert [one.id for one in a.desk.admission.tokens()] == [listed[1].id]
    with pytest.raises(InvalidInput, match="no token"):
        a.desk.admission.revoke_token("ab12")


async def test_an_issuer_keeps_its_right_over_a_restart(world: World) -> None:
    async with AsyncExitStack() as stack:
        b, _ = await grow(world, "bc", stack)
    world.clock.now += timedelta(days=400)
    b.start()

    assert b.desk.admission.may_admit
    assert b.attestor.identity.validity.standing(world.clock()) == "fresh"


async def test_the_root_key_may_be_taken_away_and_brought_back(world: World) -> None:
    a = world.node("a")
    offline = world.folder / "offline"
    (a.state.path / "authority.key").rename(offline)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(a))
        b = await join(world, "b")
        await stack.enter_async_context(running(b))
        await asyncio.sleep(0.02)  # ten looks without the key
        assert issued_by(b) == a.id
        offline.rename(a.state.path / "authority.key")
        await until(lambda: b.attestor.identity.is_issuer)


async def test_certificates_are_renewed_at_half_life_for_as_long_as_you_like(world: World) -> None:
    async with AsyncExitStack() as stack:
        nodes = [world.node("a"), *await grow(world, "bcd", stack)]
        for _ in range(6):
            before = [node.attestor.identity.not_after for node in nodes]
            world.clock.now += 12 * HOUR + timedelta(seconds=1)
            await until(
                lambda before=before: all(  # type: ignore[misc]
                    node.attestor.identity.not_after > old for node, old in zip(nodes, before, strict=True)
                )
            )
        stored = nodes[3].state.membership()

    assert stored is not None
    assert tuple(stored.certificates) == nodes[3].attestor.chain
    assert all(node.cast_out_for == [] for node in nodes)


async def test_without_an_issuer_there_is_a_week_of_grace_said_aloud(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def n_said(what: str) -> int:
        return sum(what in record.getMessage() for record in caplog.records)

    async with AsyncExitStack() as stack:
        a, b, c, d, e = [world.node("a"), *await grow(world, "bcde", stack)]
        for issuer in (a, b, c):
            issuer.is_up = False
        world.clock.now += DAY - timedelta(minutes=1)
        await asyncio.sleep(0.02)
        assert n_said("no issuer renews it") == 0
        world.clock.now += 2 * timedelta(minutes=1)
        await until(lambda: n_said("no issuer renews it") == 2)
        await until(lambda: n_said("certificate in grace node=") == 2)
        assert e.desk.certificate().state == e.desk.certificate_state(d.id) == "grace"
        assert e.desk.judge(d.attestor.identity) is None
        world.clock.now += HOUR
        await until(lambda: n_said("no issuer renews it") == 4)

        world.clock.now = START + 8 * DAY + timedelta(minutes=1)
        await until(lambda: bool(d.cast_out_for) and bool(e.cast_out_for))
        refusal = e.desk.judge(d.attestor.identity)
        assert refusal is not None
        assert (refusal.code, d.cast_out_for[0].code) == ("certificate_expired", "certificate_expired")
        assert (d.cast_out_for[0].exit_code, "new token" in d.cast_out_for[0].next_step) == (4, True)


async def test_a_certificate_in_grace_is_renewed_once_an_issuer_is_back(world: World) -> None:
    async with AsyncExitStack() as stack:
        b, c, d = await grow(world, "bcd", stack)
        a = world.node("a")
        for issuer in (a, b, c):
            issuer.is_up = False
        world.clock.now += 5 * DAY
        await until(lambda: d.desk.certificate().state == "grace")
        b.is_up = True
        await until(lambda: d.desk.certificate().state == "valid")
        assert issued_by(d) == b.id


async def test_a_restart_after_the_grace_needs_a_token(world: World) -> None:
    async with AsyncExitStack() as stack:
        *_, d = await grow(world, "bcd", stack)
    world.clock.now += 9 * DAY
    with pytest.raises(Refused, match="expired at") as refusal:
        d.start()
    assert "new token" in refusal.value.next_step


async def test_nobody_renews_another_s_certificate(world: World) -> None:
    async with AsyncExitStack() as stack:
        b, c, d = await grow(world, "bcd", stack)
        answer = b.desk._answer(d.id, Renew(chain=c.attestor.chain))
        assert isinstance(answer, RenewRefused)
        assert isinstance(d.desk._answer(c.id, Renew(chain=c.attestor.chain)), RenewRefused)


async def test_a_removal_reaches_everybody_and_is_kept(world: World) -> None:
    async with AsyncExitStack() as stack:
        a, b, c, d, e = [world.node("a"), *await grow(world, "bcde", stack)]
        removed = await b.desk.remove("d")
        assert (removed.id, removed.name) == (d.id, "d")
        await until(lambda: all(d.id in node.removed for node in (a, b, c, e)))
        await until(lambda: all(node.state.revocations() != [] for node in (a, c, e)))
        refusal = e.desk.judge(d.attestor.identity)
        assert refusal is not None
        d.desk.removals.learn(refusal.proof)
        assert [reason.code for reason in d.cast_out_for] == ["removed"]
        answer = await ask_to_join(world, c, d.state.node_key(), "d")
        assert isinstance(answer, JoinRefused)
        assert answer.code == "removed"
        assert answer.next_step
        await d.desk.close()
    e.start()
    assert d.id in e.desk.removals.revoked
    with pytest.raises(Refused, match="was removed"):
        d.start()


async def test_a_removal_is_heard_on_the_first_contact_after_a_partition(world: World) -> None:
    async with AsyncExitStack() as stack:
        a, _, c, d, e = [world.node("a"), *await grow(world, "bcde", stack)]
        world.split("abc", "de")
        await a.desk.remove(d.id)
        await until(lambda: d.id in c.removed)
        assert d.id not in e.removed
        assert e.desk.judge(d.attestor.identity) is None
        world.heal()
        await until(lambda: d.id in e.removed)


async def test_an_issuer_that_is_removed_takes_nobody_with_it(world: World) -> None:
    """Members that it certified renew elsewhere at once; ghosts that it certifies afterwards are refused."""
    async with AsyncExitStack() as stack:
        a, b, _c, d = [world.node("a"), *await grow(world, "bcd", stack)]
        e = await join(world, "e", by="b")
        await stack.enter_async_context(running(e))
        ghost = NodeKey.generate()
        await a.desk.remove("b")
        await until(lambda: issued_by(e) not in (b.id, None))
        assert e.cast_out_for == []
        await until(lambda: any(node.attestor.identity.is_issuer for node in (d, e)))

        assert b.desk.credentials.issuer is not None
        chain = [
            b.desk.credentials.issuer.issue(request_certificate(ghost), "12D3ghost", world.clock()),
            *b.desk.credentials.issuer.chain,
        ]
        refusal = e.desk.judge(e.attestor.identify(tuple(chain)))
        assert refusal is not None
        assert refusal.code == "issuer_removed"


async def test_who_may_remove_whom(world: World) -> None:
    async with AsyncExitStack() as stack:
        b, _, d = await grow(world, "bcd", stack)
        with pytest.raises(InvalidInput, match="does not remove itself"):
            await b.desk.remove("b")
        with pytest.raises(NotReady, match="no issuer") as refusal:
            await d.desk.remove("b")
        assert "run `hexmesh node remove` on a or b or c" in refusal.value.next_step
        for unknown in ("x", "", d.id[:5]):
            with pytest.raises(InvalidInput, match="is known here"):
                await b.desk.remove(unknown)
        gone = NodeKey.generate().node_id
        assert (await b.desk.remove(gone)).id == gone
        with pytest.raises(InvalidInput, match="removed already"):
            await b.desk.remove(gone)


async def test_what_a_removed_issuer_had_revoked_stays_revoked(world: World) -> None:
    async with AsyncExitStack() as stack:
        a, b, c, d = [world.node("a"), *await grow(world, "bcd", stack)]
        await b.desk.remove("d")
        await until(lambda: d.id in a.removed)
        await a.desk.remove("b")
        await until(lambda: b.id in c.removed)
        assert c.desk.removals.revoked == {b.id, d.id}
        b.desk.removals.learn(c.desk.removals.judge(b.attestor.identity).proof)  # type: ignore[union-attr]
        await b.desk.close()
    with pytest.raises(Refused, match="was removed"):  # it could renew its own certificate
        b.start()
