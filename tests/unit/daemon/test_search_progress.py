"""What searches print themselves stays away from what the command prints."""

from __future__ import annotations

import ctypes

import pytest

from daemon.terminal.search_progress import watching


def test_what_a_solver_prints_through_c_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    c = ctypes.CDLL(None)
    with watching("columns"):
        c.printf(b"HighsMipSolverData\n")
    c.printf(b"kept\n")
    c.fflush(None)
    print("and this")
    assert capfd.readouterr().out.splitlines() == ["kept", "and this"]


def test_stdout_comes_back_where_a_search_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), watching("columns"):
        _ = 1 // 0
    print("still here")
    assert capfd.readouterr().out == "still here\n"
