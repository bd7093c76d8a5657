"""What `hexmesh demo` does with its daemons: starts, asks, shows, stops, and leaves nothing behind.

The daemons are `recorded_daemon` run as a program; that a real mesh answers is another test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo import run_demo
from daemon.terminal.demo_memory import least_memory_bytes, memory_for_exactly
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import model_spec_from_config

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, str(ROOT / "tests" / "e2e" / "recorded_daemon.py"))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the demo makes its folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def daemons_under(folder: Path) -> list[int]:
    """Processes whose working directory lies in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(folder) in os.readlink(entry / "cwd"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def demo(**flags: object) -> int:
    return run_demo(
        "What is it?", **({"n_nodes": 3, "memory_bytes": 2**20, "keep": False, "program": PROGRAM} | flags)
    )


def test_it_asks_a_node_that_does_not_coordinate_and_leaves_nothing(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo() == 0
    out, err = capsys.readouterr()
    assert out.startswith("\nA KV cache.\n\nmesh 7f7f7f7f")
    assert "asking osaka-1, which is not the coordinator: What is it?" in err
    assert "osaka-1 joined, in site osaka" in err
    assert list(temporary.iterdir()) == []
    assert daemons_under(temporary) == []


def test_a_daemon_that_fails_shows_its_last_words(
    temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECORDED_DAEMON_FAILS", "tokyo-2")
    assert demo() == 1
    err = capsys.readouterr().err
    assert "the demo failed: tokyo-2 ended with exit code 3" in err
    assert "--- last lines of tokyo-2\n    recorded: no room for the model\n" in err
    assert list(temporary.iterdir()) == []
    assert daemons_under(temporary) == []


def test_a_daemon_that_hangs_is_killed_with_its_workers(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECORDED_DAEMON_HANGS", "1")
    monkeypatch.setattr("daemon.terminal.demo.STOP_TIMEOUT_S", 0.2)
    assert demo() == 0
    wait_until(lambda: daemons_under(temporary) == [])
    assert list(temporary.iterdir()) == []


def test_the_budget_makes_every_node_necessary() -> None:
    spec = model_spec_from_config(resolve_model().config)
    for n_nodes in (2, 3, 4):
        budget = memory_for_exactly(spec, n_nodes)
        assert least_memory_bytes(spec, n_nodes) < budget < least_memory_bytes(spec, n_nodes - 1)
    with pytest.raises(InvalidInput, match=r"cannot share the model|gains nothing"):
        memory_for_exactly(spec, spec.n_layers + 1)


def test_kept_daemons_stay_and_the_way_to_stop_them_is_told(tmp_path: Path) -> None:
    process = demo_process(tmp_path, PROGRAM, keep=True)
    out, _ = process.communicate(timeout=30)
    kept = daemons_under(tmp_path)
    try:
        assert process.returncode == 0
        assert len(kept) == 3
        stop = next(line for line in out.splitlines() if line.startswith("Stop it:"))
        assert all(str(pid) in stop.split(";")[0].split() for pid in kept)
        subprocess.run(stop.removeprefix("Stop it:"), shell=True, check=True, timeout=10)
        wait_until(lambda: daemons_under(tmp_path) == [])
    finally:
        for pid in daemons_under(tmp_path):
            os.kill(pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    never_up = (sys.executable, "-c", "import time; time.sleep(60)")
    process = demo_process(tmp_path, never_up, keep=False)
    try:
        wait_until(lambda: daemons_under(tmp_path) != [])
        process.send_signal(number)
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode not in (0, -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
    assert daemons_under(tmp_path) == []


def demo_process(folder: Path, program: tuple[str, ...], *, keep: bool) -> subprocess.Popen[str]:
    """The demo in a process of its own, with its folder in `folder`."""
    code = (
        "from daemon.terminal.demo import run_demo\n"
        f"exit(run_demo('?', n_nodes=3, memory_bytes=2**20, keep={keep}, program={program!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
