"""A bootstrap node as its HTTP surface sees it: who is there and the links; it takes no requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from daemon.link_views import link_views
from daemon.peering.links import LinkMonitor
from daemon.reachability import undialable_by
from daemon.trust.desk import TrustDesk
from daemon.trust.state import Membership
from daemon.views import (
    Blocker,
    CachedModelView,
    Issued,
    KvBlocksView,
    LinkView,
    MemberState,
    MemberView,
    NodeView,
    PlanningView,
    PlanView,
    Readiness,
    Removed,
    RequestView,
    StatusView,
    TokenView,
    TopologyView,
)
from daemon.web.service import GenerationRequest, ServedModel, TokenSink
from hexmesh.errors import NotReady
from hexmesh.membership.reach import OwnReach
from hexmesh.membership.records import Directory, NodeRecord
from hexmesh.wire.orders import NodeStanding, OrderAction

BLOCKER = Blocker(
    code="bootstrap_node",
    message="this is a bootstrap node: it carries connections and serves no requests",
    next_step="ask another node of the mesh",
)
_NO_KV = KvBlocksView(free=0, used=0, cached=0, leased=0)


class BootstrapService:
    """Reads; what it shows has owners elsewhere."""

    def __init__(
        self,
        *,
        node_id: str,
        name: str,
        membership: Membership,
        directory: Directory,
        links: LinkMonitor,
        reach: OwnReach,
        is_up: Callable[[str], bool],
        trust: TrustDesk,
        registry: CollectorRegistry,
        ask_to_leave: Callable[[bool], None],
    ) -> None:
        self._node_id = node_id
        self._name = name
        self._membership = membership
        self._directory = directory
        self._links = links
        self._reach = reach
        self._is_up = is_up
        self._trust = trust
        self._registry = registry
        self._ask_to_leave = ask_to_leave

    @property
    def model(self) -> ServedModel:
        raise _blocker_error()

    @property
    def registry(self) -> CollectorRegistry:
        return self._registry

    def readiness(self) -> Readiness:
        return Readiness(ready=False, blocker=BLOCKER)

    def generate(self, request: GenerationRequest, sink: TokenSink) -> Callable[[], None]:
        raise _blocker_error()

    def cancel(self, request_id: str) -> bool:
        return False

    def status(self) -> StatusView:
        return StatusView(
            node=self._node_id,
            name=self._name,
            mesh=self._membership.mesh_id,
            model=self._membership.model.name,
            ready=False,
            blocker=BLOCKER,
            coordinator=None,
            plan_id=None,
            nodes_alive=sum(member.state == "alive" for member in self.members()),
            requests_running=0,
            requests_waiting=0,
            kv_blocks=_NO_KV,
            certificate=self._trust.certificate(),
            dialable=self._reach.is_dialable,
            undialable_by=undialable_by(self._reach, self._directory),
        )

    def members(self) -> list[MemberView]:
        now_unix_s = time.time()
        return [
            MemberView(
                id=record.node,
                name=record.name,
                address=record.peer_address,
                site=record.site,
                state=self._state_of(record),
                roles=[*record.roles, *(["issuer"] if self._trust.is_issuer(record.node) else [])],
                availability=record.availability,
                version=record.hexmesh_version,
                age_s=max(0.0, now_unix_s - record.made_at_unix_s),
                rtt_s=self._links.rtt_s(record.node),
                certificate=self._trust.certificate_state(record.node),
            )
            for record in self._directory.records()
        ]

    def links(self) -> list[LinkView]:
        return link_views(self._directory, in_use=frozenset())

    def topology(self) -> TopologyView:
        return TopologyView(
            mesh_id=self._membership.mesh_id,
            model=self._membership.model.name,
            plan_id=None,
            term=0,
            epoch=None,
            coordinator=None,
            plan_reason=None,
            plan_age_s=None,
            nodes=[
                NodeView(
                    id=member.id,
                    name=member.name,
                    site=member.site,
                    state=member.state,
                    availability=member.availability,
                    capabilities=[],
                    devices=[],
                )
                for member in self.members()
            ],
            replicas=[],
            flows=[],
            links=self.links(),
            bottleneck=None,
            unused=[],
        )

    def requests(self) -> list[RequestView]:
        return []

    def plan(self) -> PlanView:
        return PlanView(
            plan_id=None,
            epoch=None,
            reason=None,
            model=self._membership.model.name,
            dtype=self._membership.dtype,
            devices=[],
            replicas=[],
            predicted_tokens_per_s=None,
            predicted_batch=None,
            blocker=BLOCKER,
            explanation=[],
        )

    def planning(self) -> PlanningView:
        raise _blocker_error()

    async def models(self) -> list[CachedModelView]:
        return []

    async def create_token(self, *, ttl_s: float, uses: int) -> Issued:
        return await asyncio.to_thread(self._trust.admission.create_token, ttl_s=ttl_s, uses=uses)

    def tokens(self) -> list[TokenView]:
        return self._trust.admission.tokens()

    async def revoke_token(self, token_id: str) -> None:
        await asyncio.to_thread(self._trust.admission.revoke_token, token_id)

    async def remove_node(self, name_or_id: str) -> Removed:
        return await self._trust.remove(name_or_id)

    async def replan(self, reason: str) -> None:
        raise _blocker_error()

    async def order_plan(self, order: object) -> None:
        raise _blocker_error()

    async def order(self, node: str, action: OrderAction, deadline_s: float) -> NodeStanding:
        raise _blocker_error()

    async def leave(self, *, forget: bool) -> None:
        self._ask_to_leave(forget)

    def _state_of(self, record: NodeRecord) -> MemberState:
        if record.availability == "left":
            return "left"
        return "alive" if record.node == self._node_id or self._is_up(record.node) else "failed"


def _blocker_error() -> NotReady:
    return NotReady(BLOCKER.message, code=BLOCKER.code, next_step=BLOCKER.next_step)
