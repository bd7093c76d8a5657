"""What changes logits before the temperature does: bias, penalties, barred tokens. Only named tokens are touched."""

from __future__ import annotations

import numpy as np
import torch

from hexmesh.runtime.draw import Draw


def edited(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Bias, repetition, presence and frequency penalty, and barred tokens, on a copy where there are any."""
    if not any(draw.has_edits for draw in draws):
        return logits
    logits = logits.clone()
    _add_biases(logits, draws)
    _divide_seen(logits, draws)
    _take_off_said(logits, draws)
    rows, tokens = _places([draw.barred for draw in draws], logits.device)
    logits[rows, tokens] = -torch.inf
    return logits


def _add_biases(logits: torch.Tensor, draws: list[Draw]) -> None:
    tokens = [[token for token, _ in draw.params.logit_bias] for draw in draws]
    _add(logits, tokens, [bias for draw in draws for _, bias in draw.params.logit_bias])


def _divide_seen(logits: torch.Tensor, draws: list[Draw]) -> None:
    rows, tokens = _places([draw.seen for draw in draws], logits.device)
    penalty = torch.tensor([draw.params.repetition_penalty for draw in draws], device=logits.device)[rows]
    before = logits[rows, tokens]
    logits[rows, tokens] = torch.where(before < 0, before * penalty, before / penalty)


def _take_off_said(logits: torch.Tensor, draws: list[Draw]) -> None:
    taken = [draw.params.presence_penalty + draw.params.frequency_penalty * draw.counts for draw in draws]
    _add(logits, [draw.output for draw in draws], -np.concatenate(taken))


def _add(
    logits: torch.Tensor, tokens: list[list[int]] | list[np.ndarray], amounts: list[float] | np.ndarray
) -> None:
    """Add to each row's tokens, `amounts` being those of all rows one after the other."""
    added = torch.as_tensor(amounts, dtype=torch.float32).to(logits.device)
    logits.index_put_(_places(tokens, logits.device), added, accumulate=True)


def _places(
    tokens: list[list[int]] | list[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens of an index into logits, for the tokens of each row."""
    rows = np.repeat(np.arange(len(tokens)), [len(one) for one in tokens])
    flat = np.concatenate([np.asarray(one, dtype=np.int64) for one in tokens])
    return torch.from_numpy(rows).to(device), torch.from_numpy(flat).to(device)
