"""Without any one of the rules a test named here is red. Rules are switched off in memory, never in a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.swarm import test_half_dead_links as half_dead
from tests.swarm import test_regressions as row
from tests.swarm.mutants import MUTANTS, mutant
from tests.swarm.schedule import Case
from tests.swarm.test_static_graphs import test_no_lease_moves_and_every_host_is_planned_for as static_graphs
from tests.unit.membership import test_host_rules as host_rule

Check = Callable[[], None]


def schedules() -> None:
    """Those of the soak."""
    for seed in range(100_000, 100_240):
        Case.draw(seed).run()


FLICKER = (half_dead.ENDS[1], half_dead.flickers)

TURNED_RED: list[tuple[str, Check, str]] = [
    ("seq", row.test_row_5_overtaken_beats_do_not_wedge_the_mesh, "vote"),
    ("seq", host_rule.test_an_overtaken_beat_does_not_abort_a_ready_epoch, ""),
    ("boot nonce", row.test_row_3_names_are_never_used_twice, "I4"),
    ("cert fence", row.test_row_7_a_certificate_is_not_obeyed_under_another_coordinator, "I3"),
    ("cert fence", host_rule.test_a_certificate_is_not_obeyed_once_the_host_is_anothers, ""),
    ("two-way", row.test_row_2_a_host_that_its_coordinator_cannot_hear_is_not_stranded, ""),
    ("two-way", partial(static_graphs, 0.3), ""),
    ("epoch check", schedules, "I5"),
    ("size first", row.test_row_9_a_lone_host_coming_back_moves_nobody_else, ""),
    ("hears", host_rule.test_a_beat_renews_the_lease_only_if_the_coordinator_hears_this_boot, ""),
    ("fence", schedules, "I1"),
    ("listening", schedules, "listen"),
    ("one slot each", schedules, "I7"),
    ("spread", row.test_row_6_hosts_tell_each_other_of_a_commit, ""),
    ("damping", partial(half_dead.test_a_link_that_comes_and_goes_changes_few_plans, *FLICKER), ""),
    ("steal", partial(static_graphs, 0.3), ""),
]
"""Rule, the check that holds only with it, and the invariant that the failure names ("": the check's own)."""


@pytest.mark.parametrize(("rule", "check", "invariant"), TURNED_RED)
def test_without_the_rule_the_check_is_red(rule: str, check: Check, invariant: str) -> None:
    with mutant(rule), pytest.raises(AssertionError, match=f"^{invariant}"):
        check()


def test_every_mutant_has_a_check() -> None:
    assert {rule for rule, _, _ in TURNED_RED} == set(MUTANTS)
