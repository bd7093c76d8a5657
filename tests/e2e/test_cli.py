"""The command line as a process would see it: output, exit codes, and one line for each failure.

The other side is `recorded_daemon`, which plays back recorded JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon.cli import main
from daemon.runfile import Run, local_http_url, read_run, remove_run, write_run
from daemon.terminal.logs import JsonLines, TextLines
from daemon.verbs.join import find_foreseen, tell_up
from daemon.views import PlanningView, UpLine
from hexmesh.cluster import Cluster, Device, Node
from hexmesh.errors import HexmeshError, NotReady, Refused
from hexmesh.model_spec import model_spec_from_config
from hexmesh.model_spec.known import KNOWN
from hexmesh.workload import Workload
from tests.e2e import recorded_daemon as recorded
from tests.e2e.recorded_daemon import Recording, lines, recorded_daemon, server_sent

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "hivemind", "aiohttp", "transformers", "pydantic", "numpy", "uvloop"}

Hexmesh = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("HEXMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HEXMESH_CONFIG", os.devnull)
    monkeypatch.setenv("HEXMESH_STATE_DIR", str(tmp_path))
    (tmp_path / "admin.key").write_text(recorded.ADMIN_KEY + "\n")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Recording]:
    """A daemon that the command line finds by its state folder."""
    with recorded_daemon() as recording:
        write_run(tmp_path, Run(os.getpid(), recording.url))
        yield recording


@pytest.fixture
def hexmesh(capsys: pytest.CaptureFixture[str]) -> Hexmesh:
    """Run a command line; gives (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def failing(status: int, message: str, *, code: str = "some_code") -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "t", "param": None, "code": code}}


# ---------------------------------------------------------------- read verbs


@pytest.mark.parametrize("verb", ["status", "members", "links", "topology", "requests", "plan"])
def test_read_verbs_pass_the_json_through_and_render_it(
    verb: str, daemon: Recording, hexmesh: Hexmesh
) -> None:
    code, out, err = hexmesh(verb, "-o", "json")
    assert (code, err) == (0, "")
    assert json.loads(out) == daemon.answers["GET", f"/admin/{verb}"]
    assert daemon.asked == [("GET", f"/admin/{verb}", None, f"Bearer {recorded.ADMIN_KEY}")]
    code, out, err = hexmesh(verb)
    assert (code, err) == (0, "")
    assert "tokyo-1" in out or verb == "requests"
    assert "\x1b" not in out


def test_links_are_shown_without_names_when_the_members_are_not_to_be_had(
    daemon: Recording, hexmesh: Hexmesh
) -> None:
    daemon.answers["GET", "/admin/members"] = failing(500, "broken")
    code, out, _ = hexmesh("links")
    assert code == 0
    assert "a1a1a1a1" in out


def test_status_of_a_mesh_that_is_not_ready_is_shown_and_exits_3(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["GET", "/admin/status"] = recorded.STATUS | recorded.NOT_READY
    code, out, err = hexmesh("status")
    assert (code, err) == (3, "")
    assert "the model needs 12.0 MiB and 8.0 MiB are free" in out
    assert hexmesh("status", "-o", "json")[0] == 3


def test_the_url_may_be_given_and_no_daemon_there_exits_1(daemon: Recording, hexmesh: Hexmesh) -> None:
    assert hexmesh("status", "--url", daemon.url + "/")[0] == 0
    next_step = "start one with `hexmesh join`, or name another with --url"
    expected = f"hexmesh: no daemon answers at http://127.0.0.1:9; {next_step}\n"
    assert hexmesh("status", "--url", "127.0.0.1:9") == (1, "", expected)
    assert hexmesh("status", "--url", "ftp://x")[0] == 2


def test_without_a_run_file_the_default_address_is_asked(
    hexmesh: Hexmesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_run(tmp_path, Run(2**22 + 1, "http://127.0.0.1:8"))  # a pid that no Linux gives out by default
    monkeypatch.setattr("daemon.terminal.client.HTTP_PORT", 9)
    code, _, err = hexmesh("members")
    assert code == 1
    assert "no daemon answers at http://127.0.0.1:9;" in err


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, 2), (401, 4), (403, 4), (404, 1), (429, 3), (500, 1), (502, 1), (503, 3), (504, 1)],
)
def test_a_failure_is_one_line_and_its_status_sets_the_exit_code(
    status: int, expected: int, daemon: Recording, hexmesh: Hexmesh
) -> None:
    daemon.answers["GET", "/admin/plan"] = failing(status, "the reason; the next step")
    assert hexmesh("plan") == (expected, "", "hexmesh: the reason; the next step\n")


def test_something_else_than_a_hexmesh_daemon_is_recognised(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["GET", "/admin/plan"] = b"<html>"
    code, out, err = hexmesh("plan")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "answered something unexpected" in err
    daemon.answers["GET", "/admin/topology"] = {"mesh_id": 3}
    assert hexmesh("topology")[0] == 1


def test_usage_errors_are_one_line_and_exit_2(hexmesh: Hexmesh) -> None:
    code, out, err = hexmesh("topology", "--ouptut", "json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "See `hexmesh topology --help`." in err
    assert hexmesh("jion")[0] == 2
    code, _, err = hexmesh("join", "--http-listen", "0.0.0.0")
    assert (code, err.count("\n")) == (2, 1)
    assert "give --api-key-file F, or --no-auth" in err


# ---------------------------------------------------------------- keys


def test_the_api_key_comes_from_the_variable_or_a_file_and_the_flag_beats_both(
    daemon: Recording, hexmesh: Hexmesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("# ours\n\nfrom-file\nanother\n")
    monkeypatch.setenv("HEXMESH_API_KEY_FILE", str(tmp_path / "key"))
    hexmesh("plan", "-o", "json")
    monkeypatch.setenv("HEXMESH_API_KEY", "from-variable")
    hexmesh("plan", "-o", "json")
    hexmesh("plan", "-o", "json", "--api-key-file", str(tmp_path / "key"))
    assert [key for *_, key in daemon.asked] == [
        "Bearer from-file",
        "Bearer from-variable",
        "Bearer from-file",
    ]


def test_the_admin_key_goes_to_the_local_daemon_only(
    daemon: Recording, hexmesh: Hexmesh, tmp_path: Path
) -> None:
    hexmesh("plan", "-o", "json", "--url", daemon.url)
    hexmesh("plan", "-o", "json")
    (tmp_path / "admin.key").unlink()
    hexmesh("plan", "-o", "json")
    assert [key for *_, key in daemon.asked] == [None, f"Bearer {recorded.ADMIN_KEY}", None]


def test_token_create_carries_the_admin_key(daemon: Recording, hexmesh: Hexmesh) -> None:
    code, out, err = hexmesh("token", "create", "--ttl", "30m", "--uses", "2", "-o", "json")
    assert (code, json.loads(out), err) == (0, recorded.ISSUED, "")
    body = {"ttl_s": 1800.0, "uses": 2}
    assert daemon.asked == [("POST", "/admin/token", body, f"Bearer {recorded.ADMIN_KEY}")]
    assert hexmesh("token", "create") == (
        0,
        recorded.ISSUED["join_command"] + "\n",
        "good for one node within 60 m\n",
    )


def test_tokens_are_listed_and_revoked(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["GET", "/admin/tokens"] = [
        {"id": "ab12", "uses": 3, "uses_left": 2, "expires_s": 90.0, "issuer": "f" * 40, "redeemed_by": []}
    ]
    daemon.answers["POST", "/admin/token/revoke"] = {"revoked": "ab12"}
    code, out, _ = hexmesh("token", "ls")
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, words) == (0, ["ID USES LEFT EXPIRES IN BY", "ab12 2 of 3 90.0 s ffffffff"])
    assert json.loads(hexmesh("token", "ls", "-o", "json")[1]) == daemon.answers["GET", "/admin/tokens"]
    daemon.asked.clear()
    assert hexmesh("token", "revoke", "ab12") == (0, "", "revoked ab12\n")
    key = f"Bearer {recorded.ADMIN_KEY}"
    assert daemon.asked == [("POST", "/admin/token/revoke", {"id": "ab12"}, key)]


def test_a_node_is_removed_by_name(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["POST", "/admin/node/remove"] = {"id": "b" * 40, "name": "two"}
    assert hexmesh("node", "remove", "two") == (0, "", "removed two (bbbbbbbb)\n")
    key = f"Bearer {recorded.ADMIN_KEY}"
    assert daemon.asked == [("POST", "/admin/node/remove", {"node": "two"}, key)]


def test_without_the_admin_key_a_change_is_refused(
    daemon: Recording, hexmesh: Hexmesh, tmp_path: Path
) -> None:
    (tmp_path / "admin.key").unlink()
    for verb in (
        *(("token", "create"), ("token", "ls"), ("token", "revoke", "x")),
        *(("node", "remove", "x"), ("replan",), ("leave",)),
    ):
        code, _, err = hexmesh(*verb)
        assert (code, err.count("\n")) == (4, 1)
        assert "run this as the daemon's user, with its --state-dir" in err
    assert daemon.asked == []


def test_a_search_over_the_mesh_asks_for_its_facts_and_apply_hands_over_what_was_found(
    daemon: Recording, hexmesh: Hexmesh
) -> None:
    daemon.answers["GET", "/admin/planning"] = msgspec.to_builtins(planning())
    code, out, _ = hexmesh("plan", "--workload", "LPLD", "--objective", "goodput", "-o", "json")
    assert code == 0
    assert daemon.asked == [("GET", "/admin/planning", None, f"Bearer {recorded.ADMIN_KEY}")]
    found = json.loads(out)
    daemon.answers["POST", "/admin/plan"] = {"accepted": True, "reason": "x"}
    code, _, err = hexmesh("plan", "--workload", "LPLD", "--objective", "goodput", "--apply", "-o", "json")
    assert (code, err) == (0, "handed to the coordinator; `hexmesh plan` shows what it makes of it\n")
    method, path, body, key = daemon.asked[-1]
    assert (method, path, key) == ("POST", "/admin/plan", f"Bearer {recorded.ADMIN_KEY}")
    assert body is not None
    assert {name: body[name] for name in ("objective", "workload", "plan")} == {
        name: found[name] for name in ("objective", "workload", "plan")
    }
    assert body["plan"]["hosts"] == {recorded.TOKYO_1: 7}


def planning() -> PlanningView:
    device = Device(index=0, kind="cpu", name="cpu", budget_bytes=2**32, flops_per_s=1e11, bytes_per_s=1e10)
    node = Node(id=recorded.TOKYO_1, name="tokyo-1", site="tokyo", devices=(device,))
    return PlanningView(
        model_id="m",
        model_name="hexmesh-small",
        spec=model_spec_from_config({**KNOWN["Llama-2-7B"], "num_hidden_layers": 2}),
        dtype="float32",
        max_model_tokens=2048,
        workload=Workload(),
        cluster=Cluster(nodes=(node,), links=()),
        hosts={recorded.TOKYO_1: 7},
    )


def test_replan_and_leave(daemon: Recording, hexmesh: Hexmesh) -> None:
    assert hexmesh("replan", "--reason", "new link")[0] == 0
    assert daemon.asked.pop() == (
        "POST",
        "/admin/replan",
        {"reason": "new link"},
        f"Bearer {recorded.ADMIN_KEY}",
    )
    code, _, err = hexmesh("leave", "--forget", "--timeout", "50ms")
    assert (code, err) == (
        1,
        "hexmesh: the daemon still runs 0.05 s after it was asked to leave; see its log\n",
    )
    assert daemon.asked[0] == ("POST", "/admin/leave", {"forget": True}, f"Bearer {recorded.ADMIN_KEY}")


def test_the_file_sets_what_flags_do_not(
    daemon: Recording, hexmesh: Hexmesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text('output = "json"\n[token]\nttl = "2m"\nuses = 3\n')
    monkeypatch.setenv("HEXMESH_CONFIG", str(tmp_path / "my.toml"))
    assert json.loads(hexmesh("plan")[1]) == recorded.PLAN
    assert hexmesh("token", "create", "--uses", "4")[0] == 0
    assert daemon.asked[-1][2] == {"ttl_s": 120.0, "uses": 4}


# ---------------------------------------------------------------- wait


def test_wait_goes_on_once_ready(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["GET", "/ready"] = deque([(503, recorded.NOT_READY)] * 2 + [recorded.READY])
    code, out, err = hexmesh("wait", "--ready", "--timeout", "10s")
    assert (code, out, err) == (0, "", "waiting: the model needs 12.0 MiB and 8.0 MiB are free\n")


def test_wait_exits_3_and_names_the_blocker(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["GET", "/ready"] = (503, recorded.NOT_READY)
    code, _, err = hexmesh("wait", "--timeout", "0.3s")
    assert code == 3
    assert err.splitlines()[-1] == (
        "hexmesh: gave up after 0.3 s: the model needs 12.0 MiB and 8.0 MiB are free; let one more node join"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--nodes", "3"), "2 of 3 nodes are alive"),
        (("--plan-id", "3-2"), "plan 3-1 runs, not 3-2"),
        (("--ready", "--nodes", "3"), "2 of 3 nodes are alive"),
    ],
)
def test_wait_for_nodes_and_plans(
    args: tuple[str, ...], words: str, daemon: Recording, hexmesh: Hexmesh
) -> None:
    code, _, err = hexmesh("wait", *args, "--timeout", "0")
    assert code == 3
    assert words in err
    assert hexmesh("wait", "--ready", "--nodes", "2", "--plan-id", "3-1", "--timeout", "0") == (0, "", "")


def test_wait_takes_a_daemon_that_is_not_there_for_a_blocker(hexmesh: Hexmesh) -> None:
    code, _, err = hexmesh("wait", "--url", "http://127.0.0.1:9", "--timeout", "0.3s")
    assert code == 3
    assert err.splitlines()[0] == "waiting: no daemon answers at http://127.0.0.1:9"


def test_wait_does_not_wait_for_a_wrong_key(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers["GET", "/admin/status"] = failing(401, "this key is unknown")
    assert hexmesh("wait", "--nodes", "2")[0] == 4


# ---------------------------------------------------------------- generate, chat


def test_generate_streams_text(daemon: Recording, hexmesh: Hexmesh) -> None:
    pieces = [{"text": text, "token_id": index, "index": index} for index, text in enumerate([" wor", "ld"])]
    daemon.answers["POST", "/generate"] = lines(*pieces, {"finish_reason": "stop", "usage": {}})
    args = ("--max-tokens", "8", "--temperature", "0.5", "--seed", "7", "--stop", "a", "--stop", "b")
    assert hexmesh("generate", "Hello", *args) == (0, " world\n", "")
    expected = {
        "prompt": "Hello",
        "max_tokens": 8,
        "temperature": 0.5,
        "seed": 7,
        "stop": ["a", "b"],
        "stream": True,
    }
    assert [body for _, _, body, _ in daemon.asked] == [expected]


def test_generate_reads_stdin_and_gives_json(
    daemon: Recording, hexmesh: Hexmesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", _pipe("two\nlines\n"))
    code, out, _ = hexmesh("generate", "-", "-o", "json")
    assert (code, json.loads(out)) == (0, recorded.GENERATED)
    assert [body for _, _, body, _ in daemon.asked] == [{"prompt": "two\nlines\n"}]
    assert hexmesh("generate", "")[0] == 2


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (failing(503, "no plan; wait"), 3, "hexmesh: no plan; wait"),
        (
            lines({"text": "a"}, {"error": {"message": "lost osaka-1", "type": "upstream_error"}}),
            1,
            "lost osaka-1",
        ),
        (lines({"text": "a"}, {"error": {"message": "full", "type": "rate_limit_error"}}), 3, "full"),
        (lines({"text": "a"}), 1, "the answer broke off"),
        (b"nonsense\n", 1, "is not JSON"),
    ],
)
def test_generate_fails_with_the_daemons_words(
    answer: Any, code: int, words: str, daemon: Recording, hexmesh: Hexmesh
) -> None:
    daemon.answers["POST", "/generate"] = answer
    actual, _, err = hexmesh("generate", "Hello")
    assert actual == code
    assert words in err.splitlines()[-1]


def test_chat_from_a_pipe_takes_each_line_as_a_turn_and_remembers(
    daemon: Recording, hexmesh: Hexmesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["POST", "/v1/chat/completions"] = deque(
        [server_sent("A KV ", "cache."), server_sent("Yes.")]
    )
    monkeypatch.setattr("sys.stdin", _pipe("What is it?\n\nReally?\n"))
    assert hexmesh("chat", "--system", "Be brief.", "--max-tokens", "9") == (0, "A KV cache.\nYes.\n", "")
    first, second = [body for method, _, body, _ in daemon.asked if method == "POST"]
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}
    answered, again = {"role": "assistant", "content": "A KV cache."}, {"role": "user", "content": "Really?"}
    shared = {"model": "hexmesh-small", "max_tokens": 9, "stream": True}
    assert first == shared | {"messages": [system, asked]}
    assert second == shared | {"messages": [system, asked, answered, again]}


def test_chat_names_the_blocker_when_no_model_is_served(daemon: Recording, hexmesh: Hexmesh) -> None:
    daemon.answers |= {("GET", "/v1/models"): {"data": []}, ("GET", "/ready"): (503, recorded.NOT_READY)}
    code, _, err = hexmesh("chat")
    assert (code, err) == (
        3,
        "hexmesh: the model needs 12.0 MiB and 8.0 MiB are free; let one more node join\n",
    )


def test_chat_does_not_take_a_broken_answer_for_a_whole_one(
    daemon: Recording, hexmesh: Hexmesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["POST", "/v1/chat/completions"] = server_sent("A KV", finish=False)
    monkeypatch.setattr("sys.stdin", _pipe("What is it?\n"))
    code, out, err = hexmesh("chat")
    assert (code, out) == (1, "A KV\n")
    assert "the answer broke off" in err


# ---------------------------------------------------------------- processes


def test_a_verb_imports_nothing_heavy_and_starts_at_once(daemon: Recording) -> None:
    code = (
        "import sys\n"
        "from daemon.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print(sorted(sys.modules), file=sys.stderr)\n"
    )
    for verb, may_render in (("version", False), ("plan", True)):
        args = [verb, *(["--url", daemon.url] if may_render else [])]
        start_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            cwd=ROOT,
        )
        took_s = time.monotonic() - start_s
        loaded = {name.split(".")[0] for name in done.stderr.strip("[]\n'").split("', '")}
        assert "daemon" in loaded
        assert loaded & HEAVY == set()
        assert may_render or "rich" not in loaded
        assert took_s < 3.0, "a verb starts in under 0.3 s; ten times that on a busy machine"


def test_a_reader_that_leaves_ends_the_verb_quietly(daemon: Recording) -> None:
    command = f"{sys.executable} -m daemon topology --url {daemon.url} | true"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT
    )
    assert done.stderr == ""


def test_version(hexmesh: Hexmesh) -> None:
    code, out, _ = hexmesh("version", "-o", "json")
    assert code == 0
    assert list(json.loads(out))[:3] == ["hexmesh", "python", "torch"]
    assert hexmesh("version")[1].startswith("hexmesh ")


# ---------------------------------------------------------------- what join leaves for others


def test_the_run_file_names_a_living_daemon_only(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    run = Run(os.getpid(), "http://127.0.0.1:1")
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run
    remove_run(tmp_path, run.pid + 1)
    assert read_run(tmp_path) == run
    remove_run(tmp_path, run.pid)
    assert list(tmp_path.glob("*run*")) == []
    (tmp_path / "run.json").write_text("{")
    assert read_run(tmp_path) is None
    assert local_http_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert local_http_url("::", 80) == "http://[::1]:80"


def test_the_up_line_is_one_line_of_json_on_stdout_and_in_the_ready_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up = UpLine(node_id="n", name="a", http_url="u", peer_addr="p", join_command=None, token_expires_s=None)
    tell_up(up, tmp_path / "new" / "up.json")
    out = capsys.readouterr().out
    assert out == (tmp_path / "new" / "up.json").read_text()
    assert out.count("\n") == 1
    assert set(json.loads(out)) == {
        "node_id",
        "name",
        "http_url",
        "peer_addr",
        "join_command",
        "token_expires_s",
    }


def test_a_group_of_foreseen_failures_counts_as_its_first() -> None:
    refused, not_ready = Refused("no"), NotReady("later")
    assert find_foreseen(ExceptionGroup("a", [ExceptionGroup("b", [refused]), not_ready])) is refused
    assert find_foreseen(ExceptionGroup("a", [refused, KeyError("bug")])) is None


def test_log_lines() -> None:
    record = logging.LogRecord("hexmesh.progress", logging.INFO, "", 0, "founding mesh %s", ("7f",), None)
    record.event = "founding"
    line = json.loads(JsonLines().format(record))
    assert {key: line[key] for key in ("level", "logger", "event", "message")} == {
        "level": "info",
        "logger": "hexmesh.progress",
        "event": "founding",
        "message": "founding mesh 7f",
    }
    assert TextLines(colours=False).format(record).split(" ", 1)[1] == "founding mesh 7f"
    record.name, record.levelno, record.levelname = "hexmesh.links", logging.WARNING, "WARNING"
    assert (
        TextLines(colours=False).format(record).split(" ", 1)[1] == "WARNING hexmesh.links founding mesh 7f"
    )


def test_every_foreseen_error_has_one_of_the_promised_exit_codes() -> None:
    kinds: list[type[HexmeshError]] = [HexmeshError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4}


def _pipe(text: str) -> Any:
    import io

    return io.StringIO(text)
