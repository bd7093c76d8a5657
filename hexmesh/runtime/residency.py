"""What one device holds: stages of old and new plans, what they share, and the budget they stay within.

Stages of two plans share the layers that both have. A stage that is the same in both shares its KV pool too,
so that what runs in the old plan ends there while the new one is served.

A stage that fits beside the others gets everything at once. One that fits only without them is accepted and
waits, first for its KV pool and, if need be, for its weights, until others are dropped. One that could never
fit is refused.
"""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hexmesh.errors import HexmeshError, InvalidInput, NotReady
from hexmesh.runtime.kv_pool import KvPool
from hexmesh.runtime.loading import StageDraft, draft_stage, fill
from hexmesh.runtime.stage import Stage
from hexmesh.units import show_bytes
from hexmesh.wire.worker import LoadStage, StageLoaded

Progress = Literal["drafted", "filled", "ready"]


@dataclass(slots=True)
class _Resident:
    """A stage and how far it is. Owned by Residency."""

    draft: StageDraft
    progress: Progress = "drafted"
    stage: Stage | None = None
    n_layers_reused: int = 0

    def key(self, part: str) -> str:
        """A part's name among all models, equal exactly for equal weights."""
        return f"{self.draft.order.model_id}/{self.draft.order.dtype}/{part}"

    @property
    def pool_key(self) -> str:
        """Equal exactly for stages whose KV may lie in the same memory."""
        order = self.draft.order
        cut = f"{order.start}-{order.stop}/{order.kv_blocks}x{order.block_tokens}"
        return self.key(f"{cut}/{order.pool}")

    def part_bytes(self) -> dict[str, int]:
        """Bytes of each part, by key."""
        return {self.key(name): size for name, size in self.draft.part_bytes.items()}


@dataclass(frozen=True, slots=True)
class Promotion:
    """A waiting stage after room was made: it can run now, or its weights could not be read."""

    stage: str
    error: HexmeshError | None


class Residency:
    """Owns a device's stages. `load` and `drop` come from one thread.

    `find` may come from another: it reads one entry, and a stage is complete before it is entered.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._residents: dict[str, _Resident] = {}
        self._parts: dict[str, nn.Module] = {}
        self._pools: dict[str, KvPool] = {}

    def load(self, order: LoadStage) -> StageLoaded:
        """Accept a stage and make as much of it as fits.

        Raises Refused, InvalidInput or NotReady (too large).
        """
        started_s = time.perf_counter()
        if order.stage in self._residents:
            raise InvalidInput(f"stage {order.stage} is loaded already", next_step="drop it first")
        draft = draft_stage(order, self._device)
        alone_bytes = draft.weight_bytes + draft.pool_bytes
        if alone_bytes > order.budget_bytes:
            raise NotReady(
                f"layers [{order.start}, {order.stop}) need {alone_bytes} bytes "
                f"({show_bytes(draft.weight_bytes)} weights, {show_bytes(draft.pool_bytes)} KV pool), "
                f"the device's budget is {order.budget_bytes} bytes ({show_bytes(order.budget_bytes)})",
                code="over_budget",
                needed_bytes=alone_bytes,
                room_bytes=order.budget_bytes,
            )
        resident = _Resident(draft)
        self._residents[order.stage] = resident
        try:
            self._advance(resident)
        except BaseException:
            self._forget(order.stage)
            raise
        return StageLoaded(
            stage=order.stage,
            load_s=time.perf_counter() - started_s,
            weight_bytes=draft.weight_bytes,
            pool_bytes=draft.pool_bytes,
            pool_deferred=resident.progress != "ready",
            n_layers_reused=resident.n_layers_reused,
        )

    def drop(self, stage: str) -> list[Promotion]:
        """Forget a stage, then give the room to stages that wait for it, the oldest first."""
        self._forget(stage)
        promotions = []
        for name, resident in list(self._residents.items()):
            if resident.progress != "ready":
                try:
                    self._advance(resident)
                except HexmeshError as error:
                    self._forget(name)
                    promotions.append(Promotion(name, error))
                else:
                    if resident.stage is not None:
                        promotions.append(Promotion(name, None))
        return promotions

    def find(self, stage: str) -> Stage | Literal["waiting"] | None:
        """The stage if it can run, "waiting" while it waits for room, None if there is none."""
        resident = self._residents.get(stage)
        if resident is None:
            return None
        return resident.stage or "waiting"

    def _advance(self, resident: _Resident) -> None:
        """Take a stage as far as the budget allows."""
        budget_bytes = resident.draft.order.budget_bytes
        if resident.progress == "drafted" and self._bytes_with(resident, is_with_pool=False) <= budget_bytes:
            self._fill(resident)
            resident.progress = "filled"
        if resident.progress == "filled" and self._bytes_with(resident, is_with_pool=True) <= budget_bytes:
            resident.stage = resident.draft.make_stage(self._pool_of(resident))
            resident.progress = "ready"

    def _pool_of(self, resident: _Resident) -> KvPool:
        key = resident.pool_key
        if key not in self._pools:
            self._pools[key] = resident.draft.make_pool(resident.draft.order.kv_blocks)
        return self._pools[key]

    def _fill(self, resident: _Resident) -> None:
        names = resident.draft.splice.paths
        held = {name: self._parts.get(resident.key(name)) for name in names}
        shared = {name: module for name, module in held.items() if module is not None}
        fill(resident.draft, shared)
        for name in names:
            self._parts[resident.key(name)] = resident.draft.splice.part(name)
        resident.n_layers_reused = sum(name in shared for name in resident.draft.splice.layer_parts())
        resident.draft.make_stage(resident.draft.make_pool(1)).warm_up()

    def _bytes_with(self, candidate: _Resident, *, is_with_pool: bool) -> int:
        """Everything held, what is shared once, and the candidate's weights, and its pool if asked."""
        held = [
            other for other in self._residents.values() if other is candidate or other.progress != "drafted"
        ]
        parts: dict[str, int] = {}
        pools = {candidate.pool_key: candidate.draft.pool_bytes} if is_with_pool else {}
        n_bytes = 0
        for resident in held:
            parts.update(resident.part_bytes())
            n_bytes += resident.draft.rest_bytes
            if resident.progress == "ready":
                pools[resident.pool_key] = resident.draft.pool_bytes
        return n_bytes + sum(parts.values()) + sum(pools.values())

    def _forget(self, stage: str) -> None:
        gone = self._residents.pop(stage, None)
        if gone is None:
            return
        used = {key for resident in self._residents.values() for key in resident.part_bytes()}
        for key in [key for key in self._parts if key not in used]:
            del self._parts[key]
        if not any(resident.pool_key == gone.pool_key for resident in self._residents.values()):
            self._pools.pop(gone.pool_key, None)
        del gone
        _return_memory(self._device)


def _return_memory(device: torch.device) -> None:
    """Give freed memory back to the system, so that other processes of the host see it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
