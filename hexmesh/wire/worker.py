"""Messages between a daemon and its worker processes, over a unix socket.

Tensors travel as the frame's payload.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hexmesh.plan import DtypeName
from hexmesh.wire.data import Row, SampledToken, ScoredToken

FailureKind = Literal["invalid", "refused", "no_room", "broken"]
"""Whose doing a failure was: the files or the order, our rules, the budget, or a step that broke."""


class LoadStage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Build layers [start, stop) and reserve their KV pool.

    Layers that another stage here holds are shared.
    """

    stage: str
    """The stage's key in this worker; unique for plan, replica and stage."""
    model_dir: str
    model_id: str
    start: int
    stop: int
    dtype: DtypeName
    kv_blocks: int
    block_tokens: int
    pool: str
    """Stages with the same layers, blocks and pool share their KV memory."""
    budget_bytes: int
    """Room for everything this worker holds."""


class NameTensors(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Which of the checkpoint's tensors would loading that stage take? Nothing is loaded."""

    order: LoadStage


class TensorsNamed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    stage: str
    names: list[str]


class StageLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The stage can run steps. `pool_deferred`:

    its pool waits for another stage of this worker to be dropped.
    """

    stage: str
    load_s: float
    weight_bytes: int
    pool_bytes: int
    pool_deferred: bool
    n_layers_reused: int


class StageFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The stage could not be loaded, or broke in a step; it does not exist any more."""

    stage: str
    reason: str
    kind: FailureKind = "broken"


class StepFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """This step was nonsense, or its stage is not here; nothing was computed and the worker is as before."""

    stage: str
    step: int
    reason: str


class DropStage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget a stage: free its pool, and its weights where no other stage of this worker shares them."""

    stage: str


class RunStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run a ragged batch. Payload: int64 token ids (n_tokens,) for the first stage, else hidden states."""

    stage: str
    step: int
    rows: list[Row]
    sent_s: float
    """By CLOCK_MONOTONIC, which daemon and worker share."""


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Payload: hidden states (n_tokens, hidden_size), or nothing from the last stage, which sends tokens."""

    stage: str
    step: int
    compute_s: float
    waited_s: float
    """How long the worker computed other steps after this one had been sent to it."""
    sampled: list[list[SampledToken]]
    scored: list[list[ScoredToken]] = []


class MeasureDevice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Measure the device: GEMM rate in `dtype` and sustained memory bandwidth."""

    dtype: DtypeName


class DeviceMeasured(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What MeasureDevice found; spreads are (max - min) / median over the last windows."""

    flops_per_s: float
    flops_spread: float
    bytes_per_s: float
    bytes_spread: float
    total_bytes: int
    """Memory of the device in all."""
    name: str


WORKER_REQUEST = LoadStage | NameTensors | DropStage | RunStep | MeasureDevice
WORKER_REPLY = StageLoaded | TensorsNamed | StageFailed | StepDone | StepFailed | DeviceMeasured
