"""Joining a mesh over real sockets: the way in, and every way in which it is refused."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon.peering.address import LOOPBACK, Address, bound_address, listen_tcp
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.trust import joining
from daemon.trust.admission import Admission, found_mesh
from daemon.trust.joining import Joiner, join_mesh
from daemon.trust.state import Membership, StateFolder
from hexmesh.errors import HexmeshError, InvalidInput, Lost, NotReady, Refused, TimedOut
from hexmesh.identity.certificates import read_member, verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.tokens import JoinToken, make_token, parse_token
from hexmesh.ids import NodeId, new_boot
from hexmesh.wire.data import GenerateCancel
from hexmesh.wire.peering import PROTOCOL_VERSION, JoinRequest, MemberAddress, ModelReference

PEER_ID = "12D3KooWFounder"
MODEL = ModelReference(name="glossary", model_id="ab" * 32, root="hexmesh-glossary")


@dataclass(slots=True)
class Clock:
    """A clock that a test may set wrong."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass(slots=True)
class Running:
    """A member whose network listens."""

    network: PeerNetwork
    admission: Admission
    state: StateFolder
    membership: Membership
    node_id: NodeId
    members: list[MemberAddress]
    requests: list[JoinRequest]
    received: asyncio.Queue[tuple[NodeId, object]]

    @property
    def address(self) -> Address:
        return self.network.address

    def token(self, *, ttl_s: float = 3600, uses: int = 1) -> JoinToken:
        return parse_token(self.admission.create_token(ttl_s=ttl_s, uses=uses).token)


@contextlib.asynccontextmanager
async def running(
    state: StateFolder, membership: Membership, name: str, clock: Clock | None = None
) -> AsyncIterator[Running]:
    """The member that a state folder holds, listening on a free port."""
    clock = clock or Clock()
    listener = listen_tcp(LOOPBACK, 0, flag="--peer-port")
    address = str(bound_address(listener))
    node_id = state.node_key().node_id
    members = [MemberAddress(node_id=node_id, name=name, address=address, dht_maddrs=["/ip4/127.0.0.1"])]
    admission = Admission(state, membership, node_id, address, lambda: members, clock=clock)
    local = LocalPeer(
        node_id=node_id,
        boot=new_boot(random.Random()),
        name=name,
        address=address,
        tls=state.tls_files(membership),
        clock=clock,
    )
    requests: list[JoinRequest] = []
    received: asyncio.Queue[tuple[NodeId, object]] = asyncio.Queue()

    async def admit(request: JoinRequest) -> object:
        requests.append(request)
        return await admission.admit(request)

    events = PeerEvents(
        on_message=lambda peer, message, payload: received.put_nowait((peer, message)),
        admit=admit,  # type: ignore[arg-type]
    )
    async with PeerNetwork(local, listener, events) as network:
        yield Running(network, admission, state, membership, node_id, members, requests, received)


@contextlib.asynccontextmanager
async def founder(folder: Path, clock: Clock | None = None) -> AsyncIterator[Running]:
    """A fresh mesh of one node."""
    with StateFolder(folder) as state:
        membership = found_mesh(state, state.node_key(), PEER_ID, MODEL, "float32", datetime.now(UTC))
        async with running(state, membership, "founder", clock) as node:
            yield node


def joiner(name: str = "joiner", **options: object) -> Joiner:
    return Joiner(
        **{"key": NodeKey.generate(), "dht_peer_id": "12D3KooWJoiner", "name": name, "address": "127.0.0.1:1"}
        | options  # type: ignore[arg-type]
    )


async def refusal(wish: Joiner, token: JoinToken, peer: Address | None = None) -> HexmeshError:
    """What joining fails with; it has to say what to do next."""
    with pytest.raises(HexmeshError) as caught:
        await join_mesh(wish, token, peer)
    assert caught.value.next_step
    return caught.value


async def test_a_joiner_becomes_a_member_that_others_accept(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        with StateFolder(tmp_path / "b") as state:
            wish = joiner(key=state.node_key(), model_id=MODEL.model_id)
            membership = await join_mesh(wish, a.token())
            state.save_membership(membership)
            identity = verify_member(membership.certificates, a.membership.root_der, datetime.now(UTC))
            async with running(state, membership, "joiner") as b:
                b.network.learn_address(a.node_id, a.address.host, a.address.port)
                b.network.send(a.node_id, GenerateCancel(sequence="hello", attempt=0))
                async with asyncio.timeout(10):
                    heard = await a.received.get()

    assert heard == (wish.key.node_id, GenerateCancel(sequence="hello", attempt=0))
    assert (identity.node_id, identity.dht_peer_id) == (wish.key.node_id, wish.dht_peer_id)
    assert (membership.mesh_id, membership.root_der) == (a.membership.mesh_id, a.membership.root_der)
    assert (membership.model, membership.dtype) == (MODEL, "float32")
    assert membership.members == a.members
    assert membership.dht_initial_peers == ["/ip4/127.0.0.1"]


async def test_the_join_command_says_it_all(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        issued = a.admission.create_token(ttl_s=60, uses=3)

    assert issued.join_command == f"hexmesh join --peer {a.address} --token {issued.token}"
    assert (issued.expires_s, issued.uses) == (60, 3)


async def test_a_token_is_good_for_its_uses_even_at_once(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token(uses=3)
        results = await asyncio.gather(
            *(join_mesh(joiner(f"j{i}"), token) for i in range(5)), return_exceptions=True
        )
        stored = a.state.ledger()

    assert sum(isinstance(result, Membership) for result in results) == 3
    assert [result.code for result in results if isinstance(result, Refused)] == ["token_spent"] * 2
    assert stored.records[0].uses_left == 0


async def test_a_spent_token(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        first = joiner("first")
        await join_mesh(first, token)
        again = await join_mesh(first, token)
        error = await refusal(joiner("second"), token)

    assert isinstance(error, Refused)
    assert (error.code, error.exit_code) == ("token_spent", 4)
    assert read_member(again.certificates[0]).node_id == first.key.node_id, "a lost answer"


async def test_a_spent_token_stays_spent_over_a_restart(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        await join_mesh(joiner("first"), token)
    with StateFolder(tmp_path / "a") as state:
        membership = state.membership()
        assert membership is not None
        async with running(state, membership, "founder") as back:
            error = await refusal(joiner("second"), token, back.address)

    assert error.code == "token_spent"


async def test_the_use_is_on_the_disk_before_the_certificate_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        monkeypatch.setattr(a.state, "save_ledger", _disk_full)
        error = await refusal(joiner(), token)
        monkeypatch.undo()
        membership = await join_mesh(joiner(), token)

    assert error.code == "state_not_written"
    assert membership.mesh_id == a.membership.mesh_id


def _disk_full(*_: object) -> None:
    raise HexmeshError("tokens.json cannot be written", code="state_not_written", next_step="free space")


async def test_an_expired_token(tmp_path: Path) -> None:
    clock = Clock()
    async with founder(tmp_path / "a", clock) as a:
        token = a.token(ttl_s=60)
        clock.ahead_s = 61
        error = await refusal(joiner(clock=clock), token)

    assert (error.code, error.exit_code) == ("token_expired", 4)
    assert "1 s ago" in error.message


async def test_an_unknown_token(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        wrong = make_token(token.address, token.root_sha256, a.node_id, b"x" * 20)
        error = await refusal(joiner(), wrong)

    assert (error.code, error.exit_code) == ("token_unknown", 4)


async def test_the_wrong_mesh_never_sees_the_secret(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a, founder(tmp_path / "other") as other:
        error = await refusal(joiner(), a.token(), other.address)

    assert (error.code, error.exit_code) == ("wrong_mesh", 4)
    assert str(other.address) in error.message
    assert other.requests == []


async def test_a_man_in_the_middle_never_sees_the_secret(tmp_path: Path) -> None:
    """It shows the right root certificate, and cannot prove to be under it."""
    async with founder(tmp_path / "a") as a:
        with StateFolder(tmp_path / "b") as state:
            false = found_mesh(state, state.node_key(), PEER_ID, MODEL, "float32", datetime.now(UTC))
            listener = listen_tcp(LOOPBACK, 0, flag="")
            tls = replace(state.tls_files(false), root_der=a.membership.root_der)
            local = LocalPeer(
                node_id=state.node_key().node_id,
                boot=1,
                name="m",
                address=str(bound_address(listener)),
                tls=tls,
            )
            requests: list[JoinRequest] = []

            async def steal(request: JoinRequest) -> object:
                requests.append(request)
                raise AssertionError("the joiner talked to someone in the middle")

            events = PeerEvents(on_message=lambda *_: None, admit=steal)  # type: ignore[arg-type]
            async with PeerNetwork(local, listener, events) as network:
                error = await refusal(joiner(), a.token(), network.address)

    assert (error.code, error.exit_code, requests) == ("wrong_mesh", 4, [])


async def test_another_member_refers_to_the_issuer_and_never_sees_the_secret(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        with StateFolder(tmp_path / "b") as state:
            membership = await join_mesh(joiner(key=state.node_key()), a.token())
            state.save_membership(membership)
            async with running(state, membership, "b") as b:
                token = a.token(uses=2)
                lost = await refusal(joiner(), token, b.address)
                b.members.extend(a.members)
                joined = await join_mesh(joiner(), token, b.address)
                with pytest.raises(NotReady, match="may not admit"):
                    b.admission.create_token(ttl_s=60, uses=1)

    assert (lost.code, lost.exit_code) == ("other_issuer", 4)
    assert a.node_id[:8] in lost.message
    assert "ask for a new token" in lost.next_step
    assert joined.mesh_id == a.membership.mesh_id
    assert [request.secret for request in b.requests] == [b"", b""]


async def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        error = await refusal(joiner(model_id="cd" * 32), token)
        await join_mesh(joiner(), token)  # the refused one took no use of the token

    assert (error.code, error.exit_code) == ("model_mismatch", 4)
    assert "glossary (abababab)" in error.message
    assert "cdcdcdcd" in error.message
    assert "--model" in error.next_step


async def test_another_protocol_is_refused_by_name(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        error = await refusal(joiner("newer", protocol_version=9), a.token())

    assert (error.code, error.exit_code) == ("protocol_mismatch", 4)
    assert "newer speaks protocol 9" in error.message
    assert f"this mesh speaks protocol {PROTOCOL_VERSION} (hexmesh 0.1.0)" in error.message


@pytest.mark.parametrize("ahead_s", [-4.0, 4.0, -86400.0, 86400.0 * 4000])
async def test_a_wrong_clock_is_refused_naming_both(tmp_path: Path, ahead_s: float) -> None:
    async with founder(tmp_path / "a") as a:
        error = await refusal(joiner(clock=Clock(ahead_s)), a.token())

    assert (error.code, error.exit_code) == ("clocks_differ", 4)
    assert error.message.count("UTC") == 2
    assert "NTP" in error.next_step


async def test_the_issuer_judges_the_clock_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "check_clocks", lambda *_: None)
    async with founder(tmp_path / "a") as a:
        error = await refusal(joiner(clock=Clock(-4)), a.token())

    assert error.code == "clocks_differ"
    assert "joiner has" in error.message


async def test_a_small_clock_difference_is_accepted(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        assert (await join_mesh(joiner(clock=Clock(-2)), a.token())).mesh_id == a.membership.mesh_id


async def test_nobody_listens_there(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        listener = listen_tcp(LOOPBACK, 0, flag="")
        address = bound_address(listener)
        listener.close()
        error = await refusal(joiner(), token, address)

    assert isinstance(error, Lost)
    assert (error.code, error.exit_code) == ("unreachable", 1)
    assert str(address) in error.message
    assert "Connection refused" in error.message
    assert "firewall" in error.next_step


async def test_a_name_that_is_unknown(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        error = await refusal(joiner(), a.token(), Address("no-such-host.invalid", 7701))

    assert (error.code, error.exit_code) == ("unreachable", 1)
    assert "no-such-host.invalid" in error.message


async def test_somebody_else_listens_there(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async with founder(tmp_path / "a") as a:
        server = await asyncio.start_server(answer, LOOPBACK, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            error = await refusal(joiner(), a.token(), Address(LOOPBACK, port))

    assert (error.code, error.exit_code) == ("not_hexmesh", 1)
    assert "7701" in error.next_step


async def test_somebody_silent_listens_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "TIMEOUT_S", 0.2)
    listener = listen_tcp(LOOPBACK, 0, flag="")
    address = bound_address(listener)
    token = make_token(str(address), bytes(32), NodeKey.generate().node_id, b"x" * 20)
    with listener:
        error = await refusal(joiner(), token)

    assert isinstance(error, TimedOut)
    assert error.exit_code == 1
    assert "did not answer" in error.message


async def test_a_bad_dht_peer_id_spends_nothing(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        token = a.token()
        with pytest.raises(Refused, match="not a libp2p peer id"):
            await join_mesh(joiner(dht_peer_id="not/a/peer"), token)
        stored = a.state.ledger()

    assert stored.records[0].uses_left == 1


async def test_a_node_that_admits_nobody(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "a") as state:
        membership = found_mesh(state, state.node_key(), PEER_ID, MODEL, "float32", datetime.now(UTC))
        async with running(state, membership, "a") as a:
            token = a.token()
        listener = listen_tcp(LOOPBACK, 0, flag="")
        local = LocalPeer(node_id=a.node_id, boot=1, name="a", address="", tls=state.tls_files(membership))
        async with PeerNetwork(local, listener, PeerEvents(on_message=lambda *_: None)) as network:
            with pytest.raises(Refused, match="does not admit"):
                await join_mesh(joiner(), token, network.address)


async def test_secrets_stay_out_of_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    async with founder(tmp_path / "a") as a:
        token = a.token()
        await join_mesh(joiner(), token)
        await refusal(joiner(), token)
        admin_key = a.state.admin_key()

    text = caplog.text
    assert "node admitted name=joiner" in text
    assert "join refused name=joiner code=token_spent" in text
    for secret in (repr(token.secret), token.secret.hex(), admin_key, "hm1_"):
        assert secret not in text


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 300])
def test_a_name_that_others_would_not_take(name: str) -> None:
    with pytest.raises(InvalidInput, match="printable"):
        joiner(name)


def test_a_port_in_use_is_named_with_its_flag() -> None:
    with listen_tcp(LOOPBACK, 0, flag="--peer-port") as listener:
        port = bound_address(listener).port
        with pytest.raises(HexmeshError, match=f"port {port} on 127.0.0.1 is in use") as error:
            listen_tcp(LOOPBACK, port, flag="--peer-port")

    assert error.value.exit_code == 1
    assert "--peer-port" in error.value.next_step


def test_a_foreign_listen_address_is_bad_input() -> None:
    with pytest.raises(InvalidInput, match=r"cannot listen on 192\.0\.2\.1") as error:
        listen_tcp("192.0.2.1", 0, flag="--peer-port")
    assert "--listen" in error.value.next_step


def test_ipv6_listens_where_the_host_has_it() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listener = listen_tcp("::1", 0, flag="--peer-port")
    except InvalidInput:
        pytest.skip("no IPv6 address")
    with listener:
        assert str(bound_address(listener)).startswith("[::1]:")
