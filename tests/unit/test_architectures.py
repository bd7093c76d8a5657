"""Models that are refused by name before anything loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hexmesh.architectures import SUPPORTED_MODEL_TYPES, check_supported, read_config
from hexmesh.errors import InvalidInput, Refused


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_supported_types_pass(model_type: str) -> None:
    check_supported({"model_type": model_type, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({}, "None"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        (
            {"model_type": "gemma2", "rope_scaling": {"full_attention": {"type": "dynamic"}}},
            "dynamic",
        ),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "cross-attention"),
    ],
)
def test_others_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named) as caught:
        check_supported(config)

    assert caught.value.code == "unsupported_model"
    assert caught.value.next_step


def test_unknown_type_is_told_what_is_supported() -> None:
    with pytest.raises(Refused) as caught:
        check_supported({"model_type": "mamba"})

    assert all(model_type in caught.value.next_step for model_type in SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("content", [None, b"{", b"[1]"])
def test_config_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(InvalidInput):
        read_config(tmp_path)


def test_importing_needs_no_torch() -> None:
    """A daemon refuses a model before a worker is asked."""
    code = (
        "import sys, hexmesh.architectures, hexmesh.runtime, daemon.compute.workers; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
