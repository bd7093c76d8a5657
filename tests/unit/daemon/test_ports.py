"""A node comes back on the ports it had, as long as nobody else took them."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.peering.address import LOOPBACK, bound_address, listen_tcp
from daemon.trust.ports import Ports, port_to_bind
from daemon.trust.state import StateFolder


def test_ports_survive_the_daemon_and_forgetting_the_mesh(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        assert state.ports() == Ports()
        state.save_ports(Ports(peer=1001, http=1002, dht=1003))
        state.forget()
    with StateFolder(tmp_path) as state:
        assert state.ports() == Ports(peer=1001, http=1002, dht=1003)


def test_a_port_that_is_asked_for_is_taken_whatever_was_before() -> None:
    assert port_to_bind(LOOPBACK, 7701, 5000, flag="--peer-port") == 7701


def test_any_port_means_the_one_from_before() -> None:
    with listen_tcp(LOOPBACK, 0, flag="") as free_again:
        before = bound_address(free_again).port
    assert port_to_bind(LOOPBACK, 0, before, flag="--peer-port") == before
    assert port_to_bind(LOOPBACK, 0, 0, flag="--peer-port") == 0


def test_a_port_that_somebody_else_has_is_given_up_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    with listen_tcp(LOOPBACK, 0, flag="") as taken:
        before = bound_address(taken).port
        assert port_to_bind(LOOPBACK, 0, before, flag="--http-port") == 0
    assert f"port {before}, used before, is taken now: --http-port gets another" in caplog.text
