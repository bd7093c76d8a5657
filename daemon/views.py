"""The JSON of the read verbs: one struct for each object; scripts rely on their fields. SI units; unknown is null."""

from __future__ import annotations

from typing import Literal

import msgspec

from hexmesh.cluster import Cluster
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName
from hexmesh.workload import Workload

MemberState = Literal["joining", "alive", "suspect", "failed", "left"]
AvailabilityView = Literal["active", "cordoned", "draining", "drained", "leaving", "left"]
RequestState = Literal["waiting", "running", "draining", "replaying"]
"""draining: it ends in the plan before the present one; replaying: its tokens are computed again elsewhere."""


class Blocker(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Why this peer cannot route a request now, and what to do."""

    code: str
    message: str
    next_step: str
    needed_bytes: int | None = None
    room_bytes: int | None = None


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this peer can route a request end to end now."""

    ready: bool
    blocker: Blocker | None


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    kind: str
    name: str
    budget_bytes: int
    used_bytes: int
    flops_per_s: float | None
    bytes_per_s: float | None


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    site: str
    state: MemberState
    capabilities: list[str]
    devices: list[DeviceView]
    availability: AvailabilityView = "active"


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    devices: list[int]
    layers: tuple[int, int]
    tp: int
    kv_blocks: int
    kv_blocks_free: int | None


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    role: str
    stages: list[StageView]
    predicted_tokens_per_s: float
    measured_tokens_per_s: float | None
    requests_running: int | None = None
    predicted_batch: int | None = None
    is_whole: bool = True
    """Whether all its nodes answer and its driver runs it."""


class FlowView(msgspec.Struct, frozen=True, kw_only=True, rename={"src": "from", "dst": "to"}):
    src: str
    dst: str
    share: float


class LinkView(msgspec.Struct, frozen=True, kw_only=True, rename={"src": "from", "dst": "to"}):
    src: str
    dst: str
    rtt_p50_s: float | None
    rtt_p95_s: float | None
    bytes_per_s: float | None
    lower_bound: bool
    age_s: float | None
    relayed: bool
    in_use: bool


class BottleneckView(msgspec.Struct, frozen=True, kw_only=True):
    """The stage or link that limits the rate. kind: "stage" or "link"; utilisation in [0, 1] or null."""

    kind: str
    id: str
    utilisation: float | None


class UnusedView(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    device: int
    reason: str


class TopologyView(msgspec.Struct, frozen=True, kw_only=True):
    mesh_id: str
    model: str
    plan_id: str | None
    term: int
    epoch: int | None
    coordinator: str | None
    plan_reason: str | None
    plan_age_s: float | None
    nodes: list[NodeView]
    replicas: list[ReplicaView]
    flows: list[FlowView]
    links: list[LinkView]
    bottleneck: BottleneckView | None
    unused: list[UnusedView]


CertificateState = Literal["valid", "grace", "expired"]
"""grace: it should have been renewed; members accept it for a week all the same."""


class CertificateView(msgspec.Struct, frozen=True, kw_only=True):
    """This node's certificate: its state, what is left of its day and of its grace, and who issued it."""

    state: CertificateState
    expires_s: float
    refused_s: float
    issuer: str | None
    """A node's id; null: the root."""


class MemberView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    address: str
    site: str
    state: MemberState
    roles: list[str]
    version: str
    age_s: float | None
    """Since it was heard last; null if never, or if its host has refused connections since."""
    rtt_s: float | None
    availability: AvailabilityView = "active"
    certificate: CertificateState | None = None


class KvBlocksView(msgspec.Struct, frozen=True, kw_only=True):
    free: int
    used: int
    cached: int
    leased: int


class WeightsView(msgspec.Struct, frozen=True, kw_only=True):
    """A fetch of weights from peers that runs on this node. `trouble`: why nothing comes."""

    fetched_bytes: int
    needed_bytes: int
    bytes_per_s: float
    left_s: float | None
    peers: list[str]
    trouble: str | None


class CachedModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model that this node knows: in a local folder, or as far as the cache holds its tensors."""

    id: str
    name: str
    folder: str | None
    """The local folder with all of it, if there is one."""
    weight_bytes: int
    """All tensors of the model."""
    cached_bytes: int
    complete: bool
    layers: list[tuple[int, int]]
    """Layers whose tensors are all in the cache."""
    tensors: int
    cached_tensors: int
    used_at_unix_s: float | None
    """When a tensor of the cache was used last."""
    in_use: bool
    """Whether a stage of the running daemon uses it."""


class DamageView(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is not what the manifest says. `repair`: what was done about it, or is to be done."""

    path: str
    tensor: str | None
    repair: str


class VerifiedModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose files were hashed again."""

    id: str
    name: str
    folder: str | None
    damages: list[DamageView]


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    name: str
    mesh: str
    model: str
    ready: bool
    blocker: Blocker | None
    coordinator: str | None
    plan_id: str | None
    nodes_alive: int
    requests_running: int
    requests_waiting: int
    kv_blocks: KvBlocksView
    replicas: int = 0
    replicas_whole: int = 0
    """Those of which all nodes answer and the driver runs; one is enough to be ready."""
    weights: WeightsView | None = None
    """While weights are fetched here."""
    certificate: CertificateView | None = None
    dialable: bool = True
    """Whether other members can dial this node; where not, it is reached in other ways."""
    undialable_by: list[str] = []
    """Those that cannot, each with its reason."""


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    state: str
    """A `RequestState` of this version."""
    replica: str | None
    stage: int | None
    role: str
    prompt_tokens: int
    output_tokens: int
    age_s: float
    attempts: int
    kv_handoff: str | None


class PlanDeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan needs of one device and what there is."""

    node: str
    name: str
    device: int
    layers: tuple[int, int] | None
    needed_bytes: int
    room_bytes: int
    reason: str
    replica: str | None = None


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    plan_id: str | None
    epoch: int | None
    reason: str | None
    model: str
    dtype: str | None
    devices: list[PlanDeviceView]
    replicas: list[ReplicaView]
    predicted_tokens_per_s: float | None
    predicted_batch: int | None
    blocker: Blocker | None
    explanation: list[str]


class PlanningView(msgspec.Struct, frozen=True, kw_only=True):
    """What plans for the mesh are made from: all that is measured of the nodes that plans may use now."""

    model_id: str
    model_name: str
    spec: ModelSpec
    dtype: DtypeName
    max_model_tokens: int
    workload: Workload
    cluster: Cluster
    hosts: dict[str, int]
    """Boot nonces of its nodes."""


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A fresh join token."""

    token: str
    join_command: str
    expires_s: float
    uses: int


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    """A join token that still admits somebody; never its secret. `issuer` minted it and alone redeems it."""

    id: str
    uses: int
    uses_left: int
    expires_s: float
    issuer: str
    redeemed_by: list[str]
    """Node ids that joined with it."""


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """A node that is no member any more."""

    id: str
    name: str


class UpLine(msgspec.Struct, frozen=True, kw_only=True):
    """What `hexmesh join` prints once it is up. The last two are null where this node may not admit."""

    node_id: str
    name: str
    http_url: str
    peer_addr: str
    join_command: str | None
    token_expires_s: float | None
