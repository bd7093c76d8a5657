"""A ragged batch laid out for paged attention: where each token's KV goes, and what each row reads.

The kernels take rows and block tables as they are, in two arrays. For torch, rows of one token are read
together, in groups whose tables differ at most twofold in length; longer rows (prefill chunks) are read one
by one. All of it is made at most once a step, for all layers.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hexmesh.wire.data import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Rows of one token each, read as one padded batch."""

    tokens: torch.Tensor  # (n_rows,) indices into the batch's tokens
    gather: (
        torch.Tensor
    )  # (n_rows * n_kv_heads * n_blocks,) rows of the pool seen as (n_blocks * n_kv_heads, ...)
    visible: torch.Tensor  # (n_rows, n_blocks * block_tokens) bool
    n_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A row of several tokens. `gather` and `visible` are None where it attends to itself alone, causally."""

    start: int
    stop: int
    gather: torch.Tensor | None  # (n_kv_heads * n_blocks,)
    visible: torch.Tensor | None  # (n_tokens, n_blocks * block_tokens) bool


@dataclass(frozen=True, slots=True)
class Reads:
    """How all rows read one kind of layer."""

    groups: list[DecodeGroup]
    chunks: list[Chunk]


class RaggedBatch:
    """One step's rows on a device."""

    def __init__(self, rows: list[Row], block_tokens: int, device: torch.device) -> None:
        self._rows = rows
        self._block_tokens = block_tokens
        self._device = device
        self._starts = np.cumsum([0, *(row.n_tokens for row in rows)])
        self.n_tokens = int(self._starts[-1])
        self.n_threads = torch.get_num_threads()
        self._positions = np.concatenate([np.arange(row.start, row.start + row.n_tokens) for row in rows])
        self.positions = self._tensor(self._positions)  # (n_tokens,)
        self._slots: dict[int, torch.Tensor] = {}
        self._reads: dict[tuple[int, int | None], Reads] = {}

    @cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """For the kernels: where rows are described and how many, where block tables lie, of what length, n_tokens."""
        tables, rows = self._described
        return rows.ctypes.data, len(rows), tables.buffer_info()[0], len(tables), self.n_tokens

    @cached_property
    def _described(self) -> tuple[array[int], np.ndarray]:
        """All block tables in one, and for each row (first token, n_tokens, position, begin and length of its table).

        Those with the most to compute come first, so that threads end together.
        """
        tables = array("i")
        described = []
        for first_token, row in zip(self._starts.tolist(), self._rows, strict=False):
            described.append((first_token, row.n_tokens, row.start, len(tables), len(row.blocks)))
            tables.extend(row.blocks)
        described.sort(key=lambda row: -row[1] * (row[1] + row[2]))
        return tables, np.array(described, dtype=np.int32)

    @cached_property
    def _tables(self) -> list[np.ndarray]:
        return [np.asarray(row.blocks, dtype=np.int64) for row in self._rows]

    def slots(self, n_kv_heads: int) -> torch.Tensor:
        """Where each token's heads lie in a pool seen as (-1, head_dim); token-major."""
        found = self._slots.get(n_kv_heads)
        if found is None:
            blocks, offsets = self._places()
            head_rows = blocks[:, None] * n_kv_heads + np.arange(n_kv_heads)
            found = self._tensor((head_rows * self._block_tokens + offsets[:, None]).flatten())
            self._slots[n_kv_heads] = found
        return found

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Block of each token and its offset in there."""
        index, offsets = np.divmod(self._positions, self._block_tokens)
        parts = np.split(index, self._starts[1:-1])
        return np.concatenate([t[i] for t, i in zip(self._tables, parts, strict=True)]), offsets

    def reads(self, n_kv_heads: int, window: int | None) -> Reads:
        """How the rows read layers of that many heads and that sliding window."""
        found = self._reads.get((n_kv_heads, window))
        if found is None:
            found = Reads(self._decode_groups(n_kv_heads, window), self._chunks(n_kv_heads, window))
            self._reads[(n_kv_heads, window)] = found
        return found

    def _first_visible(self, position: int, window: int | None) -> int:
        """The first position that a query at `position` sees."""
        return 0 if window is None else max(0, position - window + 1)

    def _decode_groups(self, n_kv_heads: int, window: int | None) -> list[DecodeGroup]:
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            if row.n_tokens == 1:
                first = self._first_visible(row.start, window) // self._block_tokens
                n_blocks = row.start // self._block_tokens + 1 - first
                by_length.setdefault((n_blocks - 1).bit_length(), []).append(index)
        return [self._decode_group(indices, n_kv_heads, window) for _, indices in sorted(by_length.items())]

    def _decode_group(self, indices: list[int], n_kv_heads: int, window: int | None) -> DecodeGroup:
        position = np.array([self._rows[index].start for index in indices])
        first_visible = np.array([self._first_visible(int(at), window) for at in position])
        first_block = first_visible // self._block_tokens
        counts = position // self._block_tokens + 1 - first_block
        n_blocks = int(counts.max())
        # Padding repeats the row's own first block: always finite, and never visible.
        table = np.empty((len(indices), n_blocks), dtype=np.int64)
        for line, index in enumerate(indices):
            own = self._tables[index][first_block[line] : first_block[line] + counts[line]]
            table[line, : len(own)] = own
            table[line, len(own) :] = own[0]
        at = first_block[:, None] * self._block_tokens + np.arange(n_blocks * self._block_tokens)
        visible = (at <= position[:, None]) & (at >= first_visible[:, None])
        return DecodeGroup(
            tokens=self._tensor(self._starts[indices]),
            gather=self._tensor(_by_head(table, n_kv_heads)),
            visible=self._tensor(visible),
            n_blocks=n_blocks,
        )

    def _chunks(self, n_kv_heads: int, window: int | None) -> list[Chunk]:
        return [
            self._chunk(index, n_kv_heads, window) for index, row in enumerate(self._rows) if row.n_tokens > 1
        ]

    def _chunk(self, index: int, n_kv_heads: int, window: int | None) -> Chunk:
        row = self._rows[index]
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        if row.start == 0 and (window is None or row.n_tokens <= window):
            return Chunk(start=start, stop=stop, gather=None, visible=None)
        first_block = self._first_visible(row.start, window) // self._block_tokens
        last_block = (row.start + row.n_tokens - 1) // self._block_tokens
        table = self._tables[index][first_block : last_block + 1]
        at = first_block * self._block_tokens + np.arange(len(table) * self._block_tokens)
        query = np.arange(row.start, row.start + row.n_tokens)[:, None]
        visible = at <= query
        if window is not None:
            visible &= at > query - window
        return Chunk(
            start=start,
            stop=stop,
            gather=self._tensor(_by_head(table[None], n_kv_heads)),
            visible=self._tensor(visible),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _by_head(table: np.ndarray, n_kv_heads: int) -> np.ndarray:
    """Block tables (n_rows, n_blocks) as pool rows in the order (row, head, block)."""
    return (table[:, None, :] * n_kv_heads + np.arange(n_kv_heads)[None, :, None]).reshape(-1)
