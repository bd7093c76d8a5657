"""The smallest set of tokens that holds a share of the probability, for wide ones: found without sorting.

A histogram by the leading bits of the weights says in which narrow bin the least likely token of the set lies;
only that bin is sorted.
"""

from __future__ import annotations

import torch

_SHIFT = 16
_N_BINS = (0x3F800000 >> _SHIFT) + 1
"""Weights are from 0 to 1: as bits, from 0 to 0x3F800000, in the same order."""


def nucleus(weights: torch.Tensor, total: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """The weights, 0 outside each row's nucleus; tokens as likely as its last one stay.

    `weights` (n_rows, vocab_size) float32 from 0 to 1, `total` their sums (n_rows, 1).
    """
    bins = weights.view(torch.int32) >> _SHIFT
    least = [
        _least_weight(row_weights, row_bins, share * float(row_total))
        for row_weights, row_bins, share, row_total in zip(weights, bins, top_p, total, strict=True)
    ]
    return weights.masked_fill(weights < torch.tensor(least, device=weights.device)[:, None], 0.0)


def _least_weight(weights: torch.Tensor, bins: torch.Tensor, wanted: float) -> float:
    """Of the last token, by falling weight, that is needed for a sum of `wanted`."""
    held = torch.bincount(bins, weights=weights, minlength=_N_BINS)
    upto = held.flip(0).cumsum(0)  # of the likeliest bins
    place = int(torch.searchsorted(upto, wanted).clamp(max=_N_BINS - 1))
    before = float(upto[place - 1]) if place else 0.0
    inside = weights[bins == _N_BINS - 1 - place].sort(descending=True).values
    if not len(inside):  # rounding: the whole vocabulary is needed
        return 0.0
    last = torch.searchsorted(inside.double().cumsum(0), wanted - before).clamp(max=len(inside) - 1)
    return float(inside[last])
