"""Bytes and seconds of stages: by hand where that is possible, and whole against parts."""

from __future__ import annotations

import msgspec
import pytest

from hexmesh.cluster import Device, Link
from hexmesh.cost import (
    LOCAL_HOP_S,
    STAGE_OVERHEAD_S,
    CostModel,
    StepLimits,
    default_dtype,
    layer_overhead_s,
)
from hexmesh.model_spec import ModelSpec, model_spec_from_config

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, N_LAYERS = 128, 8, 4, 16, 384, 2000, 6


def _spec(*, tied: bool) -> ModelSpec:
    return model_spec_from_config(
        {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "tie_word_embeddings": tied,
        }
    )


def _costs(*, tied: bool = False, step_tokens: int = 64) -> CostModel:
    limits = StepLimits(step_tokens=step_tokens, logits_rows=4, context_tokens=100)
    return CostModel(_spec(tied=tied), "bfloat16", 16, limits)


def _device(*, bytes_per_s: float, flops_per_s: float) -> Device:
    return Device(
        index=0, kind="cpu", name="cpu", budget_bytes=0, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s
    )


MATMUL = HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * HIDDEN + 3 * HIDDEN * MLP
LAYER = MATMUL + 2 * HIDDEN


def test_weights_by_position_in_the_pipeline() -> None:
    untied, tied = _costs(), _costs(tied=True)
    embedding, norm = VOCAB * HIDDEN, HIDDEN
    assert untied.weight_bytes(2, 4) == 2 * (2 * LAYER + norm)
    assert untied.weight_bytes(0, 4) == 2 * (4 * LAYER + norm + embedding)
    assert untied.weight_bytes(2, 6) == 2 * (4 * LAYER + norm + embedding)
    assert untied.weight_bytes(0, 6) == 2 * (6 * LAYER + norm + 2 * embedding)
    assert tied.weight_bytes(0, 6) == 2 * (6 * LAYER + norm + embedding)
    assert tied.weight_bytes(0, 3) + tied.weight_bytes(3, 6) == tied.weight_bytes(0, 6) + 2 * (
        norm + embedding
    )


def test_kv_block_by_hand() -> None:
    assert _costs().kv_block_bytes(3) == 3 * 16 * KV_HEADS * 2 * HEAD_DIM * 2


def test_workspace_grows_with_the_step_and_has_logits_on_the_last_stage() -> None:
    costs = _costs()
    assert costs.workspace_bytes(6) - costs.workspace_bytes(3) == 4 * VOCAB * (2 + 48)
    per_token = 2 * (3 * HIDDEN + 3 * MLP) + 100 * (1 + 2)
    assert _costs(step_tokens=65).workspace_bytes(3) - costs.workspace_bytes(3) == per_token


def test_the_allocator_gets_a_fiftieth() -> None:
    costs = _costs()
    wanted = costs.weight_bytes(1, 3) + costs.workspace_bytes(3)
    assert costs.fixed_bytes(1, 3) == wanted + wanted // 50


def test_room_is_the_inverse_of_need() -> None:
    costs = _costs()
    device = _device(bytes_per_s=1.0, flops_per_s=1.0)
    for n_blocks in (0, 1, 50):
        needed = costs.needed_bytes(1, 3, n_blocks, "cpu")
        exact = msgspec.structs.replace(device, budget_bytes=needed)
        short = msgspec.structs.replace(device, budget_bytes=needed - 1)
        assert costs.room_blocks(1, 3, exact) == n_blocks
        assert costs.room_blocks(1, 3, short) == n_blocks - 1


def test_blocks_cost_their_gathered_copy_too() -> None:
    """A CPU attends in float32: half precision is copied once as it is and once widened."""
    costs, numbers = _costs(), 16 * KV_HEADS * 2 * HEAD_DIM
    per_block = costs.needed_bytes(1, 3, 1, "cuda") - costs.needed_bytes(1, 3, 0, "cuda")
    assert per_block == 2 * numbers * 2 + numbers * 2 * 1.25
    per_block = costs.needed_bytes(1, 3, 1, "cpu") - costs.needed_bytes(1, 3, 0, "cpu")
    assert per_block == 2 * numbers * 2 + numbers * (2 + 4) * 1.25


def test_decode_is_bound_by_memory_or_compute() -> None:
    costs = _costs()
    batch, context = 8, 50
    read = 2 * (LAYER + batch * context * 2 * KV_HEADS * HEAD_DIM)
    flops = batch * (2 * MATMUL + context * 4 * HEADS * HEAD_DIM)
    slow_memory = costs.step_time(_device(bytes_per_s=1e6, flops_per_s=1e15), 1, 3, batch, context)
    assert slow_memory.total_s == pytest.approx(2 * (read / 1e6 + layer_overhead_s("cpu")) + STAGE_OVERHEAD_S)
    assert slow_memory.bound == "memory bandwidth"
    slow_compute = costs.step_time(_device(bytes_per_s=1e15, flops_per_s=1e6), 1, 3, batch, context)
    assert slow_compute.total_s == pytest.approx(
        2 * (flops / 1e6 + layer_overhead_s("cpu")) + STAGE_OVERHEAD_S
    )
    assert slow_compute.bound == "compute"
    fast = costs.step_time(_device(bytes_per_s=1e15, flops_per_s=1e18), 1, 3, batch, context)
    assert fast.bound == "call overhead"


def test_the_last_stage_pays_for_the_head() -> None:
    costs, device = _costs(), _device(bytes_per_s=1e6, flops_per_s=1e15)
    middle = costs.step_time(device, 2, 4, 1, 10).total_s
    last = costs.step_time(device, 4, 6, 1, 10).total_s
    assert last - middle == pytest.approx(2 * VOCAB * HIDDEN / 1e6)
    assert costs.head_s(device, 1) == pytest.approx(last - middle)


def test_hops() -> None:
    costs = _costs()
    link = Link(src="a", dst="b", rtt_p50_s=0.02, rtt_p95_s=0.5, bytes_per_s=1e6, lower_bound=False)
    assert costs.hop_s(link, 8) == pytest.approx(0.01 + 8 * HIDDEN * 2 / 1e6)
    assert costs.return_s(link) == pytest.approx(0.01)
    assert LOCAL_HOP_S <= costs.hop_s(None, 8) < 2 * LOCAL_HOP_S
    assert costs.return_s(None) == LOCAL_HOP_S


def test_default_dtype() -> None:
    assert default_dtype(["cuda", "cuda"]) == "bfloat16"
    assert default_dtype(["cpu"]) == default_dtype(["cuda", "cpu"]) == default_dtype([]) == "float32"
