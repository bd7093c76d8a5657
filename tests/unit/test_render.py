"""What people see: the whole text of each view, in 80 columns, without colours."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from daemon.terminal.render import (
    ASCII,
    glyphs_for,
    kv_free_share,
    print_on,
    topology_view,
    used_of,
)
from daemon.terminal.render_plan import plan_view
from daemon.terminal.render_tables import links_table, members_table, requests_table, status_view
from daemon.views import (
    Blocker,
    CertificateState,
    CertificateView,
    LinkView,
    MemberView,
    PlanView,
    RequestView,
    StatusView,
    TopologyView,
)
from tests.e2e import recorded_daemon as recorded

NAMES = {recorded.TOKYO_1: "tokyo-1", recorded.TOKYO_2: "tokyo-2"}

TOPOLOGY = """\
mesh 7f7f7f7f  model hexmesh-small  term 3  coordinator tokyo-1
plan 3-1, 4 m old: node osaka-1 joined

PIPELINE r0 mixed  predicted 31.0 tok/s  measured 28.4 tok/s  KV free 61%  run 7
  tokyo-1[0-3] ─300 us/9.4 Gbit/s→ tokyo-2[4-7] ─12.0 ms/500.0 Mbit/s→
  osaka-1[8-11]

SITE osaka
  osaka-1  alive
    cpu:0 Intel(R) Xeon(R) Platinum 8481C..  6.1/8.0 MiB  51.2 GFLOP/s  9.8 GB/s

SITE tokyo
  tokyo-1  alive  coordinator
    cpu:0 Intel(R) Xeon(R) Platinum 8481C..  6.1/8.0 MiB  51.2 GFLOP/s  9.8 GB/s
  tokyo-2  alive
    cpu:0 Intel(R) Xeon(R) Platinum 8481C..  6.1/8.0 MiB  51.2 GFLOP/s  9.8 GB/s

LINKS IN USE
  tokyo-1 → tokyo-2  300 us, 9.4 Gbit/s  p95 600 us  12.0 s ago
  tokyo-2 → osaka-1  12.0 ms, 500.0 Mbit/s  p95 24.0 ms  12.0 s ago

bottleneck stage r0/osaka-1, 82% busy
unused osaka-1 cpu:0: 2.0 MiB free is less than 2.4 MiB for one layer
"""
UNKNOWN = """\
mesh 7f7f7f7f  model hexmesh-small  term 0  coordinator none
no plan yet

SITE tokyo
  tokyo-1  joining
    cuda:0 NVIDIA H200                                       0 B/141.0 GiB  -  -
"""
DISAGGREGATED = """\
PIPELINE p0 prefill  predicted 5.0 tok/s
  tokyo-1[0-5 TP2] -here-> tokyo-1[6] --> dddddddd[7-11]

PIPELINE d0 decode  predicted 9.0 tok/s

  KV p0 -> d0  100% of requests
"""


def view(document: Any, kind: Any) -> Any:
    return msgspec.json.decode(json.dumps(document).encode(), type=kind)


def plain_text(shown: RenderableType, *, width: int = 80) -> str:
    """`shown` without colours, as a pipe would get it."""
    stream = io.StringIO()
    print_on(Console(file=stream, width=width, highlight=False, emoji=False, markup=False), shown)
    return stream.getvalue()


def test_topology_at_a_glance() -> None:
    assert plain_text(topology_view(view(recorded.TOPOLOGY, TopologyView))) == TOPOLOGY


def test_topology_of_which_nothing_is_known_yet() -> None:
    device = {"index": 0, "kind": "cuda", "name": "NVIDIA H200", "budget_bytes": 141 * 2**30, "used_bytes": 0}
    node = {
        "id": recorded.TOKYO_1,
        "name": "tokyo-1",
        "site": "tokyo",
        "state": "joining",
        "capabilities": [],
    }
    empty = recorded.TOPOLOGY | {
        **dict.fromkeys(("plan_id", "epoch", "coordinator", "plan_reason", "plan_age_s", "bottleneck")),
        **{name: [] for name in ("replicas", "links", "flows", "unused")},
        "term": 0,
        "nodes": [node | {"devices": [device | {"flops_per_s": None, "bytes_per_s": None}]}],
    }
    assert plain_text(topology_view(view(empty, TopologyView))) == UNKNOWN


def test_topology_in_ascii_with_roles_tensor_parallelism_and_an_unknown_node() -> None:
    def stage(node: str, start: int, stop: int, tp: int) -> dict[str, Any]:
        layers = [start, stop]
        return {
            "node": node,
            "devices": [0],
            "layers": layers,
            "tp": tp,
            "kv_blocks": 4,
            "kv_blocks_free": None,
        }

    stages = [stage(recorded.TOKYO_1, 0, 6, 2), stage(recorded.TOKYO_1, 6, 7, 1), stage("d" * 40, 7, 12, 1)]
    rates = {"measured_tokens_per_s": None, "role": "prefill"}
    document = recorded.TOPOLOGY | {
        "replicas": [
            rates | {"id": "p0", "stages": stages, "predicted_tokens_per_s": 5.0},
            rates | {"id": "d0", "role": "decode", "stages": [], "predicted_tokens_per_s": 9.0},
        ],
        "flows": [{"from": "p0", "to": "d0", "share": 1.0}],
    }
    text = plain_text(topology_view(view(document, TopologyView), glyphs=ASCII))
    assert text[text.index("PIPELINE") : text.index("\nSITE")] == DISAGGREGATED


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = plain_text(topology_view(view(recorded.TOPOLOGY, TopologyView), width=width), width=width)
    assert max(map(len, text.splitlines())) <= width


def test_an_output_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    assert glyphs_for(console) == ASCII
    print_on(console, "caf\u00e9")
    assert raw.getvalue() == b"caf?\n"


def test_colours_only_on_a_terminal() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, color_system="standard", width=80)
    print_on(console, topology_view(view(recorded.TOPOLOGY, TopologyView)))
    assert "\x1b[32malive" in terminal.getvalue()
    assert "\x1b" not in TOPOLOGY


def test_status() -> None:
    blocker = Blocker(code="no_memory", message="the model needs 12 MiB", next_step="let one more node join")
    status = msgspec.structs.replace(view(recorded.STATUS, StatusView), ready=False, blocker=blocker)
    assert plain_text(status_view(status, NAMES)) == (
        "node         tokyo-1 (a1a1a1a1)\n"
        "mesh         7f7f7f7f, 2 nodes alive\n"
        "model        hexmesh-small\n"
        "ready        no\n"
        "coordinator  tokyo-1\n"
        "plan         3-1\n"
        "requests     1 running, 0 waiting\n"
        "KV blocks    30 free, 2 used, 8 cached, 0 leased\n"
        "blocker      the model needs 12 MiB (no_memory)\n"
        "next step    let one more node join\n"
    )


@pytest.mark.parametrize(("n_whole", "said"), [(3, "3\n"), (2, "2 of 3 are whole\n")])
def test_status_of_several_replicas(n_whole: int, said: str) -> None:
    status = msgspec.structs.replace(view(recorded.STATUS, StatusView), replicas=3, replicas_whole=n_whole)
    assert f"replicas     {said}" in plain_text(status_view(status, NAMES))


def test_several_replicas_and_their_shares() -> None:
    (one,) = recorded.TOPOLOGY["replicas"]
    document = recorded.TOPOLOGY | {
        "replicas": [one, one | {"id": "r1", "is_whole": False}],
        "flows": [{"from": "r0", "to": "r0", "share": 0.75}, {"from": "r1", "to": "r1", "share": 0.25}],
    }
    lines = plain_text(topology_view(view(document, TopologyView))).splitlines()
    assert ["BROKEN  predicted" in line for line in lines if line.startswith("PIPELINE")] == [False, True]
    assert [line for line in lines if line.endswith("of requests")] == [
        "  r0  75% of requests",
        "  r1  25% of requests",
    ]


def test_the_plan_of_several_replicas_names_each_devices() -> None:
    devices = [device | {"replica": f"r{at}"} for at, device in enumerate(recorded.PLAN["devices"])]
    text = plain_text(plan_view(view(recorded.PLAN | {"devices": devices}, PlanView)))
    assert "NODE     DEVICE  REPLICA  LAYERS  " in text
    assert "tokyo-1  0       r0       0-3     " in text


def test_members_are_not_cut_in_a_narrow_terminal() -> None:
    assert plain_text(members_table(view(recorded.MEMBERS, list[MemberView])), width=60) == (
        "NAME     ID        ADDRESS        SITE   STATE  ROLES        AGE     RTT     VERSION\n"
        "tokyo-1  a1a1a1a1  10.0.0.1:7701  tokyo  alive  coordinator  65.0 s  -       0.1.0\n"
        "tokyo-2  b2b2b2b2  10.0.0.2:7701  tokyo  alive  -            65.0 s  300 us  0.1.0\n"
        "osaka-1  c3c3c3c3  10.0.0.3:7701  osaka  alive  -            65.0 s  300 us  0.1.0\n"
    )


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("valid", "valid for 23 h 0 m, then renewed"),
        ("grace", "not renewed: refused in 168 h 0 m; no issuer is reached"),
        ("expired", "expired"),
    ],
)
def test_certificates_that_should_have_been_renewed_are_seen(state: CertificateState, said: str) -> None:
    shown = CertificateView(state=state, expires_s=23 * 3600.0, refused_s=7 * 86400.0, issuer=None)
    status = msgspec.structs.replace(view(recorded.STATUS, StatusView), certificate=shown)
    assert f"certificate  {said}\n" in plain_text(status_view(status, NAMES))
    member = msgspec.structs.replace(view(recorded.MEMBERS, list[MemberView])[0], certificate=state)
    assert (f"alive, certificate: {state}" in plain_text(members_table([member]))) == (state != "valid")


def test_links() -> None:
    links: list[LinkView] = view(recorded.TOPOLOGY["links"], list[LinkView])
    links[1] = msgspec.structs.replace(links[1], lower_bound=True, relayed=True, rtt_p95_s=None)
    links[2] = msgspec.structs.replace(links[2], bytes_per_s=None, age_s=None)
    assert plain_text(links_table(links, NAMES)) == (
        "FROM      TO        RTT P50  RTT P95  RATE             PATH     AGE     USED\n"
        "tokyo-1   tokyo-2   300 us   600 us   9.4 Gbit/s       direct   12.0 s  yes\n"
        "tokyo-2   c3c3c3c3  12.0 ms  -        >= 500.0 Mbit/s  relayed  12.0 s  yes\n"
        "c3c3c3c3  tokyo-1   12.0 ms  24.0 ms  -                direct   -       -\n"
    )


def test_requests() -> None:
    assert plain_text(requests_table(view(recorded.REQUESTS, list[RequestView]))) == (
        "ID     STATE     REPLICA  STAGE  ROLE    PROMPT  OUTPUT  AGE    TRIES  KV HANDOFF\n"
        "req-1  decoding  r0       -      driver  12 tok  30 tok  1.5 s  1      -\n"
    )


def test_plan_explains_each_share() -> None:
    assert plain_text(plan_view(view(recorded.PLAN, PlanView))) == (
        "plan 3-1  model hexmesh-small in float32\n"
        "made because node osaka-1 joined\n"
        "predicted 31.0 tok/s with 8 sequences together\n"
        "\n"
        "NODE     DEVICE  LAYERS  NEEDS    HAS      FULL\n"
        "tokyo-1  0       0-3     6.1 MiB  8.0 MiB  76%\n"
        "osaka-1  0       -       0 B      2.0 MiB  0%\n"
        "\n"
        "tokyo-1 device 0: holds the embedding too, so one layer less\n"
        "osaka-1 device 0: 2.0 MiB is less than 2.4 MiB for one layer\n"
        "\n"
        "three nodes: the model needs 18.3 MiB and no two have that\n"
    )


def test_a_plan_that_fits_nowhere_says_what_is_missing() -> None:
    nothing = dict.fromkeys(
        ("plan_id", "epoch", "reason", "dtype", "predicted_tokens_per_s", "predicted_batch")
    )
    document = (
        recorded.PLAN | nothing | {"devices": [], "explanation": [], "blocker": recorded.NOT_READY["blocker"]}
    )
    assert plain_text(plan_view(view(document, PlanView))) == (
        "model hexmesh-small  no plan yet\n"
        "\n"
        "blocker the model needs 12.0 MiB and 8.0 MiB are free (no_memory)\n"
        "needs 12.0 MiB, has 8.0 MiB\n"
        "next step let one more node join\n"
    )


def test_the_fullest_stage_counts() -> None:
    replica = view(recorded.TOPOLOGY, TopologyView).replicas[0]
    assert kv_free_share(replica) == 39 / 64
    unknown = msgspec.structs.replace(replica.stages[0], kv_blocks_free=None)
    assert kv_free_share(msgspec.structs.replace(replica, stages=[unknown])) is None


def test_used_of_budget_names_a_unit_once() -> None:
    assert used_of(2**20, 8 * 2**20) == "1.0/8.0 MiB"
    assert used_of(512, 8 * 2**20) == "512 B/8.0 MiB"
