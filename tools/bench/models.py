"""Random models to measure with: the right shape matters to speed, the words do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "hexmesh" / "assets" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make_m125(folder: Path) -> Path:
    """A random 124.7 M parameter Llama in float32 (hidden 768, 12 layers, 4 KV heads, vocabulary 32000).

    Seeded. Its tokenizer is the shipped model's, so only prompts given as token ids make full use of the vocabulary.
    """
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(1234)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(SHIPPED_MODEL / name, folder / name)
    return folder


def random_prompt(n_tokens: int, seed: int) -> list[int]:
    """Uniform random ids in [10, 32000)."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(10, 32000, (n_tokens,), generator=generator)]
