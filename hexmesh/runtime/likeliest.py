"""The largest logits of each row, found through the maxima of chunks: one pass over the vocabulary.

The k largest of a row lie in the k chunks with the largest maxima, so the rest is never looked at again. What a
row gives depends on that row and k alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import torch

Reduction = Callable[..., torch.Tensor]
"""torch.amax or torch.sum."""

_CHUNK = 64
_SLICE_LOGITS = 2**20
"""Rows are worked on in slices of about so many logits: they stay in cache, and copies stay small."""


def slices(rows: list[int], vocab_size: int, device: torch.device) -> Iterator[list[int]]:
    """Rows in portions that are worked on at once; on a GPU that is all of them."""
    n_rows = max(1, _SLICE_LOGITS // vocab_size) if device.type == "cpu" else len(rows)
    for start in range(0, len(rows), n_rows):
        yield rows[start : start + n_rows]


def take_rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows in float32: the very memory of `logits` where that can be."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return logits[rows[0] : rows[-1] + 1].float()
    return logits[rows].float()


class Peaks:
    """Rows of finite logits with the maxima of their chunks.

    A row with NaN or infinity at its top is mended first: NaN counts as 0, infinities as the largest numbers.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits  # (n_rows, vocab_size) float32
        self._maxima = chunked(logits, torch.amax)  # (n_rows, n_chunks)
        self.top = self._maxima.amax(dim=-1, keepdim=True)  # (n_rows, 1)
        if not bool(self.top.isfinite().all()):
            self.logits = torch.nan_to_num(logits, nan=0.0)
            self._maxima = chunked(self.logits, torch.amax)
            self.top = self._maxima.amax(dim=-1, keepdim=True)

    def of(self, rows: list[int]) -> Peaks:
        """Some of the rows."""
        if len(rows) == len(self.logits):
            return self
        part = copy(self)
        part.logits, part._maxima, part.top = self.logits[rows], self._maxima[rows], self.top[rows]
        return part

    def first(self) -> torch.Tensor:
        """Each row's likeliest token, the first of equals (n_rows,)."""
        chunk = self._maxima.argmax(dim=-1, keepdim=True)
        values, ids = self._of_chunks(chunk)
        return ids.gather(1, values.argmax(dim=-1, keepdim=True))[:, 0]

    def likeliest(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The n largest logits of each row, falling, and their tokens: (n_rows, n) each."""
        if 2 * n >= self._maxima.shape[1]:
            found = self.logits.topk(n, dim=-1)
            return found.values, found.indices
        values, ids = self._of_chunks(self._maxima.topk(n, dim=-1, sorted=False).indices)
        values, places = values.topk(n, dim=-1)
        return values, ids.gather(1, places)

    def _of_chunks(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and tokens of some chunks of each row; what a last chunk lacks is -inf."""
        vocab_size = self.logits.shape[1]
        ids = (chunks[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=chunks.device)).flatten(1)
        if vocab_size % _CHUNK == 0:
            return self.logits.gather(1, ids), ids
        values = self.logits.gather(1, ids.clamp(max=vocab_size - 1))
        return values.masked_fill(ids >= vocab_size, -torch.inf), ids


def chunked(values: torch.Tensor, reduce: Reduction) -> torch.Tensor:
    """Each chunk of a row reduced to one number: (n_rows, n_chunks)."""
    n_whole = values.shape[1] // _CHUNK
    whole = values[:, : n_whole * _CHUNK].unflatten(1, (n_whole, _CHUNK))  # type: ignore[no-untyped-call]
    reduced = reduce(whole, dim=-1)
    if n_whole * _CHUNK == values.shape[1]:
        return reduced
    return torch.cat([reduced, reduce(values[:, n_whole * _CHUNK :], dim=-1, keepdim=True)], dim=-1)


def chunk_of(values: torch.Tensor, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of each row (n_rows, n) with 0 for what a last chunk lacks, and its tokens; chunks (n_rows, 1)."""
    ids = chunks * _CHUNK + torch.arange(_CHUNK, device=chunks.device)
    vocab_size = values.shape[1]
    return values.gather(1, ids.clamp(max=vocab_size - 1)).masked_fill(ids >= vocab_size, 0.0), ids
