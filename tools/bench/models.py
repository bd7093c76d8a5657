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
    return _make_llama(folder, n_kv_heads=4)


def make_mha134(folder: Path) -> Path:
    """The same with 12 KV heads, so with three times the KV to read: 134.1 M parameters."""
    return _make_llama(folder, n_kv_heads=12)


def make_1b(folder: Path) -> Path:
    """A random Llama of 1.1 G parameters (hidden 2048, 22 layers, 4 KV heads, vocabulary 32000), kept in bfloat16."""
    return _make_llama(
        folder, hidden=2048, intermediate=5632, n_layers=22, n_heads=32, n_kv_heads=4, dtype=torch.bfloat16
    )


def _make_llama(
    folder: Path,
    *,
    hidden: int = 768,
    intermediate: int = 2048,
    n_layers: int = 12,
    n_heads: int = 12,
    n_kv_heads: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(1234)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(SHIPPED_MODEL / name, folder / name)
    return folder


def random_prompt(n_tokens: int, seed: int) -> list[int]:
    """Uniform random ids in [10, 32000)."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(10, 32000, (n_tokens,), generator=generator)]
