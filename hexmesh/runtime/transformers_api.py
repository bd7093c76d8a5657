"""What we use of `transformers`, private names included; written against 5.23, believed good from 5.17 on.

`pyproject.toml` pins that range and the golden tests are the conformance test. When a release moves one of
these names, this is the only module to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from hexmesh.runtime import attention

_RECORD: ContextVar[dict[int, dict[str, object]] | None] = ContextVar(
    "hexmesh_attention_record", default=None
)
_ATTEND_OPTIONS = ("scaling", "sliding_window", "softcap", "s_aux")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Paged attention; notes how it is called where somebody records that."""
    record = _RECORD.get()
    if record is not None:
        layer_index: int = module.layer_idx  # type: ignore[assignment]
        record[layer_index] = {name: options[name] for name in _ATTEND_OPTIONS if name in options}
    return attention.attend(module, query, key, value, attention_mask, **options)


@contextmanager
def recording_attention() -> Iterator[dict[int, dict[str, object]]]:
    """Collects, by layer index, what model code passes to attention beside tensors."""
    record: dict[int, dict[str, object]] = {}
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


AttentionInterface.register(attention.NAME, _attend)
transformers_logging.disable_progress_bar()

Config = Any
"""A transformers config; its attributes differ by architecture."""


def load_config(model_dir: Path) -> Config:
    """The model's config with transformers' defaults filled in; never runs code from the folder."""
    return AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)


def build_on_meta(config: Config, device: torch.device) -> torch.nn.Module:
    """The whole model, without memory, in float32.

    Always float32: any other dtype would be set as the process's default while the model is built, and steps
    of other stages run meanwhile. The experts' plain loop is kept on the CPU, where grouped kernels are not
    exact.
    """
    options = {"experts_implementation": "eager"} if device.type == "cpu" else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention.NAME,
            trust_remote_code=False,
            **options,
        )
    model.eval()
    model.all_tied_weights_keys = {}  # we tie ourselves: the embedding may be shared with another stage
    return model  # type: ignore[no-any-return]


def set_parameter_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a meta model's parameters another dtype; buffers, such as rotary frequencies, stay as they are."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                empty = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)


class KeyMap:
    """Which checkpoint keys a model takes, after transformers' renamings and conversions."""

    def __init__(self, model: torch.nn.Module) -> None:
        transforms = get_model_conversion_mapping(model)
        self.transforms = transforms
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._state = model.state_dict()
        self._prefix: str = model.base_model_prefix  # type: ignore[assignment]

    def target(self, key: str) -> str | None:
        """The parameter that checkpoint key `key` becomes, or goes into; None if the model has none such."""
        renamed = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)[0]
        return renamed if renamed in self._state else None


def load_tensors(
    model: torch.nn.Module, tensors: dict[str, Any], keys: KeyMap, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Put checkpoint tensors (or lazy slices) into a meta model and compute its other buffers.

    Returns what is wrong: parameters that got no tensor, or one of another shape. Then nothing else was done.
    """
    order = LoadStateDictConfig(dtype=dtype, weight_mapping=keys.transforms, device_map={"": device})
    info, _ = convert_and_load_state_dict_in_model(model, tensors, order)
    problems = [f"{key} is missing" for key in sorted(info.missing_keys)]
    problems += [
        f"{key} has shape {tuple(is_)}, not {tuple(want)}" for key, is_, want in info.mismatched_keys
    ]
    problems += [str(error) for error in info.conversion_errors.values()]
    if not problems:
        model._move_missing_keys_from_meta_to_device(set(), order.device_map, None, None)  # type: ignore[operator]
        model._initialize_missing_keys(False)  # type: ignore[operator]
    return problems
