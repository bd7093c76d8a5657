"""From a model folder to a loaded stage, in two steps.

It is drafted on the meta device, where its sizes are known and nothing is read; then it is filled from the
checkpoint, reusing parts that are loaded already.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hexmesh.architectures import check_supported, read_config
from hexmesh.errors import InvalidInput
from hexmesh.runtime import native_modules
from hexmesh.runtime.device import DTYPES
from hexmesh.runtime.kv_pool import KvPool, KvShape, pool_bytes
from hexmesh.runtime.packed import can_pack, pack_linears
from hexmesh.runtime.replacing import replace_modules
from hexmesh.runtime.splice import EMBEDDING, HEAD, Elsewhere, Splice, kv_shape, splice
from hexmesh.runtime.stage import Stage, StageLimits
from hexmesh.runtime.transformers_api import (
    KeyMap,
    build_on_meta,
    load_config,
    load_tensors,
    set_parameter_dtype,
)
from hexmesh.runtime.weights import Checkpoint
from hexmesh.wire.worker import LoadStage


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDraft:
    """A stage without memory, and how much it will take."""

    order: LoadStage
    splice: Splice
    checkpoint: Checkpoint
    wanted: tuple[str, ...]
    """Checkpoint keys of the stage."""
    limits: StageLimits
    shapes: list[KvShape]
    dtype: torch.dtype
    device: torch.device
    part_bytes: Mapping[str, int]
    """Weights of every part, which other stages may share."""
    rest_bytes: int
    """Weights outside the parts, the stage's own."""

    @property
    def weight_bytes(self) -> int:
        return sum(self.part_bytes.values()) + self.rest_bytes

    @property
    def pool_bytes(self) -> int:
        return pool_bytes(self.shapes, self.order.kv_blocks, self.order.block_tokens, self.dtype)

    def make_pool(self, n_blocks: int) -> KvPool:
        """Reserve KV memory."""
        return KvPool(
            start=self.splice.start,
            shapes=self.shapes,
            n_blocks=n_blocks,
            block_tokens=self.order.block_tokens,
            dtype=self.dtype,
            device=self.device,
        )

    def make_stage(self, pool: KvPool) -> Stage:
        """A stage on a pool of its layers; the weights are filled."""
        return Stage(
            splice=self.splice,
            pool=pool,
            limits=self.limits,
            dtype=self.dtype,
            device=self.device,
        )


def name_tensors(order: LoadStage, device: torch.device) -> list[str]:
    """The checkpoint's tensors that this stage takes; they need not be here. Raises Refused or InvalidInput."""
    return list(_cut(order, device).wanted)


def draft_stage(order: LoadStage, device: torch.device) -> StageDraft:
    """Check everything that can be checked without reading weights. Raises Refused or InvalidInput."""
    draft = _cut(order, device)
    draft.checkpoint.check_files(draft.wanted)
    return draft


def _cut(order: LoadStage, device: torch.device) -> StageDraft:
    model_dir = Path(order.model_dir)
    check_supported(read_config(model_dir))
    if order.block_tokens < 1 or order.kv_blocks < 1:
        raise InvalidInput(f"a pool of {order.kv_blocks} blocks of {order.block_tokens} tokens")
    config = load_config(model_dir)
    checkpoint = Checkpoint(model_dir)
    model = build_on_meta(config, device)
    cut = splice(model, config, order.start, order.stop, checkpoint.keys)
    dtype = DTYPES[order.dtype]
    set_parameter_dtype(model, dtype)
    keys = KeyMap(model)
    wanted = tuple(key for key in checkpoint.keys if keys.target(key) is not None)
    part_bytes = {name: _parameter_bytes(cut.part(name)) for name in cut.paths}
    return StageDraft(
        order=order,
        splice=cut,
        checkpoint=checkpoint,
        wanted=wanted,
        limits=StageLimits(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
        ),
        shapes=[kv_shape(config)] * (order.stop - order.start),
        dtype=dtype,
        device=device,
        part_bytes=part_bytes,
        rest_bytes=_parameter_bytes(model) - sum(part_bytes.values()),
    )


def fill(draft: StageDraft, shared: Mapping[str, nn.Module]) -> None:
    """Read the draft's weights, except for `shared` parts, which are put in place. Raises InvalidInput."""
    cut = draft.splice
    for name in shared:
        cut.replace_part(name, Elsewhere())
    keys = KeyMap(cut.model)
    wanted = [key for key in draft.wanted if keys.target(key) is not None]
    with ExitStack() as files:
        slices = draft.checkpoint.slices(wanted, files)
        problems = load_tensors(cut.model, slices, keys, draft.dtype, draft.device)
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise InvalidInput(f"the weights in {draft.order.model_dir} do not fit its config: {shown}")
    cut.model.requires_grad_(False)
    is_native = native_modules.serves(draft.dtype, draft.device)
    if not is_native and can_pack(draft.dtype, draft.device):
        _pack_parts(cut, shared)
    for name, module in shared.items():
        cut.replace_part(name, module)
    cut.tie()
    if is_native:
        replace_modules(draft.make_stage(draft.make_pool(1)), shared)


def _pack_parts(cut: Splice, shared: Mapping[str, nn.Module]) -> None:
    """Pack what was just loaded. A tied head stays plain: packed, it would be a copy of the embedding."""
    for name in cut.paths:
        if name not in shared and name != EMBEDDING and not (name == HEAD and cut.is_tied):
            cut.replace_part(name, pack_linears(cut.part(name)))


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
