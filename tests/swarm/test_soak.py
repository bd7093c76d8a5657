"""Seeded schedules of faults on 2 to 9 hosts: I1 to I7 at every event, I8 soon after healing."""

from __future__ import annotations

import os

import pytest

from tests.swarm.schedule import Faults, Outcome, run_schedule

N_SCHEDULES = int(os.environ.get("HEXMESH_SWARM_SCHEDULES", "240"))
FIRST_SEED = int(os.environ.get("HEXMESH_SWARM_FIRST_SEED", "100000"))
N_CHUNKS = 12
HEALED_WITHIN_S = 12.0


def soak(chunk: int, faults: Faults) -> list[Outcome]:
    seeds = range(FIRST_SEED + chunk, FIRST_SEED + N_SCHEDULES, N_CHUNKS)
    return [run_schedule(seed, 2 + seed // N_CHUNKS % 8, faults) for seed in seeds]


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_no_invariant_breaks_and_the_mesh_heals(chunk: int) -> None:
    faults = Faults(pauses=chunk % 4 == 3, heal_within_s=HEALED_WITHIN_S)
    outcomes = soak(chunk, faults)
    assert [outcome.seed for outcome in outcomes if outcome.healed_s is None] == []


def test_a_seed_fixes_the_run() -> None:
    assert run_schedule(7, 4) == run_schedule(7, 4)


def test_schedules_do_what_they_claim() -> None:
    outcome = run_schedule(11, 5)
    assert outcome.counts.n_commits > 10
    assert outcome.counts.n_plans > 5
    assert outcome.counts.n_finished > 50
