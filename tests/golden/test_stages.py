"""Stages of every supported architecture give, token for token, what `transformers` generates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hexmesh.architectures import SUPPORTED_MODEL_TYPES
from hexmesh.runtime import native_attention, native_modules, packed
from hexmesh.runtime.residency import Residency
from hexmesh.runtime.stage import Stage
from hexmesh.wire.data import Row, SampledToken, SamplingParams
from hexmesh.wire.worker import LoadStage
from tests.golden.tiny_models import TINY_CONFIGS, VOCAB_SIZE, read_reference, save_tiny_model

N_LAYERS = 5
CUTS = {1: [0, 5], 2: [0, 2, 5], 3: [0, 1, 4, 5]}
PROMPT_LENGTHS = (3, 21, 34)
N_NEW = 12
BLOCK_TOKENS = 8
KV_BLOCKS = 64
CHUNK_TOKENS = 9
LEAST_MARGIN = 2e-3
"""Top-2 distance of the reference's logits; rounding moves ours by some 1e-5 at these scales."""


@dataclass(frozen=True)
class Reference:
    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    margin: float


@dataclass
class Sequence:
    """One sequence of the test's own little batcher."""

    tokens: list[int]
    n_prompt: int
    blocks: list[int]
    starts_at_step: int
    n_computed: int = 0
    sampled: list[SampledToken] = field(default_factory=list)

    def next_row(self) -> Row:
        """A chunk of the prompt, or one decode token; sampled where the next token is not known yet."""
        n_tokens = min(CHUNK_TOKENS, len(self.tokens) - self.n_computed)
        is_end = self.n_computed + n_tokens == len(self.tokens)
        return Row(
            start=self.n_computed,
            n_tokens=n_tokens,
            blocks=self.blocks,
            sample=SamplingParams() if is_end else None,
        )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products lose more than they gain by threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """References by model type, made once each."""
    made: dict[str, Reference] = {}

    def get(model_type: str) -> Reference:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            options = {"max_shard_size": "40KB"} if model_type in ("llama", "mixtral") else {}
            made[model_type] = generate_reference(save_tiny_model(model_type, folder, **options), folder)
        return made[model_type]

    return get


def generate_reference(model: PreTrainedModel, folder: Path) -> Reference:
    rng = random.Random(1)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    answers, margins = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=N_NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append(out.sequences[0, len(prompt) :].tolist())
        top = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
        margins.append(float((top[:, 0] - top[:, 1]).min()))
    return Reference(folder, prompts, answers, min(margins))


def load_stages(folder: Path, cuts: list[int], dtype: str = "float32") -> list[Stage]:
    residency = Residency(torch.device("cpu"))
    stages = []
    for start, stop in pairwise(cuts):
        residency.load(load_order(folder, start, stop, dtype=dtype))
        stage = residency.find(f"{start}-{stop}")
        assert isinstance(stage, Stage)
        stages.append(stage)
    return stages


def load_order(folder: Path, start: int, stop: int, dtype: str = "float32") -> LoadStage:
    return LoadStage(
        pool="",
        stage=f"{start}-{stop}",
        model_dir=str(folder),
        model_id="tiny",
        start=start,
        stop=stop,
        dtype=dtype,
        kv_blocks=KV_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        budget_bytes=2**30,
    )


def run_step(stages: list[Stage], rows: list[Row], tokens: list[int]) -> list[SampledToken]:
    payload = torch.tensor(tokens, dtype=torch.int64)
    for stage in stages:
        output = stage.run(rows, payload)
        if output.hidden is None:
            return [token for (token,) in output.sampled]
        payload = output.hidden
    raise AssertionError("the last stage gave no tokens")


def generate_all(stages: list[Stage], prompts: list[list[int]]) -> list[Sequence]:
    """All prompts together: started one after the other, chunked, in permuted blocks."""
    blocks = random.Random(2).sample(range(KV_BLOCKS), KV_BLOCKS)
    per_sequence = KV_BLOCKS // len(prompts)
    sequences = [
        Sequence(list(prompt), len(prompt), blocks[i * per_sequence : (i + 1) * per_sequence], 2 * i)
        for i, prompt in enumerate(prompts)
    ]
    step = 0
    while active := [one for one in sequences if len(one.sampled) < N_NEW]:
        running = [one for one in active if one.starts_at_step <= step]
        step += 1
        rows = [one.next_row() for one in running]
        tokens = [
            token
            for one, row in zip(running, rows, strict=True)
            for token in one.tokens[row.start : row.start + row.n_tokens]
        ]
        results: Iterator[SampledToken] = iter(run_step(stages, rows, tokens))
        for one, row in zip(running, rows, strict=True):
            one.n_computed += row.n_tokens
            if row.sample is not None:
                one.sampled.append(next(results))
                one.tokens.append(one.sampled[-1].token_id)
    return sequences


def test_every_supported_type_is_tested() -> None:
    assert sorted(TINY_CONFIGS) == sorted(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("n_stages", [1, 2, 3])
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_stages_equal_transformers(
    model_type: str, n_stages: int, reference_of: Callable[[str], Reference]
) -> None:
    reference = reference_of(model_type)
    assert reference.margin > LEAST_MARGIN, "choose another seed: equality would hang on rounding"

    sequences = generate_all(load_stages(reference.folder, CUTS[n_stages]), reference.prompts)

    assert [[sampled.token_id for sampled in one.sampled] for one in sequences] == reference.answers


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "gpt_oss"])
def test_packed_layers_equal_transformers(
    model_type: str, reference_of: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs where there is no compiler. Layers of these sizes would stay plain."""
    reference = reference_of(model_type)
    monkeypatch.setattr(native_modules, "KERNELS", None)
    monkeypatch.setitem(packed.WORTH_ELEMENTS, torch.float32, 0)

    stages = load_stages(reference.folder, CUTS[2])

    modules = [module for stage in stages for module in stage.splice.model.modules()]
    n_packed = sum(isinstance(module, packed.PackedLinear) for module in modules)
    if packed.can_pack(torch.float32, torch.device("cpu")):
        assert n_packed >= 4 * N_LAYERS + 1
    sequences = generate_all(stages, reference.prompts)
    assert [[sampled.token_id for sampled in one.sampled] for one in sequences] == reference.answers


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3"])
def test_stages_without_kernels_equal_transformers(
    model_type: str, reference_of: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host without a compiler: plain heads, a window, soft caps, sinks, narrow heads."""
    reference = reference_of(model_type)
    monkeypatch.setattr(native_attention, "KERNELS", None)

    sequences = generate_all(load_stages(reference.folder, CUTS[2]), reference.prompts)

    assert [[sampled.token_id for sampled in one.sampled] for one in sequences] == reference.answers


def test_sharded_folder_is_sharded(reference_of: Callable[[str], Reference]) -> None:
    folder = reference_of("llama").folder

    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2"])
def test_half_precision_is_near_the_reference(
    model_type: str, dtype: str, reference_of: Callable[[str], Reference]
) -> None:
    reference = reference_of(model_type)
    prompt = reference.prompts[2]
    model = read_reference(reference.folder, getattr(torch, dtype))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)

    stages = load_stages(reference.folder, CUTS[2], dtype)
    blocks = list(range(8))
    run_step(stages, [Row(start=0, n_tokens=33, blocks=blocks)], prompt[:33])
    row = Row(start=33, n_tokens=1, blocks=blocks, sample=SamplingParams(n_logprobs=5))
    [sampled] = run_step(stages, [row], prompt[33:])

    for token_id, logprob in sampled.top:
        assert logprob == pytest.approx(float(expected[token_id]), abs=0.25)
