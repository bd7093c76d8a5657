"""Steps that no driver would send: refused before anything is touched, or confined to the blocks they name."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.models.model_source import SHIPPED_MODEL
from hexmesh.errors import InvalidInput
from hexmesh.runtime.payload import tensor_from
from hexmesh.runtime.residency import Residency
from hexmesh.runtime.stage import Stage
from hexmesh.wire.data import Barred, Past, Row, SamplingParams, Scoring
from hexmesh.wire.worker import LoadStage
from tests.unit.wire.any_message import any_of

BLOCK_TOKENS, KV_BLOCKS = 8, 12


@pytest.fixture(scope="module", params=["first", "last"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    residency = Residency(torch.device("cpu"))
    start, stop = {"first": (0, 2), "last": (6, 8)}[request.param]
    residency.load(
        LoadStage(
            stage="s",
            pool="s",
            model_dir=str(SHIPPED_MODEL),
            model_id="m",
            start=start,
            stop=stop,
            dtype="float32",
            kv_blocks=KV_BLOCKS,
            block_tokens=BLOCK_TOKENS,
            budget_bytes=2**30,
        )
    )
    found = residency.find("s")
    assert isinstance(found, Stage)
    yield found
    residency.drop("s")


numbers = st.integers(-3, 40) | st.sampled_from([-(2**63), 2**31, 2**62, 2**63 - 1, 2**64 - 1])
blocks = st.lists(st.integers(-1, KV_BLOCKS) | numbers, max_size=6)
wishes = {
    "sample": st.none() | any_of(SamplingParams),
    "drafts": st.lists(st.integers(0, 1100), max_size=3),
    "past": st.none() | any_of(Past),
    "barred": st.none() | any_of(Barred),
    "scoring": st.none() | any_of(Scoring),
}
plausible = st.builds(
    Row,
    start=st.integers(0, 20),
    n_tokens=st.integers(1, 12),
    blocks=st.lists(st.integers(0, KV_BLOCKS - 1), min_size=1, max_size=5),
    **wishes,
)
WRONG: list[dict[str, object]] = [
    *({"start": start} for start in (-1, -2, 33)),
    *({"n_tokens": n_tokens} for n_tokens in (0, -1, 41)),
    *({"blocks": table} for table in ([], [0, 1, 2, 3, KV_BLOCKS], [0, 1, 2, 3, -1])),
]
absurd = st.builds(Row, start=numbers, n_tokens=numbers, blocks=blocks, **wishes)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_one_wrong_figure_is_refused_before_anything_is_touched(
    stage: Stage, wrong: dict[str, object]
) -> None:
    row = msgspec.structs.replace(Row(start=0, n_tokens=2, blocks=[0, 1, 2, 3]), **wrong)
    shape = (row.n_tokens,) if stage.splice.is_first else (row.n_tokens, stage.limits.hidden_size)
    payload = torch.zeros([max(size, 0) for size in shape], dtype=stage.payload_dtype)
    before = snapshot(stage)
    with pytest.raises(InvalidInput):
        stage.run([row], payload)

    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(stage), strict=True))


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(plausible, max_size=2) | st.lists(plausible | absurd, max_size=2),
    size=st.none() | st.integers(0, 3000),
    seed=st.integers(0, 99),
)
def test_a_hostile_step_is_refused_or_keeps_to_its_own_blocks(
    stage: Stage, rows: list[Row], size: int | None, seed: int
) -> None:
    n_tokens = sum(row.n_tokens for row in rows)
    if size is None and 0 <= n_tokens < 100:  # as long as the rows say
        width = 1 if stage.splice.is_first else stage.limits.hidden_size
        size = n_tokens * stage.payload_dtype.itemsize * width
    payload = memoryview(bytearray(random.Random(seed).randbytes(size or 0)))
    if stage.splice.is_first and seed % 2:
        payload = memoryview(bytearray(len(payload)))  # token 0, which every vocabulary has
    before = snapshot(stage)
    try:
        stage.run(rows, tensor_from(payload, stage))
    except InvalidInput:
        named = set()
    else:
        named = {block for row in rows for block in row.blocks}
        assert named <= set(range(KV_BLOCKS))
        assert all(
            0 <= row.start < row.start + row.n_tokens <= BLOCK_TOKENS * len(row.blocks) for row in rows
        )

    others = [block for block in range(KV_BLOCKS) if block not in named]
    assert all(
        torch.equal(old[others], new[others]) for old, new in zip(before, snapshot(stage), strict=True)
    )


def snapshot(stage: Stage) -> list[torch.Tensor]:
    layers = (0, 1) if stage.splice.is_first else (6, 7)
    return [
        half.clone() for index in layers for half in (stage.pool.layer(index).k, stage.pool.layer(index).v)
    ]
