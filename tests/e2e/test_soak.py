"""A short soak: a mesh of four under load while hosts die, hang and are cut off; `tools/soak` runs the long one."""

from __future__ import annotations

from tests.e2e.test_netlab import _lab_is_possible  # noqa: F401
from tools.soak.soak import soak


def test_six_faults_under_load_break_no_promise_and_leave_nothing() -> None:
    result = soak(n_faults=6, n_clients=4, seed=3, keep=None, tell=print)
    assert result.broken == []
    assert len(result.faults) == 6
    assert sum(one.verdict == "exact" for one in result.outcomes) > 20
