"""A stand-in for a daemon's HTTP side that plays back recorded JSON, for tests of the command line.

It computes nothing: every answer is a constant of this file or was put in by the test. Run as a program it
takes the flags of `hexmesh join`, writes its ready file and admin key, and serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKYO_1, TOKYO_2, OSAKA_1 = "a1" * 20, "b2" * 20, "c3" * 20
ADMIN_KEY = "recorded-admin-key"

READY = {"ready": True, "blocker": None}
NOT_READY = {
    "ready": False,
    "blocker": {
        "code": "no_memory",
        "message": "the model needs 12.0 MiB and 8.0 MiB are free",
        "next_step": "let one more node join",
        "needed_bytes": 12582912,
        "room_bytes": 8388608,
    },
}
STATUS = {
    "node": TOKYO_1,
    "name": "tokyo-1",
    "mesh": "7f" * 20,
    "model": "hexmesh-small",
    "ready": True,
    "blocker": None,
    "coordinator": TOKYO_1,
    "plan_id": "3-1",
    "nodes_alive": 2,
    "requests_running": 1,
    "requests_waiting": 0,
    "kv_blocks": {"free": 30, "used": 2, "cached": 8, "leased": 0},
}


def _node(identifier: str, name: str, site: str) -> dict[str, Any]:
    device = {
        "index": 0,
        "kind": "cpu",
        "name": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        "budget_bytes": 8388608,
        "used_bytes": 6396314,
        "flops_per_s": 51.2e9,
        "bytes_per_s": 9.8e9,
    }
    capabilities = ["cpu"]
    return {
        "id": identifier,
        "name": name,
        "site": site,
        "state": "alive",
        "capabilities": capabilities,
        "devices": [device],
    }


def _stage(identifier: str, start: int, stop: int, free: int) -> dict[str, Any]:
    return {
        "node": identifier,
        "devices": [0],
        "layers": [start, stop],
        "tp": 1,
        "kv_blocks": 64,
        "kv_blocks_free": free,
    }


def _link(source: str, target: str, rtt_s: float, rate: float, in_use: bool) -> dict[str, Any]:
    return {
        "from": source,
        "to": target,
        "rtt_p50_s": rtt_s,
        "rtt_p95_s": rtt_s * 2,
        "bytes_per_s": rate,
        "lower_bound": False,
        "age_s": 12.0,
        "relayed": False,
        "in_use": in_use,
    }


TOPOLOGY = {
    "mesh_id": "7f" * 20,
    "model": "hexmesh-small",
    "plan_id": "3-1",
    "term": 3,
    "epoch": 1,
    "coordinator": TOKYO_1,
    "plan_reason": "node osaka-1 joined",
    "plan_age_s": 240.0,
    "nodes": [
        _node(TOKYO_1, "tokyo-1", "tokyo"),
        _node(TOKYO_2, "tokyo-2", "tokyo"),
        _node(OSAKA_1, "osaka-1", "osaka"),
    ],
    "replicas": [
        {
            "id": "r0",
            "role": "mixed",
            "stages": [_stage(TOKYO_1, 0, 4, 39), _stage(TOKYO_2, 4, 8, 40), _stage(OSAKA_1, 8, 12, 48)],
            "predicted_tokens_per_s": 31.0,
            "measured_tokens_per_s": 28.4,
            "requests_running": 7,
        }
    ],
    "flows": [],
    "links": [
        _link(TOKYO_1, TOKYO_2, 0.0003, 1.175e9, True),
        _link(TOKYO_2, OSAKA_1, 0.012, 62.5e6, True),
        _link(OSAKA_1, TOKYO_1, 0.012, 62.5e6, False),
    ],
    "bottleneck": {"kind": "stage", "id": f"r0/{OSAKA_1}", "utilisation": 0.82},
    "unused": [{"node": OSAKA_1, "device": 0, "reason": "2.0 MiB free is less than 2.4 MiB for one layer"}],
}
MEMBERS = [
    {
        "id": identifier,
        "name": name,
        "address": f"10.0.0.{index}:7701",
        "site": name[:5],
        "state": "alive",
        "roles": ["coordinator"] if index == 1 else [],
        "version": "0.1.0",
        "age_s": 65.0,
        "rtt_s": None if index == 1 else 0.0003,
    }
    for index, (identifier, name) in enumerate(
        ((TOKYO_1, "tokyo-1"), (TOKYO_2, "tokyo-2"), (OSAKA_1, "osaka-1")), 1
    )
]
REQUESTS = [
    {
        "id": "req-1",
        "state": "decoding",
        "replica": "r0",
        "stage": None,
        "role": "driver",
        "prompt_tokens": 12,
        "output_tokens": 30,
        "age_s": 1.5,
        "attempts": 1,
        "kv_handoff": None,
    }
]
PLAN = {
    "plan_id": "3-1",
    "epoch": 1,
    "reason": "node osaka-1 joined",
    "model": "hexmesh-small",
    "dtype": "float32",
    "devices": [
        {
            "node": TOKYO_1,
            "name": "tokyo-1",
            "device": 0,
            "layers": [0, 4],
            "needed_bytes": 6396314,
            "room_bytes": 8388608,
            "reason": "holds the embedding too, so one layer less",
        },
        {
            "node": OSAKA_1,
            "name": "osaka-1",
            "device": 0,
            "layers": None,
            "needed_bytes": 0,
            "room_bytes": 2097152,
            "reason": "2.0 MiB is less than 2.4 MiB for one layer",
        },
    ],
    "replicas": [],
    "predicted_tokens_per_s": 31.0,
    "predicted_batch": 8,
    "blocker": None,
    "explanation": ["three nodes: the model needs 18.3 MiB and no two have that"],
}
ISSUED = {
    "token": "hm1-recorded",
    "join_command": "hexmesh join --peer 10.0.0.1:7701 --token hm1-recorded",
    "expires_s": 3600.0,
    "uses": 1,
}
GENERATED = {
    "request_id": "r",
    "text": " world",
    "token_ids": [1, 2],
    "finish_reason": "stop",
    "usage": {"completion_tokens": 2},
}


def lines(*events: dict[str, Any]) -> bytes:
    """A streamed answer of /generate."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def server_sent(*pieces: str, finish: bool = True) -> bytes:
    """A streamed answer of /v1/chat/completions."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces
    ]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events = [json.dumps(chunk) for chunk in chunks] + (["[DONE]"] if finish else [])
    return b": keep-alive\n\n" + "".join(f"data: {event}\n\n" for event in events).encode()


@dataclass
class Recording:
    """What to answer by (method, path), and what was asked. A deque's last answer is played for ever."""

    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    asked: list[tuple[str, str, Any, str | None]] = field(default_factory=list)
    """(method, path, body, Authorization) of each request."""
    url: str = ""

    def answer(self, method: str, path: str) -> tuple[int, bytes]:
        recorded = self.answers.get(
            (method, path), (404, {"error": {"message": f"no route {method} {path}"}})
        )
        if isinstance(recorded, deque):
            recorded = recorded.popleft() if len(recorded) > 1 else recorded[0]
        status, body = recorded if isinstance(recorded, tuple) else (200, recorded)
        return status, body if isinstance(body, bytes) else json.dumps(body).encode()


def usual_answers() -> dict[tuple[str, str], Any]:
    """A healthy mesh."""
    return {
        ("GET", "/health"): {},
        ("GET", "/ready"): READY,
        ("GET", "/admin/status"): STATUS,
        ("GET", "/admin/topology"): TOPOLOGY,
        ("GET", "/admin/members"): MEMBERS,
        ("GET", "/admin/links"): TOPOLOGY["links"],
        ("GET", "/admin/requests"): REQUESTS,
        ("GET", "/admin/plan"): PLAN,
        ("GET", "/v1/models"): {"object": "list", "data": [{"id": "hexmesh-small"}]},
        ("POST", "/admin/token"): ISSUED,
        ("POST", "/admin/replan"): {},
        ("POST", "/admin/leave"): {},
        ("POST", "/generate"): GENERATED,
        ("POST", "/v1/chat/completions"): server_sent("A KV ", "cache."),
    }


@contextmanager
def recorded_daemon(answers: dict[tuple[str, str], Any] | None = None) -> Iterator[Recording]:
    """Serve a recording on a free port of loopback."""
    recording = Recording(usual_answers() | (answers or {}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _player(recording))
    recording.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield recording
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _player(recording: Recording) -> type[http.server.BaseHTTPRequestHandler]:
    class Player(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._play(None)

        def do_POST(self) -> None:
            self._play(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _play(self, body: Any) -> None:
            recording.asked.append((self.command, self.path, body, self.headers.get("Authorization")))
            status, answer = recording.answer(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Player


def serve_as_daemon(arguments: list[str]) -> int:
    """Be a daemon for `hexmesh demo`.

    RECORDED_DAEMON_FAILS names the node that ends with an error; with RECORDED_DAEMON_HANGS they have a
    worker each and never end by themselves.
    """
    parser = argparse.ArgumentParser()
    for flag in ("--name", "--state-dir", "--ready-file"):
        parser.add_argument(flag, required=True)
    flags, _ = parser.parse_known_args(arguments)
    if os.environ.get("RECORDED_DAEMON_FAILS") == flags.name:
        print("recorded: no room for the model", file=sys.stderr)
        return 3
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    if os.environ.get("RECORDED_DAEMON_HANGS"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    state = Path(flags.state_dir)
    state.mkdir()
    (state / "admin.key").write_text(ADMIN_KEY)
    ids = {"tokyo-1": TOKYO_1, "tokyo-2": TOKYO_2, "osaka-1": OSAKA_1}
    with recorded_daemon() as recording:
        up = {
            "node_id": ids[flags.name],
            "name": flags.name,
            "http_url": recording.url,
            "peer_addr": "127.0.0.1:7701",
        }
        up |= {"join_command": None, "token_expires_s": None}
        unfinished = Path(flags.ready_file + ".new")
        unfinished.write_text(json.dumps(up))
        unfinished.rename(flags.ready_file)
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(serve_as_daemon(sys.argv[2:]))
