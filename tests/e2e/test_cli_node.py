"""`hexmesh node` as a person sees it: progress, the last word and the exit code. The daemon is a recording."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import pytest

from daemon.verbs import node_orders
from tests.e2e import recorded_daemon as recorded
from tests.e2e.recorded_daemon import Recording
from tests.e2e.test_cli import Hexmesh, _own_surroundings, daemon, failing, hexmesh

__all__ = ["_own_surroundings", "daemon", "hexmesh"]

SHOW = ("GET", "/admin/node?node=id-two")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_orders, "_POLL_S", 0.001)


def standing(**changes: Any) -> dict[str, Any]:
    return {
        "id": "id-two",
        "name": "two",
        "availability": "drained",
        "stages": 0,
        "requests_left": 0,
        "drain_left_s": None,
        "blocker": None,
    } | changes


def test_a_drain_is_followed_to_its_end(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers[("POST", "/admin/node/drain")] = standing(stages=2)
    daemon.answers[SHOW] = deque(
        [
            standing(stages=2),
            standing(requests_left=3, drain_left_s=29.6),
            standing(requests_left=3, drain_left_s=29.1),
            standing(requests_left=1, drain_left_s=27.4),
            standing(),
        ]
    )
    code, out, err = hexmesh("node", "drain", "two", "--deadline", "40s")
    assert (code, out) == (0, "two is drained: it holds no stage and no request\n")
    assert err.splitlines() == [
        "moving 2 stages away: the mesh makes and loads a plan without them",
        "3 requests left, 30 s",
        "1 request left, 27 s",
    ]
    assert daemon.asked[0] == (
        "POST",
        "/admin/node/drain",
        {"node": "two", "deadline_s": 40.0},
        f"Bearer {recorded.ADMIN_KEY}",
    )


def test_a_drain_that_takes_too_long_says_what_it_waits_for(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers[("POST", "/admin/node/drain")] = standing(stages=1)
    daemon.answers[SHOW] = standing(stages=1, blocker="the model needs 3 GiB")
    code, out, err = hexmesh("node", "drain", "two", "--deadline", "20ms")
    assert (code, out) == (3, "")
    last = err.splitlines()[-1]
    assert "two still holds 1 stage after 0.02 s: the model needs 3 GiB; the drain goes on" in last
    assert "hexmesh node uncordon" in last


def test_a_drain_that_another_operator_takes_back_is_no_success(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers[("POST", "/admin/node/drain")] = standing(stages=1)
    daemon.answers[SHOW] = standing(stages=1, availability="active")
    code, _, err = hexmesh("node", "drain", "two")
    assert code == 1
    assert "two is active now" in err


def test_a_drain_without_room_is_refused(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers[("POST", "/admin/node/drain")] = failing(409, "no room: 3 GiB needed, 2 GiB there")
    assert hexmesh("node", "drain", "two") == (4, "", "hexmesh: no room: 3 GiB needed, 2 GiB there\n")


def test_cordon_and_uncordon_say_what_follows(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers[("POST", "/admin/node/cordon")] = standing(availability="cordoned", stages=1)
    daemon.answers[("POST", "/admin/node/uncordon")] = standing(availability="active")
    assert hexmesh("node", "cordon", "two") == (
        0,
        "two is cordoned; it keeps 1 stage until the next plan\n",
        "",
    )
    assert hexmesh("node", "uncordon", "two") == (0, "two may be used again\n", "")
    code, out, _ = hexmesh("node", "uncordon", "two", "-o", "json")
    assert (code, json.loads(out)) == (0, standing(availability="active"))
