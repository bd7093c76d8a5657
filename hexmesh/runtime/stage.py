"""One stage of a pipeline on a device:

layers [start, stop), their KV pool, and running ragged batches through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hexmesh.errors import InvalidInput
from hexmesh.runtime.attention import RunContext, running
from hexmesh.runtime.kv_pool import KvPool
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.runtime.splice import EMBEDDING, CutReached, Splice
from hexmesh.runtime.torch_attention import Scratch
from hexmesh.runtime.wanted import Wanted, wanted_of
from hexmesh.wire.data import Row, SampledToken, SamplingParams, ScoredToken


@dataclass(frozen=True, slots=True)
class StageOutput:
    """Hidden states for the next stage, or, from the last one, tokens and scores for each row that asked."""

    hidden: torch.Tensor | None  # (n_tokens, hidden_size)
    sampled: list[list[SampledToken]] = field(default_factory=list)
    scored: list[list[ScoredToken]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What a step may not exceed, so that nothing is indexed outside the model."""

    hidden_size: int
    vocab_size: int
    max_positions: int


class Stage:
    """Runs steps of loaded layers. One thread at a time for all stages of a device; `pool` may be another's too."""

    def __init__(
        self, *, splice: Splice, pool: KvPool, limits: StageLimits, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.splice = splice
        self.pool = pool
        self.limits = limits
        self._dtype = dtype
        self._device = device
        self._scratch = Scratch()

    @property
    def payload_dtype(self) -> torch.dtype:
        """Of what `run` takes: token ids on the first stage, hidden states on the others."""
        return torch.int64 if self.splice.is_first else self._dtype

    def run(self, rows: list[Row], payload: torch.Tensor) -> StageOutput:
        """Compute all rows' tokens, in order, and store their KV.

        `payload`: token ids (n_tokens,) int64 for the first stage, else hidden states (n_tokens,
        hidden_size). Raises InvalidInput, before anything is touched, when rows, blocks and payload do not
        fit each other.
        """
        self._check(rows, payload)
        wanted = wanted_of(rows, self.limits.vocab_size) if self.splice.is_last else Wanted()
        return self._forward(rows, payload.to(self._device), wanted)

    def context(self, rows: list[Row]) -> RunContext:
        """What attention is to know about a step of these rows."""
        batch = RaggedBatch(rows, self.pool.block_tokens, self._device)
        return RunContext(self.pool, batch, scratch=self._scratch)

    def random_payload(self, n_tokens: int) -> torch.Tensor:
        """A seeded payload for as many tokens, to try modules with."""
        generator = torch.Generator().manual_seed(0)
        if self.splice.is_first:
            return torch.randint(self.limits.vocab_size, (n_tokens,), generator=generator)
        return torch.randn(n_tokens, self.limits.hidden_size, generator=generator).to(self._dtype)

    def warm_up(self) -> None:
        """A small prefill and decode in block 0: pages weights in.

        For a stage made for that, on a pool of its own.
        """
        n_tokens = min(2, self.pool.block_tokens)
        for start, stop in ((0, n_tokens), (n_tokens - 1, n_tokens)):
            row = Row(start=start, n_tokens=stop - start, blocks=[0], sample=SamplingParams())
            shape = (row.n_tokens,) if self.splice.is_first else (row.n_tokens, self.limits.hidden_size)
            self.run([row], torch.zeros(shape, dtype=self.payload_dtype))

    @torch.inference_mode()
    def _forward(self, rows: list[Row], payload: torch.Tensor, wanted: Wanted) -> StageOutput:
        context = self.context(rows)
        context.hidden = None if self.splice.is_first else payload[None]
        with running(context):
            try:
                return self._to_tokens(wanted, context.batch, self._embedded(payload))
            except CutReached as cut:
                return StageOutput(cut.hidden[0])

    def _embedded(self, payload: torch.Tensor) -> torch.Tensor:
        """What the model takes for its embeddings, (1, n_tokens, embedding_dim); unused by later stages."""
        if self.splice.is_first:
            return self.splice.part(EMBEDDING)(payload)[None]  # type: ignore[no-any-return]
        if payload.shape[1] == self.splice.embedding_dim:
            return payload[None]
        return payload.new_zeros(1, payload.shape[0], self.splice.embedding_dim)

    def _to_tokens(self, wanted: Wanted, batch: RaggedBatch, embedded: torch.Tensor) -> StageOutput:
        """Through the model; leaves by CutReached unless this is the last stage."""
        keep = torch.tensor(wanted.tokens, dtype=torch.int64, device=self._device)
        out = self.splice.model(
            inputs_embeds=embedded,
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=keep,
        )
        return StageOutput(None, *wanted.answer(out.logits[0]))

    def _check(self, rows: list[Row], payload: torch.Tensor) -> None:
        for row in rows:
            self._check_row(row)
        n_tokens = sum(row.n_tokens for row in rows)
        shape = (n_tokens,) if self.splice.is_first else (n_tokens, self.limits.hidden_size)
        if not rows or tuple(payload.shape) != shape or payload.dtype != self.payload_dtype:
            raise InvalidInput(
                f"payload is {payload.dtype} {tuple(payload.shape)}, rows need {self.payload_dtype} {shape}"
            )
        if self.splice.is_first:
            least, most = int(payload.min()), int(payload.max())
            if least < 0 or most >= self.limits.vocab_size:
                raise InvalidInput(
                    f"token ids {least} to {most} with a vocabulary of {self.limits.vocab_size}"
                )

    def _check_row(self, row: Row) -> None:
        stop = row.start + row.n_tokens
        room = len(row.blocks) * self.pool.block_tokens
        if row.start < 0 or row.n_tokens < 1 or stop > min(room, self.limits.max_positions):
            raise InvalidInput(
                f"a row at positions [{row.start}, {stop}) has blocks for {room} "
                f"and the model {self.limits.max_positions}"
            )
        if min(row.blocks) < 0 or max(row.blocks) >= self.pool.n_blocks:
            raise InvalidInput(
                f"block ids {min(row.blocks)} to {max(row.blocks)} with a pool of {self.pool.n_blocks}"
            )
