"""Which models can be served: the architectures that the golden tests hold equal to `transformers`.

Importable without torch, so that a daemon can refuse a model before a worker loads anything. A model type
that is not listed might run and silently give wrong tokens (masks, recurrent state, packed batches); hence
the closed list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hexmesh.errors import InvalidInput, Refused

SUPPORTED_MODEL_TYPES: tuple[str, ...] = (
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)

_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
"""Rope types that choose frequencies from the longest sequence of the whole batch."""

_NEXT_STEP = "supported model types: " + ", ".join(SUPPORTED_MODEL_TYPES)


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """The model folder's config.json. Raises InvalidInput when there is none or it is no JSON object."""
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror or error}", next_step="point --model at a model folder"
        ) from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{path} is not a JSON object")
    return config


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise Refused, naming the blocker, unless stages of this config's model equal `transformers`."""
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise _refusal(f"model type {model_type!r} is not supported")
    if config.get("quantization_config") is not None:
        raise _refusal("quantized weights are not supported", "use the float32, bfloat16 or float16 weights")
    if config.get("add_cross_attention"):
        raise _refusal("models with cross-attention are not supported")
    for rope_type in _rope_types(config):
        if rope_type in _BATCH_DEPENDENT_ROPE:
            raise _refusal(
                f"rope type {rope_type!r} is not supported: it depends on the batch's longest sequence",
                "use a model with default, linear, llama3 or yarn rope",
            )


def _refusal(message: str, next_step: str = _NEXT_STEP) -> Refused:
    return Refused(message, code="unsupported_model", next_step=next_step)


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Every rope type named by a config, old spelling and new, also one per kind of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        yield from _nested_rope_types(config.get(key))


def _nested_rope_types(value: object) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        if key in ("rope_type", "type") and isinstance(inner, str):
            yield inner
        else:
            yield from _nested_rope_types(inner)
