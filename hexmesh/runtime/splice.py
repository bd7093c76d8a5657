"""A model cut down to layers [start, stop), without a line for any architecture.

The full model is built on the meta device, so that what depends on a layer's index stays right. Layers
outside the cut become `Skip`s: before the cut they hand on what the previous stage sent, after it they end
the forward. Whatever lies outside layers, embedding and head (rotary, final norm, learned positions) is small
and stays on every stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from hexmesh.errors import InvalidInput
from hexmesh.runtime.attention import current
from hexmesh.runtime.kv_pool import KvShape
from hexmesh.runtime.transformers_api import Config

EMBEDDING = "embedding"
HEAD = "head"


class CutReached(Exception):
    """Ends a forward after the stage's last layer; carries its output (1, n_tokens, hidden_size)."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Skip(nn.Module):
    """Stands where a layer of another stage was. Model code may read plain attributes of its layers."""

    def __init__(self, layer: nn.Module, *, is_before_cut: bool) -> None:
        super().__init__()
        self._is_before_cut = is_before_cut
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if not self._is_before_cut:
            raise CutReached(hidden_states)
        received = current().hidden
        assert received is not None, "a later stage runs with hidden states"
        return received


class Elsewhere(nn.Module):
    """Stands where an embedding or head of another stage was."""

    def forward(self, *args: object) -> NoReturn:
        raise AssertionError("this stage does not hold that module")


@dataclass(frozen=True, slots=True)
class Splice:
    """A spliced model and the places of the parts that stages of one worker may share."""

    model: nn.Module
    start: int
    stop: int
    n_layers: int
    is_tied: bool
    """The head's weight is the embedding's."""
    embedding_dim: int
    paths: dict[str, str]
    """Module path of every part that this stage holds: its layers, the embedding, the head."""

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop == self.n_layers

    def tie(self) -> None:
        """Let a tied head use the embedding's weight; both are in place."""
        if self.is_tied and self.is_last:
            self.part(HEAD).weight = self.part(EMBEDDING).weight

    def layer_parts(self) -> list[str]:
        return [layer_part(index) for index in range(self.start, self.stop)]

    def part(self, name: str) -> nn.Module:
        """The module that is the part now."""
        return self.model.get_submodule(self.paths[name])

    def replace_part(self, name: str, module: nn.Module) -> None:
        """Put another module in a part's place."""
        set_submodule(self.model, self.paths[name], module)


def layer_part(index: int) -> str:
    """Name of a layer as a part."""
    return f"layer {index}"


def splice(
    model: nn.Module, config: Config, start: int, stop: int, checkpoint_keys: Collection[str]
) -> Splice:
    """Cut a meta model down, in place. Raises InvalidInput if there are no such layers.

    A head that is tied by config but has a tensor of its own in the checkpoint is taken from there.
    """
    n_layers = int(config.num_hidden_layers)
    if not 0 <= start < stop <= n_layers:
        raise InvalidInput(f"layers [{start}, {stop}) of a model with {n_layers} layers")
    stack_path = _layer_stack_path(model, n_layers)
    is_first, is_last = start == 0, stop == n_layers
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding_path = path_of(model, embedding)
    head_path = path_of(model, model.get_output_embeddings())  # type: ignore[operator]
    is_tied = config.tie_word_embeddings and f"{head_path}.weight" not in checkpoint_keys
    paths = {layer_part(index): f"{stack_path}.{index}" for index in range(start, stop)}
    if is_first or (is_last and is_tied):
        paths[EMBEDDING] = embedding_path
    else:
        set_submodule(model, embedding_path, Elsewhere())
    if is_last:
        paths[HEAD] = head_path
        if is_tied:
            model.get_submodule(head_path).register_parameter("weight", None)
    else:
        set_submodule(model, head_path, Elsewhere())
    stack = model.get_submodule(stack_path)
    assert isinstance(stack, nn.ModuleList)
    for index in range(n_layers):
        if not start <= index < stop:
            stack[index] = Skip(stack[index], is_before_cut=index < start)
    _check_forward(model)
    return Splice(model, start, stop, n_layers, is_tied, embedding.embedding_dim, paths)


def kv_shape(config: Config) -> KvShape:
    """The KV heads of each layer; the warm-up forward checks it against real tensors."""
    n_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // n_heads)
    return KvShape(n_kv_heads, head_dim, head_dim)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Where a module lies in a model."""
    paths: list[str] = [path for path, module in model.named_modules() if module is wanted]
    return paths[0]


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path."""
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, module)


def _layer_stack_path(model: nn.Module, n_layers: int) -> str:
    """The shallowest module list with one module per layer."""
    stacks: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not stacks:
        raise InvalidInput(f"no list of {n_layers} layers in {type(model).__name__}")
    return min(stacks, key=lambda path: path.count("."))


def _check_forward(model: nn.Module) -> None:
    """Logits of chosen rows only: without it a prefill would compute the vocabulary for every token."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InvalidInput(f"{type(model).__name__} cannot give the logits of chosen tokens only")
