"""Seeded schedules of faults on 2 to 9 hosts: I1 to I7 at every event, I8 soon after healing."""

from __future__ import annotations

import os

import pytest

from tests.swarm.schedule import Case, run_schedule

N_SCHEDULES = int(os.environ.get("HEXMESH_SWARM_SCHEDULES", "240"))
FIRST_SEED = int(os.environ.get("HEXMESH_SWARM_FIRST_SEED", "100000"))
N_CHUNKS = 12


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_no_invariant_breaks_and_the_mesh_heals(chunk: int) -> None:
    """`python -m tests.swarm.hunt` runs the same schedules by the thousand."""
    seeds = range(FIRST_SEED + chunk, FIRST_SEED + N_SCHEDULES, N_CHUNKS)
    outcomes = [Case.draw(seed).run() for seed in seeds]
    assert [outcome.seed for outcome in outcomes if outcome.healed_s is None] == []


def test_a_seed_fixes_the_run() -> None:
    assert Case.draw(7).run() == Case.draw(7).run()


def test_schedules_differ_in_what_they_try() -> None:
    cases = [Case.draw(seed) for seed in range(FIRST_SEED, FIRST_SEED + 240)]
    assert {case.n_hosts for case in cases} == set(range(2, 10))
    assert {case.habits.drift for case in cases} == {0.0, 0.03, 0.1, 0.2}
    assert {case.habits.listen_s for case in cases} == {None, (0.0, 3.0)}
    assert {case.habits.relays for case in cases} == {False, True}
    assert {case.faults.pauses for case in cases} == {False, True}


def test_schedules_do_what_they_claim() -> None:
    outcome = run_schedule(11, 5)
    assert outcome.counts.n_commits > 10
    assert outcome.counts.n_plans > 5
    assert outcome.counts.n_finished > 50
