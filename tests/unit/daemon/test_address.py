"""Addresses: text in and out, and the address by which this host is reached."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.peering import address
from daemon.peering.address import (
    Address,
    default_listen_host,
    is_loopback,
    listen_tcp,
    parse_address,
)
from hexmesh.errors import InvalidInput

hosts = st.one_of(
    st.ip_addresses().map(str),
    st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True),
)


@given(hosts, st.integers(1, 65535))
def test_text_round_trip(host: str, port: int) -> None:
    assert parse_address(str(Address(host, port))) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":7701",
        "host:0",
        "host:65536",
        "host:x",
        "::1:7701",
        "[::1]",
        "[host]:1",
        "a b:1",
        "h:٣",
    ],
)
def test_nonsense(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not an address") as error:
        parse_address(text)
    assert "HOST:PORT" in error.value.next_step


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        found = parse_address(text)
    except InvalidInput:
        return
    assert parse_address(str(found)) == found


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert (is_loopback(host), Address(host, 1).is_loopback) == (expected, expected)


def test_the_default_address_can_be_listened_on() -> None:
    host = default_listen_host()
    with listen_tcp(host, 0, flag="--peer-port") as listener:
        assert listener.getsockname()[0] == host


class _NoRoute(socket.socket):
    def connect(self, where: object) -> None:
        raise OSError(101, "Network is unreachable")


def test_a_host_without_a_network_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address.socket, "socket", _NoRoute)

    assert default_listen_host() == "127.0.0.1"
