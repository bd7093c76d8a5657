"""Messages of the data plane: steps through a pipeline's stages, and requests from gateway to driver.

Stages keep no per-sequence state but KV in blocks: every row of a step names its blocks, so a step can be
judged by its epoch alone. Tensors travel beside the message, as the frame's payload.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hexmesh.wire.control import Cert, Epoch

FinishReason = Literal["stop", "length"]

MAX_STEP_ROWS = 1024
MAX_STEP_TOKENS = 4096
"""Many times what a driver batches: it bounds what the attention of one hostile step can allocate."""

MAX_STAGES = 1024
MAX_DRAFTS = 64
"""Guesses that one row may bring."""
MAX_LOGIT_BIAS = 300
"""Tokens that one request may push up or down."""
MAX_STOP_TOKENS = 256
"""Tokens that end one request's answers."""
MAX_LOGPROBS = 20
"""Likeliest tokens that are named beside a token."""
MAX_PAST_BYTES = 512 * 1024
"""Of one list of a row's past. What tokens of one context come to is far below it."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
_Bias = tuple[_Id, Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]]
_StopTokens = Annotated[list[_Id], msgspec.Meta(max_length=MAX_STOP_TOKENS)]
_Packed = Annotated[bytes, msgspec.Meta(max_length=MAX_PAST_BYTES)]
_Pools = Annotated[list[Annotated[str, msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=MAX_STAGES)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How to draw a token. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave the filter out.

    The order is bias, penalties, barred tokens, temperature, top_k, top_p, min_p.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 0.0
    top_p: _Share = 1.0
    top_k: _Id = 0
    min_p: _Share = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100.0)] = 1.0
    """Logits of tokens in prompt and output are divided by it, or multiplied where they are below 0."""
    presence_penalty: _Penalty = 0.0
    """Taken off the logit of every token in the output."""
    frequency_penalty: _Penalty = 0.0
    """Taken off as often as the output has the token."""
    logit_bias: Annotated[list[_Bias], msgspec.Meta(max_length=MAX_LOGIT_BIAS)] = []
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """Philox key; 0 <= seed < 2**63."""
    choice: _Id = 0
    """Which of a request's n answers this is: first half of the Philox counter."""
    n_logprobs: Annotated[int, msgspec.Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """-1: no log-probabilities; 0: of the drawn token; k: also of the k likeliest tokens."""

    @property
    def needs_past(self) -> bool:
        """Whether a draw depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Past(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Which tokens a sequence holds already, drafts left out: what its penalties need, each list packed.

    See `hexmesh.wire.token_lists`. Stages remember nothing of a sequence, so it comes with every draw.
    """

    prompt: _Packed = b""
    """Distinct tokens of the prompt; empty without a repetition penalty."""
    output: _Packed = b""
    """Distinct tokens of the output."""
    counts: _Packed = b""
    """How often each of `output` came."""


class Barred(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Tokens that the row's first `n_draws` draws may not give: an answer's ends before its least length."""

    token_ids: _StopTokens
    n_draws: Annotated[int, msgspec.Meta(ge=1, le=MAX_DRAFTS + 1)] = 1


class Scoring(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Prompt tokens whose log-probability is wanted: `followers[i]` follows the row's token `first + i`."""

    first: _Id
    followers: Annotated[list[_Id], msgspec.Meta(max_length=MAX_STEP_TOKENS)]
    n_top: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] = 0


class Row(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One sequence's part of a ragged batch: n_tokens consecutive tokens from absolute position `start`."""

    start: int
    n_tokens: int
    blocks: list[int]
    """The sequence's whole block table: block i holds positions [i * block_tokens, (i + 1) * block_tokens)."""
    sample: SamplingParams | None = None
    """Set when the token after this row's last one is wanted."""
    drafts: Annotated[list[_Id], msgspec.Meta(max_length=MAX_DRAFTS)] = []
    """The row's last tokens where they are guesses: a token is drawn before, between and after them."""
    past: Past | None = None
    """With `sample`, where its penalties need it."""
    barred: Barred | None = None
    scoring: Scoring | None = None


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A drawn token, with natural-log probabilities (of the unfiltered, temperature-1 distribution) if asked for."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class ScoredToken(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A prompt token with its log-probability, its place among all tokens (1: the likeliest), and the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A ragged batch on its way to stage `stage` of a replica. Payload: hidden states (n_tokens, hidden_size)."""

    epoch: Epoch
    cert: Cert | None
    """Proof that the epoch was decided: with rows that open a sequence, and until all stages know the epoch."""
    replica: str
    stage: int
    step: int
    driver: str
    rows: Annotated[list[Row], msgspec.Meta(max_length=MAX_STEP_ROWS)]
    kept_pools: _Pools = []
    """After a change of epoch that leaves the replica as it is: each stage's KV pool that the rows rely on."""
    stage_seconds: list[_Seconds] = []
    """Compute time of the stages passed so far."""
    queue_seconds: list[_Seconds] = []
    """How long the step waited in their workers, for others to be computed."""
    pools: _Pools = []
    """The KV pools of the stages passed so far, as their workers name them."""


class StepResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the last stage to the driver: a list for each row that asked, in row order."""

    epoch: Epoch
    replica: str
    step: int
    sampled: list[list[SampledToken]]
    """One token, or one more than the row brought drafts: what was drawn where each draft stands, and after."""
    scored: list[list[ScoredToken]] = []
    """For each row with a `scoring`, all of its followers."""
    stage_seconds: list[_Seconds]
    queue_seconds: list[_Seconds] = []
    pools: _Pools = []


class StepRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage does not run this step: another epoch, or its worker is gone. Carries the refuser's certificate."""

    epoch: Epoch
    replica: str
    stage: int
    step: int
    reason: str
    is_transient: bool = False
    """The epoch is right but the step got lost on its way; running it again does no harm."""
    is_pool_new: bool = False
    """The stage is there, but the KV that the rows rely on is not: only their sequences must start over."""
    cert: Cert | None = None


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Gateway to driver: continue one sequence after prompt + emitted. A later attempt replaces an earlier one."""

    sequence: str
    attempt: int
    epoch: Epoch
    replica: str
    prompt: list[int]
    emitted: list[int]
    max_tokens: int
    """Output tokens in all, emitted ones included."""
    stop_token_ids: _StopTokens
    sampling: SamplingParams
    min_tokens: _Count = 0
    """Until the output has as many, no stop token is drawn."""
    n_prompt_logprobs: Annotated[int, msgspec.Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """0 or more: score the prompt, and name as many of the likeliest tokens at each position."""
    n_scored: _Count = 0
    """Prompt tokens that were scored by earlier attempts; the first token has no score and is not counted."""
    priority: int = 0
    """Lower comes first."""
    timeout_s: _Seconds | None = None
    """What is left of the request's time; nobody waits for it after that."""


class Generated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Driver to gateway: output tokens from index `first` on; the last message carries finish_reason."""

    sequence: str
    attempt: int
    first: _Count
    tokens: list[SampledToken]
    finish_reason: FinishReason | None = None


class PromptScored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Driver to gateway: scores of the prompt, `first` having been given before; in order, before any token."""

    sequence: str
    attempt: int
    first: _Count
    scores: list[ScoredToken]


class GenerateFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Driver to gateway: this attempt ended. `retry`: another attempt may work; `busy`: the queue is full."""

    sequence: str
    attempt: int
    reason: str
    retry: bool
    busy: bool = False
    cert: Cert | None = None


class GenerateCancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Gateway to driver: nobody waits for this sequence any more; free its blocks."""

    sequence: str
    attempt: int


class ReplicaIdle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Driver to every host of a plan that drains: nothing will run in this replica of that epoch any more."""

    replica: str
    epoch: Epoch


class ReplicaStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Driver to every host of its plan, about once a second: what its replica does just now."""

    replica: str
    epoch: Epoch
    requests_running: _Count
    requests_waiting: _Count
    kv_blocks_total: _Count
    kv_blocks_free: _Count
    """What new sequences can get, cached blocks included."""
    kv_blocks_cached: _Count = 0
    kv_blocks_leased: _Count = 0
    steps_in_flight: _Count = 0
    tokens_per_s: Annotated[float, msgspec.Meta(ge=0.0)]
    stage_busy: list[_Share]
    is_broken: bool = False
    """It runs nothing any more: requests go to other replicas, or wait for another plan."""


DATA_MESSAGE = (
    Step
    | StepResult
    | StepRefused
    | Generate
    | Generated
    | PromptScored
    | GenerateFailed
    | GenerateCancel
    | ReplicaIdle
    | ReplicaStats
)
