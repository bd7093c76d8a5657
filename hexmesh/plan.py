"""A plan: which devices hold which layers, and what that is predicted to give."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from hexmesh.cluster import Role

DtypeName = Literal["float32", "bfloat16", "float16"]

_LONGEST_STEP_S = 3600.0

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Layers [start, stop) of the model on devices of one node; more than one device is tensor parallelism."""

    node: str
    devices: tuple[int, ...]
    start: int
    stop: int
    kv_blocks: int
    """Blocks that this stage's pool reserves; the replica's capacity is the smallest of its stages'."""
    needed_bytes: int
    """Weights, KV pool and workspace of this stage, on each of its devices."""
    room_bytes: int
    """The budget of the smallest of its devices."""
    predicted_step_s: float
    """Predicted time of one decode step at the planned batch."""

    @property
    def n_layers(self) -> int:
        return self.stop - self.start


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A whole pipeline: its stages cover every layer once, in order."""

    id: str
    role: Role
    stages: tuple[Stage, ...]
    block_tokens: int
    predicted_tokens_per_s: float
    predicted_batch: int
    """The number of sequences decoding together that the prediction assumes."""

    @property
    def kv_blocks(self) -> int:
        return min(stage.kv_blocks for stage in self.stages)

    @property
    def driver(self) -> str:
        """The node whose daemon drives this replica: the first stage's."""
        return self.stages[0].node


class Unused(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the plan leaves out, and why, in words for the operator."""

    node: str
    device: int
    reason: str


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """The share of requests that goes from one replica (prefill) to another (decode)."""

    src: str
    dst: str
    share: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What every host of an epoch is to do. Hosts with no stage are in `hosts` all the same."""

    model_id: str
    model_name: str
    n_layers: int
    dtype: DtypeName
    max_model_tokens: int
    hosts: dict[str, int]
    """Boot nonce of every leased host, by node id."""
    replicas: tuple[Replica, ...]
    flows: tuple[Flow, ...] = ()
    unused: tuple[Unused, ...] = ()
    barred: tuple[str, ...] = ()
    """Hosts that were not to be used, by their own word (`hexmesh.cluster.Availability`)."""
    reason: str = ""
    """Why this plan was made: the trigger, in words."""
    explanation: tuple[str, ...] = ()
    """One line a node: its share and what decided it."""

    def placement_of(self, replica: Replica) -> tuple[object, ...]:
        """Equal for replicas of two plans that hold the same on the same devices of the same boots."""
        stages = tuple(
            (stage.node, self.hosts[stage.node], stage.devices, stage.start, stage.stop, stage.kv_blocks)
            for stage in replica.stages
        )
        return self.model_id, self.dtype, replica.block_tokens, stages

    def idle_hosts(self) -> frozenset[str]:
        """Hosts that hold no stage."""
        return frozenset(self.hosts) - {stage.node for replica in self.replicas for stage in replica.stages}

    def stages_of(self, node: str) -> tuple[tuple[Replica, int], ...]:
        """Every (replica, stage index) that the node holds."""
        return tuple(
            (replica, index)
            for replica in self.replicas
            for index, stage in enumerate(replica.stages)
            if stage.node == node
        )


def encode_plan(plan: Plan) -> bytes:
    """The bytes that travel and that the digest is taken of."""
    return msgspec.msgpack.encode(plan)


def decode_plan(data: bytes) -> Plan:
    """The plan in `data`; msgspec.ValidationError or DecodeError when it is not one."""
    try:
        return msgspec.msgpack.decode(data, type=Plan)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def plan_fault(plan: Plan) -> str | None:
    """What no planner would write, and what would break whoever carries it out; None for a sound plan.

    Whether it fits the devices is another question (`hexmesh.schedule.check`).
    """
    if len({replica.id for replica in plan.replicas}) != len(plan.replicas):
        return "two replicas have one name"
    if plan.max_model_tokens < 1:
        return "it takes no tokens"
    if not all(0.0 <= flow.share <= 1.0 for flow in plan.flows):
        return "a flow has an impossible share"
    faults = (_replica_fault(plan, replica) for replica in plan.replicas)
    return next((fault for fault in faults if fault is not None), None)


def _replica_fault(plan: Plan, replica: Replica) -> str | None:
    starts = [stage.start for stage in replica.stages]
    stops = [stage.stop for stage in replica.stages]
    covers = [0, *stops] == [*starts, plan.n_layers] and all(stage.n_layers > 0 for stage in replica.stages)
    if not replica.stages or not covers:
        return f"the stages of replica {replica.id} do not cover {plan.n_layers} layers once, in order"
    if replica.block_tokens < 1 or replica.kv_blocks < 1:
        return f"replica {replica.id} has no room for KV"
    if replica.predicted_batch < 1:
        return f"replica {replica.id} is meant for no sequence"
    if not all(stage.devices and 0 <= stage.predicted_step_s < _LONGEST_STEP_S for stage in replica.stages):
        return f"a stage of replica {replica.id} has no device, or takes an impossible time"
    return None


def digest_of(data: bytes) -> str:
    """The digest that certificates name a plan by."""
    return hashlib.sha256(data).hexdigest()
