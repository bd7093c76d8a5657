"""What travels between stages as bytes: token ids into the first, hidden states out of all but the last."""

from __future__ import annotations

import torch

from hexmesh.errors import InvalidInput
from hexmesh.runtime.stage import Stage, StageOutput


def tensor_from(payload: memoryview, stage: Stage) -> torch.Tensor:
    """The payload as what `stage.run` takes, not copied.

    Raises InvalidInput if it is no whole number of tokens.
    """
    dtype = stage.payload_dtype
    token_elements = 1 if stage.splice.is_first else stage.limits.hidden_size
    if not len(payload) or len(payload) % (dtype.itemsize * token_elements):
        raise InvalidInput(f"a payload of {len(payload)} bytes is no whole number of tokens")
    flat = torch.frombuffer(payload, dtype=dtype)
    return flat if stage.splice.is_first else flat.view(-1, token_elements)


def bytes_from(output: StageOutput) -> memoryview:
    """Hidden states as bytes in the compute dtype; empty from the last stage."""
    if output.hidden is None:
        return memoryview(b"")
    hidden = output.hidden.cpu().contiguous()
    return hidden.view(torch.uint8).numpy().reshape(-1).data
