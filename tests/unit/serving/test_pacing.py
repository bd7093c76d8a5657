"""How many micro-batches in flight: against the best that trying every number finds, on pipelines in virtual time."""

from __future__ import annotations

import pytest

from hexmesh.serving.pacing import MAX_GROUPS, Pacing
from tests.unit.serving.fake_pipeline import Pipeline, best_rate, tokens_per_s

MS = 1e-3


def pipeline(stages_ms: list[tuple[float, float]], links_ms: list[float], noise: float = 0.05) -> Pipeline:
    stages = [(fixed * MS, row * MS) for fixed, row in stages_ms]
    return Pipeline(stages, [link * MS for link in links_ms], noise)


def pacing(pipeline: Pipeline, planned_tokens: int = 64, planned_wrongly: float = 1.0) -> Pacing:
    planned_s = [planned_wrongly * (fixed_s + row_s * planned_tokens) for fixed_s, row_s in pipeline.stages]
    return Pacing(planned_s, planned_tokens)


TWO_EVEN = [(4.0, 0.3), (4.0, 0.3)]


@pytest.mark.parametrize("n_decoding", [2, 8, 32, 128, 256])
@pytest.mark.parametrize(
    "where",
    [
        pipeline(TWO_EVEN, [0.1, 0.5, 0.5]),
        pipeline(TWO_EVEN, [0.1, 20.0, 20.0]),
        pipeline([(15.0, 0.2), (14.0, 5.0), (2.0, 1.3)], [0.1, 40.0, 0.5, 40.0], 0.1),
        pipeline([(2.0, 0.1), (1.0, 0.4), (3.0, 0.1), (1.0, 0.1)], [0.1, 2.0, 20.0, 2.0, 20.0], 0.02),
    ],
    ids=["two near", "two over 40 ms", "three uneven over 80 ms", "four over two sites"],
)
def test_the_groups_come_within_three_percent_of_the_best_the_start_included(
    where: Pipeline, n_decoding: int
) -> None:
    best, n_best = best_rate(where, n_decoding, n_steps=1000, most=MAX_GROUPS)
    paced = pacing(where, planned_wrongly=2.0)
    reached = tokens_per_s(where, n_decoding, paced.groups, paced.observe, n_steps=2000, seed=1)
    assert reached >= 0.97 * best, f"{reached:.0f} of {best:.0f} tokens/s, which {n_best} groups reach"


@pytest.mark.parametrize("n_decoding", [1, 7, 256])
def test_one_stage_with_a_short_way_runs_one_batch_at_a_time_and_is_left_in_peace(n_decoding: int) -> None:
    where = pipeline([(10.0, 2.0)], [0.1, 0.1], 0.1)
    paced = pacing(where)
    chosen = set()

    def groups(n: int) -> int:
        chosen.add(paced.groups(n))
        return paced.groups(n)

    tokens_per_s(where, n_decoding, groups, paced.observe, n_steps=3000)
    assert chosen == {1}


@pytest.mark.parametrize(
    ("before_ms", "after_ms", "n_steps"),
    [(1.0, 40.0, 1600), (40.0, 1.0, 4000)],
    ids=["grows longer", "grows shorter"],
)
def test_a_way_that_changes_is_noticed(before_ms: float, after_ms: float, n_steps: int) -> None:
    before, after = (pipeline(TWO_EVEN, [0.1, way, way], 0.02) for way in (before_ms, after_ms))
    best, _ = best_rate(after, 64, n_steps=1000, most=MAX_GROUPS)
    paced = pacing(before)
    reached = tokens_per_s(before, 64, paced.groups, paced.observe, n_steps=n_steps, changed=after)
    assert reached >= 0.95 * best


def test_another_size_is_tried_where_all_steps_have_had_one() -> None:
    """All that is seen of two stages is what 64 rows take; whether halves would take half is to be found out."""
    paced = Pacing([1.0, 1.0], 64)
    asked = set()
    for _ in range(40):
        n_groups = paced.groups(64)
        asked.add(n_groups)
        if n_groups == 1:
            paced.observe(64, 64, [0.1, 0.1], 0.2, 1)
        else:
            paced.observe(64 // n_groups, 64 // n_groups, [0.099, 0.099], 0.2, n_groups)
    assert asked >= {1, 2}
    assert paced.groups(64) <= 2, "a stage takes as long for a quarter: four groups only make rounds longer"


def test_groups_are_fewer_while_every_step_carries_prompts_too() -> None:
    """Eight short steps hide the way; with a long chunk in each they would only wait for one another."""
    paced = Pacing([0.01, 0.01], 16)

    def run(n_beside: int) -> int:
        for step in range(300):
            n_groups = paced.groups(16)
            n_tokens = 16 // n_groups + n_beside + step % 3
            seconds = 0.002 + 0.001 * n_tokens
            rest_s = max(0.04, n_groups * seconds - 2 * seconds)
            paced.observe(16 // n_groups, n_tokens, [seconds, seconds], 2 * seconds + rest_s, n_groups)
        return paced.groups(16)

    assert run(n_beside=0) >= 6
    assert run(n_beside=200) == 2


def test_a_way_that_grows_shorter_is_noticed_soon_where_stages_tell_how_long_steps_waited() -> None:
    paced = Pacing([0.1, 0.1], 8)

    def run(way_s: float) -> int:
        for _ in range(120):
            n_groups = paced.groups(16)
            n_rows = -(-16 // n_groups)
            seconds = 0.002 + 0.001 * n_rows
            queue_s = max(0.0, n_groups * seconds - 2 * seconds - way_s)
            paced.observe(
                n_rows, n_rows, [seconds, seconds], 2 * seconds + way_s + queue_s, n_groups, queue_s
            )
        return paced.groups(16)

    assert run(0.1) >= 8
    assert run(0.001) == 2


def test_prompts_fill_the_stages_one_chunk_behind_the_other() -> None:
    near, far = Pacing([0.1, 0.1], 256), Pacing([0.1, 0.1], 256)
    assert near.prompt_depth(256) == 2
    for n_tokens in (256, 128) * 8:
        near.observe(1, n_tokens, [n_tokens / 2560] * 2, n_tokens / 1280 + 0.001, 1)
        far.observe(1, n_tokens, [n_tokens / 2560] * 2, n_tokens / 1280 + 0.2, 1)
        near.prompt_depth(256)
        far.prompt_depth(256)
    assert (near.prompt_depth(256), far.prompt_depth(256)) == (2, 4)
    assert Pacing([0.1], 256).prompt_depth(256) == 1
